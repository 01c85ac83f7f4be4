r"""Frechet distance of the Gaussians with the moments of two sets, streamed.

    d^2 = |m_a - m_b|^2 + tr(A + B - 2 (A B)^{1/2}),

A and B being covariances. It sees two moments and no more.
"""

import functools
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jaxdiff.metrics.rows import as_pair, as_rows

BLOCK = 4096
"""Rows that are taken to float64 at a time."""


class Moments(NamedTuple):
    """What the distance needs of a set; in float64, of a size that does not grow with it.

    Attributes:
        count: rows seen.
        mean: (D,).
        scatter: (D, D), sum of (x - mean) (x - mean)^T: count - 1 times the covariance.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks of moments
    mean: np.ndarray
    scatter: np.ndarray


def moments(x: ArrayLike) -> Moments:
    """Return count, mean and scatter of samples.

    Args:
        x: samples, (N, ...), N at least 1.

    Raises:
        ValueError: if `x` is not rows of finite real numbers.
    """
    rows = as_rows(x, "x")
    parts = (_moments(rows[i : i + BLOCK]) for i in range(0, len(rows), BLOCK))
    return functools.reduce(merge, parts)


def _moments(rows: np.ndarray) -> Moments:
    rows = rows.astype(np.float64)
    mean = rows.mean(0)
    deviations = rows - mean
    return Moments(len(rows), mean, deviations.T @ deviations)


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of two sets together, of theirs.

    Args:
        a: of the one, in D dimensions.
        b: of the other, in as many.

    Raises:
        ValueError: if their dimensions differ.

    Source: Chan, Golub & LeVeque 1983, Algorithms for Computing the Sample Variance: the
    pairwise update, of scatter matrices.
    """
    _same_dimensions(a, b)
    count = a.count + b.count
    step = b.mean - a.mean
    mean = a.mean + step * (b.count / count)
    return Moments(
        count, mean, a.scatter + b.scatter + np.outer(step, step) * (a.count * b.count / count)
    )


def frechet(x: ArrayLike, y: ArrayLike) -> float:
    """Return the squared Frechet distance of Gaussians fitted to two sets of samples.

    Of raw data this is in the data's own units; of a network's features it is what that
    network's name goes with (FID of Inception-v3's). It is biased upwards, by less the more
    samples there are: compare values at equal sizes only.

    Args:
        x: samples, (N, ...), N at least 2.
        y: samples, (M, ...), M at least 2.

    Raises:
        ValueError: if the sets are not rows of the same length, are short of 2 rows or are not
            finite.

    Source: Dowson & Landau 1982, The Frechet Distance between Multivariate Normal
    Distributions; Heusel et al. 2017 (arXiv:1706.08500), eq. 6.
    """
    x, y = as_pair(x, y, at_least=2)
    return frechet_of_moments(moments(x), moments(y))


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """Return the squared Frechet distance of the Gaussians with given moments.

    Covariances are scatter / (count - 1) and may be singular, as they are of fewer rows than
    dimensions.

    Args:
        a: of at least 2 rows, in D dimensions.
        b: the same.

    Raises:
        ValueError: if their dimensions differ or a count is below 2.

    Source: as :func:`frechet`.
    """
    _same_dimensions(a, b)
    for name, part in (("a", a), ("b", b)):
        if part.count < 2:
            raise ValueError(f"`{name}` must be of at least 2 rows; got {part.count}.")
    first, second = (np.asarray(part.scatter) / (part.count - 1) for part in (a, b))
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), and that matrix is symmetric
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    overlaps = np.linalg.eigvalsh(root @ second @ root)
    overlap = np.sqrt(np.maximum(overlaps, 0.0)).sum()
    gap = ((np.asarray(a.mean) - np.asarray(b.mean)) ** 2).sum()
    return float(gap + np.trace(first) + np.trace(second) - 2.0 * overlap)


def _same_dimensions(a: Moments, b: Moments) -> None:
    if np.shape(a.mean) != np.shape(b.mean):
        raise ValueError(
            f"`a` and `b` must be of as many dimensions; got means of shape {np.shape(a.mean)} "
            f"and {np.shape(b.mean)}."
        )
