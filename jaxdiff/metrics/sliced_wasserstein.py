r"""Sliced Wasserstein distance: optimal transport on lines, where it is sorting.

Projected on a direction theta, the cost between two sets is that between their quantile
functions, int_0^1 |F_x^{-1}(u) - F_y^{-1}(u)|^p du; the sliced distance is the p-th root of its
mean over directions uniform on the sphere.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxdiff import checks, numerics
from jaxdiff.metrics.rows import as_pair, whole
from jaxdiff.typing import Array, Key

CHUNK = 16
"""Directions whose projections are held and sorted at a time."""


def sliced_wasserstein(
    key: Key, x: ArrayLike, y: ArrayLike, *, num_projections: int = 128, p: float = 2
) -> float:
    """Estimate the sliced p-Wasserstein distance of two sets on random directions.

    Sets of different size are compared through their quantile functions, which are steps: they
    are integrated exactly over the union of their jumps, without interpolation.

    Args:
        key: consumed; direction i depends on (key, i) only.
        x: samples, (N, ...).
        y: samples, (M, ...).
        num_projections: directions.
        p: at least 1.

    Returns:
        The distance (not its p-th power), in the units of x. Over directions the p-th power is
        unbiased; that the sets are finite leaves a positive bias, so that it is not 0 for two
        sets of the same law.

    Raises:
        ValueError: if the sets are not rows of the same length or are not finite,
            `num_projections` is not positive, or `p` is not a finite number from 1 on.

    Source: Rabin et al. 2011, Wasserstein Barycenter and its Application to Texture Mixing;
    Bonneel et al. 2015, Sliced and Radon Wasserstein Barycenters of Measures.
    """
    x, y = as_pair(x, y)
    num_projections = whole(num_projections, "num_projections", 1)
    checks.number("p", p, 1.0)
    # about a common point, projections lose least to rounding
    centre = x.mean(0, dtype=np.float64)
    x, y = jnp.asarray(x - centre), jnp.asarray(y - centre)
    # drawn in float32 whatever the data are, so that they are the same directions
    normals = numerics.normal(key, jnp.zeros((num_projections, x.shape[1]), jnp.float32))
    normals = normals.astype(x.dtype)
    directions = normals / jnp.linalg.norm(normals, axis=1, keepdims=True)
    costs = _costs(directions, x, y, *_quantile_steps(len(x), len(y)), p)
    return float(np.asarray(costs, np.float64).mean() ** (1.0 / p))


def _quantile_steps(num_x: int, num_y: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split (0, 1) where either quantile function jumps: ranks in x and in y, and lengths."""
    # in units of 1 / (num_x num_y) the jumps are whole numbers, so none is missed or doubled
    ends = np.union1d(np.arange(1, num_x + 1) * num_y, np.arange(1, num_y + 1) * num_x)
    starts = np.concatenate([[0], ends[:-1]])
    return starts // num_y, starts // num_x, (ends - starts) / (num_x * num_y)


@jax.jit
def _costs(
    directions: Array, x: Array, y: Array, rank_x: Array, rank_y: Array, length: Array, p: Array
) -> Array:
    def cost(direction: Array) -> Array:
        along_x, along_y = (
            jnp.sort(jnp.matmul(rows, direction, precision=jax.lax.Precision.HIGHEST))
            for rows in (x, y)
        )
        gaps = jnp.abs(along_x[rank_x] - along_y[rank_y])
        return jnp.sum(length.astype(x.dtype) * gaps**p)

    return jax.lax.map(cost, directions, batch_size=CHUNK)
