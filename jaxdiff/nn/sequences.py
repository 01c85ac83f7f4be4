"""What sequences of tokens are given as: the tokens, and a mask that is true where there is one."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff import checks, numerics
from jaxdiff.typing import Array


def sequence_parts(value: Any, name: str, shape: str, num_rows: int) -> tuple[Any, Any]:
    """Return the tokens and the mask that a mapping or a named tuple holds, as they are.

    Args:
        value: what was given.
        name: what refusals call it.
        shape: of the tokens, as refusals say it.
        num_rows: B.

    Raises:
        TypeError: if it holds anything else.
    """
    parts = value._asdict() if hasattr(value, "_asdict") else value
    if not isinstance(parts, Mapping) or set(parts) != {"tokens", "mask"}:
        got = checks.shown(value) if not isinstance(parts, Mapping) else ", ".join(map(str, parts))
        raise TypeError(
            f"`{name}` must hold `tokens` {shape} and `mask` ({num_rows}, L), true "
            f"where there is a token, and nothing else; got {got}."
        )
    return parts["tokens"], parts["mask"]


def check_mask(given: Any, name: str, shape: tuple[int, ...]) -> Array:
    """Return the mask of a sequence as booleans (B, L).

    Args:
        given: the mask.
        name: what refusals call the sequence.
        shape: (B, L), of its tokens.

    Raises:
        TypeError: if it holds neither booleans nor integers.
        ValueError: if its shape is another, or a known integer is neither 0 nor 1.
    """
    mask = numerics.as_array(given, f"{name}.mask")
    if not any(jnp.issubdtype(mask.dtype, kind) for kind in (jnp.bool_, jnp.integer)):
        raise TypeError(
            f"`{name}.mask` must hold booleans, or 0 and 1: true where there is a token; "
            f"got {mask.dtype}."
        )
    if mask.shape != shape:
        raise ValueError(
            f"`{name}.mask` must have the shape of the tokens without their last axis, "
            f"{shape}; got {mask.shape}."
        )
    known = numerics.concrete(given)
    if known is not None and not np.isin(known, (0, 1)).all():
        raise ValueError(
            f"`{name}.mask` must hold booleans, or 0 and 1; got {known.min()}..{known.max()}."
        )
    return mask.astype(bool)
