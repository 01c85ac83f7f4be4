"""What the values of a config may be: said beside its fields, judged by one function.

A field's type says what kind of value it takes, and `Annotated` with a `Within` between which
bounds its numbers lie, one by one where it takes several:

    batch_size: Annotated[int, Within(1)] = 64

What a field is to many runs side by side is said there too, by a `Role`.
"""

import contextlib
import dataclasses
import enum
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from experiments.common.command import Refusal


class Within(NamedTuple):
    """Bounds of a number, both of which it may reach unless said otherwise.

    Attributes:
        low: the least.
        high: the most.
        below: whether it must stay below `high` itself.
    """

    low: float
    high: float = math.inf
    below: bool = False

    def holds(self, value: float) -> bool:
        """Tell whether a number is finite and within."""
        at_most = value < self.high if self.below else value <= self.high
        return self.low <= value and at_most and math.isfinite(value)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"at least {self.low:.10g}"
        return f"in [{self.low:.10g}, {self.high:.10g}{')' if self.below else ']'}"


class Role(enum.Enum):
    """What a field is to runs side by side; one without a role changes their program.

    Attributes:
        NUMBER: it changes numbers, but neither shapes nor program, and may be traced.
        SAMPLING: a trained run is sampled by it.
        AVERAGE: it chooses among the averages that a trained run leaves.
    """

    NUMBER = "number"
    SAMPLING = "sampling"
    AVERAGE = "average"


LATER = "later"
"""What marks a field that :func:`later` made."""

Count = Annotated[int, Within(1)]
CountOrNone = Annotated[int | None, Within(1)]
CountsOrNone = Annotated[tuple[int, ...] | None, Within(1)]
Natural = Annotated[int, Within(0)]
NaturalsOrNone = Annotated[tuple[int, ...] | None, Within(0)]
Seed = Annotated[int, Within(0, 2**32 - 1)]
"""Keys hold 32 bits of a seed: larger ones could not be told apart."""
Share = Annotated[float, Within(0.0, 1.0)]
NotNegative = Annotated[float, Within(0.0)]
Positive = Annotated[float, Within(1e-12, 1e12)]
LogSnr = Annotated[float, Within(-20.0, 20.0)]
"""Beyond these alpha or sigma is 1 to float32's precision, and the networks see no difference."""
Tolerance = Annotated[float, Within(1e-6, 1.0)]
"""Of solvers in float32, whose rounding smaller ones would chase."""


def later(default: Any) -> Any:
    """Make a field that a config did not always have; its default is what was done without it.

    Records of runs leave it out at its default, so that they, and their hashes, stay as they were.
    """
    return dataclasses.field(default=default, metadata={LATER: True})


def later_defaults(config_type: Any) -> dict[str, Any]:
    """Return the defaults of the fields that a config did not always have, by name."""
    fields = dataclasses.fields(config_type)
    return {field.name: field.default for field in fields if LATER in field.metadata}


def with_role(config_type: Any, role: Role) -> frozenset[str]:
    """Return the fields that have a role."""
    hints = _hints(config_type)
    return frozenset(f for f in hints if role in getattr(hints[f], "__metadata__", ()))


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config by field, lists for tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def without_later(config: Any) -> dict[str, Any]:
    """Return the values of a config by field, without later fields at their defaults."""
    later = later_defaults(config)
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in later or value != later[name]
    }


def option(field: str) -> str:
    """Return how the command line calls a field."""
    return f"--{field.replace('_', '-')}"


def check_counts(**counts: int | None) -> None:
    """Refuse options of a command, given by the names of its arguments, that are below 1.

    Raises:
        Refusal: naming the first.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise Refusal(f"{option(name)} must be at least 1; got {count}.")


def judge(config: Any) -> None:
    """Refuse a config, a dataclass, with a value that its fields do not take.

    Raises:
        Refusal: naming the option, what it takes and what was got.
    """
    kind: Any = type(config)
    for field, hint in _hints(kind).items():
        _judge(option(field), hint, getattr(config, field), None)


@functools.cache
def _hints(config_type: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(config_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


def _judge(name: str, hint: Any, value: Any, bounds: Within | None) -> None:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        given = [each for each in hint.__metadata__ if isinstance(each, Within)]
        _judge(name, args[0], value, given[0] if given else bounds)
    elif origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return
        _judge(name, next(arg for arg in args if arg is not type(None)), value, bounds)
    elif origin is Literal:
        if not any(type(value) is type(arg) and value == arg for arg in args):
            raise Refusal(f"{name} must be one of {', '.join(map(str, args))}; got {value!r}.")
    elif origin is tuple:
        if not isinstance(value, tuple | list):
            raise Refusal(f"{name} must be a list; got {value!r}.")
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise Refusal(f"{name} must hold {len(kinds)} values; got {value!r}.")
        for kind, each in zip(kinds, value, strict=True):
            _judge(name, kind, each, bounds)
    else:
        _judge_plain(name, hint, value, bounds)


def _judge_plain(name: str, kind: Any, value: Any, bounds: Within | None) -> None:
    takes: tuple[Any, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, takes) or (isinstance(value, bool) and kind is not bool):
        said = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise Refusal(f"{name} must be {said.get(kind, kind.__name__)}; got {value!r}.")
    if kind in (int, float):
        bounds = Within(-math.inf) if bounds is None else bounds
        if not bounds.holds(value):
            limits = "finite" if math.isinf(bounds.low) else bounds
            raise Refusal(f"{name} must be {limits}; got {value}.")


@contextlib.contextmanager
def naming(fields: Any, **others: str) -> Iterator[None]:
    """Turn what the library refuses of a config's values into refusals that name the option.

    The library's sentence begins with the name of its own argument; the option's goes before it.

    Args:
        fields: a dataclass whose fields are options, or names of them.
        others: by an argument's name, the option that it comes from.

    Raises:
        Refusal: in place of a ValueError, and of a TypeError whose argument is known.
    """
    names = _hints(fields) if isinstance(fields, type) else fields
    known: Mapping[str, str] = {name: option(name) for name in names} | others
    try:
        yield
    except (TypeError, ValueError) as error:
        found = next((known[n] for n in re.findall(r"`(\w+)", str(error)) if n in known), None)
        if found is None and isinstance(error, TypeError):
            raise
        raise Refusal(f"{found}: {error}" if found else str(error)) from error
