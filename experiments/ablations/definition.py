"""What an ablation is: a base config, axes over its fields, and the groups that they make.

Axes are of three sorts, which the field decides. *Numbers* (learning rate, beta range, EMA decay,
weighting parameters) change neither shapes nor program, and train side by side with the seeds.
*Sampling* fields (sampler, steps, guidance scale, which average) reuse what was trained. All others
change the program: each combination of them is a group. So groups follow from the definition and
the number of seeds alone, never from what is asked for or done already: the same seed alone and
beside others differs in its last bits.

A combination in which a field is not read (the beta range, where the process is cosine) is run for
one value of it, the base's: the other values would be the same runs again. An axis that changes
nothing is refused: one of a single value, one with a value that is read in no combination, and one
with a value that means what another does (None and the number that it stands for).
"""

import dataclasses
import itertools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.ablations.fields import as_json, fit_type, near, replaced, show
from experiments.ablations.world import SEED as SEED
from experiments.ablations.world import RunConfig, World
from experiments.common import options
from jaxdiff import checks
from jaxdiff.training.run import config_hash

MAX_SEED = 2**32 - 1
"""The last seed; keys hold 32 bits of one."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The unit of work.

    Attributes:
        index: its place in the ablation.
        config: the base with the values that its program has.
        fixed: those values, by field.
        members: what each trained run has of its own, by field; the seed last.
        samplings: how each is sampled, by field.
        pairs: the rows: which member is sampled how, as indices into the two above.
    """

    index: int
    config: RunConfig
    fixed: dict[str, Any]
    members: tuple[dict[str, Any], ...]
    samplings: tuple[dict[str, Any], ...]
    pairs: tuple[tuple[int, int], ...]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the values that each row has on the axes, and its seed."""
        for member, sampling in self.pairs:
            yield {**self.fixed, **self.members[member], **self.samplings[sampling]}

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
        hashed: the fields that rows' hashes are of whatever their value; unless given, all that
            configs always had. A folder that was begun before a field was added goes on with
            those that there were.

    Raises:
        ValueError: if an axis names no field, is empty, repeats, lacks the base's value or has one
            that changes nothing, a measure is unknown, or a seed out of range.
        TypeError: if a value has another type than its field, or the base is of another world or
            holds a list, which programs are not kept by.
    """

    question: str
    world: World
    base: RunConfig
    axes: Mapping[str, Sequence[Any]]
    measures: Sequence[str]
    seeds: int = 3
    learned: str = ""
    hashed: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.base, self.world.config):
            raise TypeError(f"`base` must be a {self._config_name}; got {checks.shown(self.base)}.")
        try:
            hash(self.base)
        except TypeError as error:
            raise TypeError(f"`base` must hold tuples, no lists; got {self.base}.") from error
        checks.count("seeds", self.seeds)
        hints, axes = typing.get_type_hints(self.world.config), {}
        for field, values in self.axes.items():
            if field not in hints:
                raise ValueError(self._no_axis(field, hints))
            if not isinstance(values, list | tuple):
                raise TypeError(
                    f"axis `{field}` must hold a tuple of values; got {checks.shown(values)}."
                )
            axes[field] = tuple(fit_type(field, hints[field], value) for value in values)
            if not values or len(set(axes[field])) < len(values):
                raise ValueError(f"axis `{field}` must hold values, each once; got {values}.")
            base = getattr(self.base, field)
            if field != SEED and base not in axes[field]:
                raise ValueError(f"axis `{field}` must hold the base's {base!r}; got {values}.")
            if field != SEED and len(values) == 1:
                raise ValueError(
                    f"axis `{field}` changes nothing: it has one value, {show(base)}, which the "
                    "base has too. Take it out, or add values."
                )
        object.__setattr__(self, "axes", axes)
        self._check_measures()
        for seed in self.seed_values:
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"`seed` must lie in 0..{MAX_SEED}; got {seed}.")
        self._check_that_axes_are_read()

    @property
    def _config_name(self) -> str:
        return f"{self.world.config.__module__}.{self.world.config.__name__}"

    def _no_axis(self, field: str, hints: Mapping[str, Any]) -> str:
        told = self.world.notes.get(field) or near(field, hints, "`")
        return f"axis `{field}` is no field of {self._config_name}, so it cannot vary; {told}"

    def _check_measures(self) -> None:
        if isinstance(self.measures, str) or not self.measures:
            raise ValueError(f"`measures` must be a tuple of names; got {self.measures!r}.")
        if len(set(self.measures)) < len(self.measures):
            raise ValueError(f"`measures` must name each once; got {self.measures}.")
        for name in self.measures:
            if name not in self.world.measures:
                told = near(name, self.world.measures, "`")
                raise ValueError(f"measure `{name}` is unknown; {told}")

    def _check_that_axes_are_read(self) -> None:
        made = cells(self)
        for field, values in self.varied.items():
            dead = [v for v in values if all(cell[field] != v for cell in made)]
            if dead:
                why = self.unread(replaced(self.base, {field: dead[0]}))
                reason = why.get(field) or "other axes decide that it is not read"
                raise ValueError(
                    f"axis `{field}` changes nothing at {', '.join(map(show, dead))}: {reason}. "
                    "Take it out, or vary what makes runs read it."
                )
        meant = [self.world.meant(replaced(self.base, cell)) for cell in made]
        for field, value in ((f, v) for f, values in self.varied.items() for v in values):
            with_it = [m for m, cell in zip(meant, made, strict=True) if cell[field] == value]
            others = {m for m, cell in zip(meant, made, strict=True) if cell[field] != value}
            if value != getattr(self.base, field) and others.issuperset(with_it):
                raise ValueError(
                    f"axis `{field}` changes nothing at {show(value)}: runs are the same at "
                    "another of its values. Take one out."
                )

    def unread(self, config: RunConfig) -> dict[str, str]:
        """Return why a run of a config does not read a field that varies, by field."""
        measures = [self.world.measures[name] for name in self.measures]
        found = dict(self.world.unread(config))
        if not any(measure.sampled for measure in measures):
            found |= dict.fromkeys(self.world.sampling, "no measure is of samples")
        read = frozenset().union(*(measure.reads for measure in measures))
        varied = self.varied.keys() - read
        return {field: why for field, why in found.items() if field in varied}

    def applies(self, config: RunConfig) -> bool:
        """Whether a config is a row: whether all that it does not read is as the base has it."""
        return all(
            getattr(config, field) == getattr(self.base, field) for field in self.unread(config)
        )

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
        for cell in cells(self):
            self.world.check(replaced(self.base, cell))


def groups(ablation: Ablation) -> list[Group]:
    """Return the groups of an ablation, in the order of its axes."""
    world, base = ablation.world, ablation.base
    judged = world.sampling | world.averages
    numbers = {f: v for f, v in ablation.varied.items() if f in world.numbers}
    sampling = {f: v for f, v in ablation.varied.items() if f in judged}
    fixed = {f: v for f, v in ablation.varied.items() if f not in numbers and f not in sampling}
    members = tuple(product(numbers | {SEED: ablation.seed_values}))
    samplings = tuple(product(sampling))
    made: list[Group] = []
    for values in product(fixed):
        config = replaced(base, values)
        rows = [
            (member, how)
            for how in samplings
            for member in members
            if ablation.applies(replaced(config, member | how))
        ]
        kept = tuple(member for member in members if any(member == m for m, _ in rows))
        hows = tuple(how for how in samplings if any(how == h for _, h in rows))
        pairs = tuple((kept.index(member), hows.index(how)) for member, how in rows)
        if rows:
            made.append(Group(len(made), config, values, kept, hows, pairs))
    return made


def cells(ablation: Ablation) -> list[dict[str, Any]]:
    """Return the combinations of the axes that are run, the last axis changing fastest."""
    return [
        values
        for values in product(ablation.varied)
        if ablation.applies(replaced(ablation.base, values))
    ]


def left_out(ablation: Ablation) -> dict[tuple[str, str], int]:
    """Return how many combinations are not run, by a field that they do not read, and why."""
    count: dict[tuple[str, str], int] = {}
    for values in product(ablation.varied):
        config = replaced(ablation.base, values)
        for field, why in ablation.unread(config).items():
            if getattr(config, field) != getattr(ablation.base, field):
                count[field, why] = count.get((field, why), 0) + 1
                break
    return count


def row_hash(ablation: Ablation, config: RunConfig) -> str:
    """Return the hash of the whole config of a row, later fields counting off their defaults."""
    whole, later = dataclasses.asdict(config), options.later_defaults(type(config))
    always = whole.keys() - later.keys() if ablation.hashed is None else ablation.hashed
    moved = {field for field, default in later.items() if whole[field] != default}
    return config_hash({field: whole[field] for field in whole if field in {*always, *moved}})


def record(name: str, preset: str, ablation: Ablation) -> dict[str, Any]:
    """Return what resolves an ablation, flat, as JSON holds it.

    Later fields of the base are left out at their defaults, which a record that lacks them means.
    """
    base = {f"base.{field}": value for field, value in options.without_later(ablation.base).items()}
    axes = {f"axis.{field}": list(values) for field, values in ablation.varied.items()}
    own = {"name": name, "preset": preset, "seeds": list(ablation.seed_values)}
    whole = {**own, "measures": list(ablation.measures), **axes, **base}
    del whole["base.seed"]
    return as_json(whole)


def product(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return all combinations of values by field, the last field changing fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
