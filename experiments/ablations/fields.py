"""What a field of a config takes, how its values are shown, and what a mistyped name may mean."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, cast

C = TypeVar("C")


def show(value: Any) -> str:
    """Return a value as tables and `--only` write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def near(name: str, known: Iterable[str], quote: str = "") -> str:
    """Return a sentence that names what a mistyped name may mean, or all that there is.

    Args:
        name: what was given.
        known: the names that there are.
        quote: what they are put between.
    """
    names = [str(each) for each in known]
    found = difflib.get_close_matches(name, names, n=1)
    told = ", ".join(f"{quote}{each}{quote}" for each in found or names)
    return f"nearest: {told}." if found else f"There are: {told}."


def as_json(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples are lists there."""
    return json.loads(json.dumps(value))


def replaced(config: C, values: Mapping[str, Any]) -> C:
    """Return a config, a dataclass, with other values of some fields."""
    return cast(C, dataclasses.replace(cast(Any, config), **values))


def defaults(config: type) -> Mapping[str, Any]:
    """Return the default of each field of a dataclass that has one, as JSON gives it back."""
    return {
        field.name: as_json(field.default)
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING
    }


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
            told = near(str(value), map(str, args), "'")
            raise ValueError(f"axis `{field}` has no value {value!r}; {told}")
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
