r"""Integer levels k in 0..L-1 and the interval [-1, 1] that diffusion works in.

The interval is cut into L bins of width 2/L; level k owns [2k/L - 1, 2(k + 1)/L - 1). A density p
on the interval then gives the level the probability P(k) = integral of p over its bin, and with
uniform dequantisation x = 2 (k + u)/L - 1, u ~ U[0, 1),

    E_u[log p(x)] + log(2/L) <= log P(k)

per dimension (Jensen; Theis et al. 2016, arXiv:1511.01844, sec. 3.1), so bits per dimension of the
continuous model, with `bin_width`, bound those of the discrete one from above.

**Exactness.** u falls on the midpoints of a fine grid (2^13 cells in float32, 2^32 in float64),
because a full-precision u near 0 or 1 rounds over the edge of its bin; so
``to_levels(dequantize(key, k, L), L) == k`` always. E[u] = 1/2 exactly, and the variance is
smaller than 1/12 by a factor 1 - 2^-26.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import checks
from jaxdiff.numerics import row_keys
from jaxdiff.typing import Array, Key

MAX_LEVELS = 256
GRID_BITS = {"float32": 13, "float64": 32}


def bin_width(num_levels: int) -> float:
    """Return 2/L, the width of a level's bin: what `likelihood.bits_per_dim` asks for.

    Raises:
        ValueError: if `num_levels` is outside 2..256.
    """
    return 2.0 / _checked_levels(num_levels)


def centers(levels: Array, num_levels: int, *, dtype: Any = None) -> Array:
    """Map levels to the centres of their bins, x = (2k + 1)/L - 1.

    Args:
        levels: integers in 0..L-1, any shape.
        num_levels: L, 2..256.
        dtype: float32 or float64; by default JAX's default float.

    Returns:
        The shape of `levels`, within (-1, 1); NaN of a traced level outside 0..L-1.

    Raises:
        TypeError: if `levels` does not hold integers, or `dtype` is neither of the two.
        ValueError: if `num_levels` is outside 2..256, or a known level outside 0..L-1.
    """
    num_levels = _checked_levels(num_levels)
    dtype = _checked_dtype(dtype)
    levels = checks.whole_numbers("levels", levels, num_levels)
    return _or_nan(levels, (2 * levels.astype(dtype) + 1) / num_levels - 1, num_levels)


def dequantize(key: Key, levels: Array, num_levels: int, *, dtype: Any = None) -> Array:
    """Draw a point uniformly in the bin of each level, x = 2 (k + u)/L - 1.

    Row i depends on (key, i) only: see `numerics.row_keys`, which also takes (B,) row keys and
    numbers the rows globally inside a parallel update.

    Args:
        key: consumed; one key or (B,) row keys.
        levels: integers in 0..L-1, shape (B, ...).
        num_levels: L, 2..256.
        dtype: float32 or float64; by default JAX's default float.

    Returns:
        The shape of `levels`, within (-1, 1); NaN of a traced level outside 0..L-1.

    Raises:
        TypeError: if `levels` does not hold integers, `key` is not a typed key, or `dtype` is
            neither of the two.
        ValueError: if `num_levels` is outside 2..256, `levels` has no batch axis, or a known level
            is outside 0..L-1.

    Source: Theis et al. 2016 (arXiv:1511.01844), sec. 3.1; u is drawn on a grid, as above.
    """
    num_levels = _checked_levels(num_levels)
    dtype = _checked_dtype(dtype)
    levels = checks.whole_numbers("levels", levels, num_levels)
    if levels.ndim == 0:
        raise ValueError("`levels` must have shape (B, ...); got a single number.")
    bits = GRID_BITS[dtype.name]
    draw = jax.vmap(lambda row: jax.random.bits(row, levels.shape[1:], jnp.uint32))
    cells = draw(row_keys(key, levels.shape[0])) >> np.uint32(32 - bits)
    u = (cells.astype(dtype) + 0.5) * 2.0**-bits
    return _or_nan(levels, 2 * (levels.astype(dtype) + u) / num_levels - 1, num_levels)


def to_levels(x: Array, num_levels: int) -> Array:
    """Return the level whose bin holds each x: the inverse of `dequantize` and `centers`.

    Args:
        x: floats, any shape; outside [-1, 1] they go to the first or last level, NaN to level 0.
        num_levels: L, 2..256.

    Returns:
        uint8 levels in 0..L-1, the shape of `x`.

    Raises:
        TypeError: if `x` does not hold floats.
        ValueError: if `num_levels` is outside 2..256.
    """
    num_levels = _checked_levels(num_levels)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must hold floating-point numbers; got {x.dtype}.")
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    bins = jnp.clip(jnp.floor((x + 1) * (num_levels / 2)), 0, num_levels - 1)
    return jnp.where(jnp.isnan(bins), 0, bins).astype(jnp.uint8)


def _or_nan(levels: Array, x: Array, num_levels: int) -> Array:
    k = levels.astype(x.dtype)  # uint8 does not hold 256
    return jnp.where((k >= 0) & (k < num_levels), x, jnp.nan)


def _checked_levels(num_levels: int) -> int:
    value = checks.count("num_levels", num_levels, 0)
    if not 2 <= value <= MAX_LEVELS:
        raise ValueError(f"`num_levels` must be in 2..{MAX_LEVELS}; got {value}.")
    return value


def _checked_dtype(dtype: Any) -> np.dtype:
    resolved = np.dtype(jnp.result_type(float) if dtype is None else dtype)
    if resolved.name not in GRID_BITS:
        raise TypeError(f"`dtype` must be float32 or float64; got {resolved.name}.")
    # Without x64 JAX would turn float64 arrays into float32 ones, on whose grid u must then lie.
    return np.dtype(jax.dtypes.canonicalize_dtype(resolved))
