"""What every metric takes: sets of samples as finite rows."""

import math
import sys

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxdiff import checks


def as_rows(value: ArrayLike, name: str, *, at_least: int = 1) -> np.ndarray:
    """Return a set of samples as floating-point rows.

    Args:
        value: samples, (N, ...), of real numbers.
        name: of the argument, for errors.
        at_least: rows needed.

    Returns:
        (N, D) with D the product of the other axes: float32 of half precision, float64 of
        integers, else the dtype that came.

    Raises:
        TypeError: if `value` is no array.
        ValueError: if `value` has no sample axis or no features, too few rows, or holds
            anything but finite real numbers.
    """
    try:
        array = np.asarray(value)
    except TypeError:
        raise TypeError(f"`{name}` must hold real numbers; got {checks.shown(value)}.") from None
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if not real:
        raise ValueError(f"`{name}` must hold real numbers; got {array.dtype}.")
    if array.ndim < 2 or 0 in array.shape[1:]:
        raise ValueError(
            f"`{name}` must have shape (N, D) or (N, ...); got {array.shape}. "
            "Samples of one number are rows of one column: x[:, None]."
        )
    if array.shape[0] < at_least:
        raise ValueError(f"`{name}` must hold at least {at_least} rows; got {array.shape[0]}.")
    dtype = jnp.promote_types(array.dtype, jnp.float32)
    if jnp.issubdtype(array.dtype, jnp.integer):
        dtype = np.dtype(np.float64)
    array = array.reshape(array.shape[0], math.prod(array.shape[1:])).astype(dtype, copy=False)
    finite = np.isfinite(array).all(1)
    if not finite.all():
        raise ValueError(
            f"`{name}` must be finite; {(~finite).sum()} of {len(finite)} rows are not, "
            f"the first being row {finite.argmin()}. Drop them, or mend the sampler."
        )
    return array


def as_pair(
    x: ArrayLike, y: ArrayLike, names: tuple[str, str] = ("x", "y"), *, at_least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return two sets of samples as rows of the same length, (N, D) and (M, D).

    Raises:
        ValueError: if either is refused by :func:`as_rows`, or their features differ.
    """
    first, second = as_rows(x, names[0], at_least=at_least), as_rows(y, names[1], at_least=at_least)
    if np.shape(x)[1:] != np.shape(y)[1:]:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must have the same shape of a sample; "
            f"got {np.shape(x)[1:]} and {np.shape(y)[1:]}. "
            "Reshape one where only the layout differs."
        )
    return first, second


def whole(value: int, name: str, low: int, high: int | None = None) -> int:
    """Return a whole number that lies in low..high.

    Raises:
        TypeError: if it is no whole number; floats are none.
        ValueError: if it does not.
    """
    number = checks.count(name, value, -sys.maxsize)
    if number < low or (high is not None and number > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{name}` must be a whole number {wanted}; got {number}.")
    return number
