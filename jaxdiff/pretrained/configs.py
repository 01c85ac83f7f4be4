"""Configs of models: what they may say, and refusals by name of all else."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

__all__ = ["architecture", "judged", "num_blocks"]


def architecture(config: Mapping[str, Any], known: Sequence[str], part: str) -> str:
    """Return the class whose config of transformers it is, by default the first that is known.

    Args:
        config: of a model.
        known: the classes.
        part: what a model of another class may have within.

    Raises:
        ValueError: if it is another.
    """
    (name,) = config.get("architectures") or known[:1]
    if name not in known:
        raise ValueError(
            f"`architectures` of the config must be one of {', '.join(known)}; got "
            f"{name}. Take the {part} out of a whole model."
        )
    return str(name)


def num_blocks(keys: Iterable[str]) -> int:
    """Return how many blocks there are in a file that names them ``blocks.0``, ``blocks.1``, ..."""
    numbers = [re.match(r"blocks\.(\d+)\.", key) for key in keys]
    return 1 + max(int(match[1]) for match in numbers if match)


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
