"""Configs of models: what they may say, and refusals by name of all else."""

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["judged"]


def judged(
    kind: str,
    config: Mapping[str, Any],
    only: Mapping[str, Collection[Any]],
    read: Collection[str],
) -> dict[str, Any]:
    """Return the options of a config, all of which are supported.

    Args:
        kind: the class whose config it is.
        config: of a model; names that begin with an underscore are the library's own.
        only: what an option may be, or each value of a list, where it is not anything.
        read: the options beside those that are read, or make no difference.

    Raises:
        ValueError: if an option is something else, or is not known and says something.
    """
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    for name, value in options.items():
        allowed = only.get(name)
        if allowed is None and name not in read and value not in (None, False):
            raise ValueError(f"`{name}` of the config is not known; got {value!r}.")
        values = value if isinstance(value, list | tuple) else [value]
        if allowed is not None and any(each not in allowed for each in values):
            wanted = " or ".join(map(repr, allowed))
            raise ValueError(
                f"`{name}` of the config must be {wanted}; got {value!r}. "
                f"No other {kind} is supported."
            )
    return options
