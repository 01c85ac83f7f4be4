"""What an ablation is: a base config, axes over its fields, and the groups that they make.

Axes are of three sorts, which the field decides. *Numbers* (learning rate, beta range, EMA decay,
weighting parameters) change neither shapes nor program, and train side by side with the seeds.
*Sampling* fields (sampler, steps, guidance scale, which average) reuse what was trained. All others
change the program: each combination of them is a group. So groups follow from the definition and
the number of seeds alone, never from what is asked for or done already: the same seed alone and
beside others differs in its last bits.
"""

import dataclasses
import difflib
import itertools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxdiff.training.run import config_hash
from jaxdiff.typing import Array, Batch, LossFn, PyTree

SEED = "seed"


class Measure(NamedTuple):
    """A figure of merit.

    Attributes:
        label: for readers.
        sampled: whether it is of samples, and so depends on the sampling fields.
        higher_is_better: otherwise the smallest is best.
    """

    label: str
    sampled: bool = False
    higher_is_better: bool = False


class Problem(NamedTuple):
    """What the members of a group share. Their configs have traced numbers and a key for a seed.

    Attributes:
        init_params: (config) -> initial parameters.
        loss: (config) -> the loss.
        table: (config, its numbers known) -> arrays of a member's own, such as its data order.
        batch: (config, table, step) -> the batch of a step.
        measure: (name, config to sample by, members, params with a leading axis of members,
            samples or None) -> values (M,).
        draw: (config to sample by, members, params) -> samples (M, N, ...).
        calls: (config to sample by) -> evaluations of the network a sample.
        call_flops: () -> operations of one evaluation for one sample, None where unknown.
    """

    init_params: Callable[[Any], PyTree]
    loss: Callable[[Any], LossFn]
    table: Callable[[Any], PyTree]
    batch: Callable[[Any, PyTree, Array], Batch]
    measure: Callable[..., Sequence[float]]
    draw: Callable[..., Any]
    calls: Callable[[Any], int]
    call_flops: Callable[[], float | None]


class World(NamedTuple):
    """What a kind of data brings to an ablation.

    Attributes:
        config: the dataclass of its configs.
        numbers: fields that may be traced.
        sampling: fields that a trained run is sampled by.
        measures: what can be measured, by name.
        check: refuses a config that cannot be meant.
        problem: makes the problem of a group's config.
    """

    config: type
    numbers: frozenset[str]
    sampling: frozenset[str]
    measures: Mapping[str, Measure]
    check: Callable[[Any], None]
    problem: Callable[[Any], Problem]


@dataclasses.dataclass(frozen=True)
class Group:
    """The unit of work.

    Attributes:
        index: its place in the ablation.
        config: the base with the values that its program has.
        fixed: those values, by field.
        members: what each trained run has of its own, by field; the seed last.
        samplings: how each is sampled, by field.
    """

    index: int
    config: Any
    fixed: dict[str, Any]
    members: tuple[dict[str, Any], ...]
    samplings: tuple[dict[str, Any], ...]

    @property
    def title(self) -> str:
        """What tells it from other groups, for readers."""
        return ", ".join(f"{k}={show(v)}" for k, v in self.fixed.items()) or "all in one group"


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A question that a grid of runs answers.

    Attributes:
        question: for readers.
        world: the kind of data.
        base: the config that all rows share but for the axes, and that they are compared with.
        axes: values by field; the base's own value must be among them.
        measures: names of measures, the first of which decides.
        seeds: how many, from the base's seed on; an axis over the seed gives them instead.
        learned: what the authors' run of it taught, for readers.

    Raises:
        ValueError: if an axis names no field, is empty, repeats or lacks the base's value, or a
            measure is unknown; the nearest name is given.
        TypeError: if a value has another type than its field, or the base is of another world.
    """

    question: str
    world: World
    base: Any
    axes: Mapping[str, Sequence[Any]]
    measures: Sequence[str]
    seeds: int = 3
    learned: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.base, self.world.config):
            wanted = f"{self.world.config.__module__}.{self.world.config.__name__}"
            raise TypeError(f"`base` must be a {wanted}; got a {type(self.base).__name__}.")
        hints = typing.get_type_hints(self.world.config)
        axes = {}
        for field, values in self.axes.items():
            if field not in hints:
                raise ValueError(f"axis `{field}` names no field; nearest: `{near(field, hints)}`.")
            axes[field] = tuple(fit_type(field, hints[field], value) for value in values)
            if not values or len(set(axes[field])) < len(values):
                raise ValueError(f"axis `{field}` must hold values, each once; got {values}.")
            base = getattr(self.base, field)
            if field != SEED and base not in axes[field]:
                raise ValueError(f"axis `{field}` must hold the base's {base!r}; got {values}.")
        for name in self.measures:
            if name not in self.world.measures:
                nearest = near(name, self.world.measures)
                raise ValueError(f"measure `{name}` is unknown; nearest: `{nearest}`.")
        if not self.measures or self.seeds < 1:
            raise ValueError("an ablation needs a measure and a seed.")
        object.__setattr__(self, "axes", axes)

    @property
    def varied(self) -> dict[str, tuple[Any, ...]]:
        """The axes but for the seed."""
        return {field: tuple(values) for field, values in self.axes.items() if field != SEED}

    @property
    def seed_values(self) -> tuple[int, ...]:
        """The seeds."""
        first = self.base.seed
        return tuple(self.axes.get(SEED, range(first, first + self.seeds)))

    @property
    def baseline(self) -> dict[str, Any]:
        """The base's value on each axis."""
        return {field: getattr(self.base, field) for field in self.varied}

    def check(self) -> None:
        """Refuse what any of the configs cannot mean, before anything trains."""
        for group in groups(self):
            for member in group.members:
                for sampling in group.samplings:
                    self.world.check(dataclasses.replace(group.config, **member, **sampling))


def groups(ablation: Ablation) -> list[Group]:
    """Return the groups of an ablation, in the order of its axes."""
    world, base = ablation.world, ablation.base
    numbers = {f: v for f, v in ablation.varied.items() if f in world.numbers}
    sampling = {f: v for f, v in ablation.varied.items() if f in world.sampling}
    fixed = {f: v for f, v in ablation.varied.items() if f not in numbers and f not in sampling}
    members = tuple(product(numbers | {SEED: ablation.seed_values}))
    samplings = tuple(product(sampling))
    return [
        Group(i, dataclasses.replace(base, **values), values, members, samplings)
        for i, values in enumerate(product(fixed))
    ]


def cells(ablation: Ablation) -> list[dict[str, Any]]:
    """Return all combinations of the axes, the last of which changes fastest."""
    return list(product(ablation.varied))


def row_hash(group: Group, member: Mapping[str, Any], sampling: Mapping[str, Any]) -> str:
    """Return the hash of the whole config of a row."""
    config = dataclasses.replace(group.config, **member, **sampling)
    return config_hash(dataclasses.asdict(config))


def record(name: str, preset: str, ablation: Ablation) -> dict[str, Any]:
    """Return what resolves an ablation, flat, as JSON holds it."""
    base = {f"base.{field}": value for field, value in dataclasses.asdict(ablation.base).items()}
    axes = {f"axis.{field}": list(values) for field, values in ablation.varied.items()}
    own = {"name": name, "preset": preset, "seeds": list(ablation.seed_values)}
    whole = {**own, "measures": list(ablation.measures), **axes, **base}
    del whole["base.seed"]
    return json.loads(json.dumps(whole))  # tuples are lists there


def product(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return all combinations of values by field, the last field changing fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def show(value: Any) -> str:
    """Return a value as tables and `--only` write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def near(name: str, known: Any) -> str:
    """Return the known name that looks most like one."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


# --- Types ----------------------------------------------------------------------------------


def fit_type(field: str, hint: Any, value: Any) -> Any:
    """Return a value as its field's type has it; an int becomes a float where one is meant.

    Raises:
        TypeError: if it has another type.
        ValueError: if it is not one of the names or not finite.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return fit_type(field, next(arg for arg in args if arg is not type(None)), value)
    if origin is Literal:
        if value not in args:
            nearest = near(str(value), map(str, args))
            raise ValueError(f"axis `{field}` has no value {value!r}; nearest: {nearest!r}.")
        return value
    if origin is tuple and isinstance(value, tuple | list):
        return tuple(fit_type(field, args[0], each) for each in value)
    wanted = origin or hint
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        kind = getattr(wanted, "__name__", str(wanted))
        raise TypeError(
            f"axis `{field}` takes {kind}; got {value!r} of type {type(value).__name__}."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"axis `{field}` must be finite; got {value}.")
    return value
