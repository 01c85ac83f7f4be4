r"""Maximum mean discrepancy: how far apart a kernel's mean of two sets is.

With k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2)), for N rows x_i and M rows y_j,

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxdiff import checks
from jaxdiff.metrics.rows import as_pair, whole
from jaxdiff.typing import Array

HEURISTIC_ROWS = 500
"""Rows of each set, evenly spaced from the first on, whose distances the heuristic looks at."""


def mmd(x: ArrayLike, y: ArrayLike, *, bandwidth: float | None = None, block: int = 2048) -> float:
    """Estimate the squared maximum mean discrepancy without bias, with a Gaussian kernel.

    Being unbiased it is negative about half the time where both sets have the same law: that
    is noise, not an error, and clipping it at 0 would bring the bias back.

    Args:
        x: samples, (N, ...), N at least 2.
        y: samples, (M, ...), M at least 2.
        bandwidth: of the kernel, in the units of x. None takes the median distance between
            the rows of both sets together (Gretton et al. 2012, section 8), of at most
            :data:`HEURISTIC_ROWS` rows of each. Fix it to compare values with each other.
        block: rows of each set whose kernel matrix is held at a time; the result does not
            depend on it but by rounding.

    Returns:
        MMD^2, at most 2.

    Raises:
        ValueError: if the sets are not rows of the same length, are short of 2 rows or are not
            finite, `bandwidth` or `block` is not positive, or the median distance is 0.

    Source: Gretton et al. 2012, A Kernel Two-Sample Test, JMLR 13, eq. 3.
    """
    x, y = as_pair(x, y, at_least=2)
    block = min(whole(block, "block", 1), max(len(x), len(y)))
    if bandwidth is None:
        bandwidth = _median_distance(x, y)
    checks.number("bandwidth", bandwidth, 0.0, above=True)
    # squared distances are expanded below: about the centre, least is lost to rounding
    centre = np.concatenate([x, y]).mean(0, dtype=np.float64)
    x_blocks, y_blocks = _blocks(x - centre, block), _blocks(y - centre, block)
    within_x = _total_within(x_blocks, bandwidth) / (len(x) * (len(x) - 1))
    within_y = _total_within(y_blocks, bandwidth) / (len(y) * (len(y) - 1))
    across = sum(_total(a, b, False, bandwidth) for a in x_blocks for b in y_blocks)
    return within_x + within_y - 2.0 * across / (len(x) * len(y))


def _median_distance(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.spatial.distance import pdist

    chosen = [
        rows[np.linspace(0, len(rows), min(len(rows), HEURISTIC_ROWS), endpoint=False, dtype=int)]
        for rows in (x, y)
    ]
    median = float(np.median(pdist(np.concatenate(chosen))))
    if median == 0.0:
        raise ValueError("`bandwidth` has no default here: most rows are equal. Give it.")
    return median


_Block = tuple[Array, Array]
"""Rows (block, D), the last ones padded, and (block,) that is 1 for a row and 0 for padding."""


def _blocks(rows: np.ndarray, block: int) -> list[_Block]:
    padding = -len(rows) % block
    padded = jnp.asarray(np.pad(rows, ((0, padding), (0, 0))))
    present = jnp.asarray(np.arange(len(padded)) < len(rows), padded.dtype)
    starts = range(0, len(padded), block)
    return [(padded[i : i + block], present[i : i + block]) for i in starts]


def _total_within(blocks: list[_Block], bandwidth: float) -> float:
    """Sum the kernel over ordered pairs of different rows, by symmetry from half of them."""
    diagonal = sum(_total(a, a, True, bandwidth) for a in blocks)
    above = sum(_total(a, b, False, bandwidth) for i, a in enumerate(blocks) for b in blocks[:i])
    return diagonal + 2.0 * above


def _total(a: _Block, b: _Block, same: bool, bandwidth: float) -> float:
    sums = _row_sums(*a, *b, float(same), 0.5 / bandwidth**2)
    return float(np.asarray(sums, np.float64).sum())


@jax.jit
def _row_sums(a: Array, in_a: Array, b: Array, in_b: Array, same: Array, precision: Array) -> Array:
    products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    norms_a, norms_b = jnp.sum(a**2, axis=1), jnp.sum(b**2, axis=1)
    squares = jnp.maximum(norms_a[:, None] + norms_b[None, :] - 2.0 * products, 0.0)
    counted = in_b[None, :] * (1.0 - same * jnp.eye(len(a), dtype=a.dtype))
    return in_a * jnp.sum(counted * jnp.exp(-precision * squares), axis=1)
