r"""Precision, recall, density and coverage: fidelity and diversity from nearest neighbours.

Around each sample of a set lies the ball that reaches to its k-th nearest neighbour in that
set; the union of its balls stands for the set's support. Balls are closed, their radii widened
by 1e-12 of the data's scale, so that rounding does not decide about points on their surface.
"""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jaxdiff.metrics.rows import as_pair, whole

BLOCK = 2048
"""Rows of each set whose distances are held at a time."""


class PrecisionRecall(NamedTuple):
    """Four shares of samples that lie where the other set does.

    Attributes:
        precision: of fake samples, those inside some real ball.
        recall: of real samples, those inside some fake ball.
        density: real balls that a fake sample lies in, a k-th of their mean number; 1 is
            expected of equal laws, and it may be more.
        coverage: of real balls, those that hold some fake sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: ArrayLike, fake: ArrayLike, *, k: int = 5) -> PrecisionRecall:
    """Compare the supports of real and fake samples by balls of nearest neighbours.

    All four grow or shrink with the sizes and k: compare values at equal ones only.

    Args:
        real: samples, (N, ...).
        fake: samples, (M, ...).
        k: neighbours, the sample itself not among them; from 1 to min(N, M) - 1.

    Raises:
        ValueError: if the sets are not rows of the same length, are short of 2 rows or are not
            finite, or `k` is out of range.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991) for precision and recall; Naeem et al.
    2020 (arXiv:2002.09797) for density and coverage.
    """
    real_rows, fake_rows = as_pair(real, fake, ("real", "fake"), at_least=2)
    k = whole(k, "k", 1, min(len(real_rows), len(fake_rows)) - 1)
    # squared distances are expanded below: about the centre, least is lost to rounding
    centre = real_rows.mean(0, dtype=np.float64)
    reals, fakes = _Balls.around(real_rows - centre, k), _Balls.around(fake_rows - centre, k)

    balls_around_fake = np.zeros(len(fake_rows), int)
    real_is_reached, ball_is_hit = np.zeros((2, len(real_rows)), bool)
    for i in range(0, len(fake_rows), BLOCK):
        rows = slice(i, i + BLOCK)
        for j in range(0, len(real_rows), BLOCK):
            columns = slice(j, j + BLOCK)
            squares = fakes.norms[rows, None] + reals.norms[None, columns]
            squares -= 2.0 * fakes.centres[rows] @ reals.centres[columns].T
            in_real_ball = squares <= reals.reaches[None, columns]
            balls_around_fake[rows] += in_real_ball.sum(1)
            ball_is_hit[columns] |= in_real_ball.any(0)
            real_is_reached[columns] |= (squares <= fakes.reaches[rows, None]).any(0)
    return PrecisionRecall(
        precision=float((balls_around_fake > 0).mean()),
        recall=float(real_is_reached.mean()),
        density=float(balls_around_fake.mean() / k),
        coverage=float(ball_is_hit.mean()),
    )


class _Balls(NamedTuple):
    """Centres (N, D), their squared norms (N,) and the squared radii (N,) of balls."""

    centres: np.ndarray
    norms: np.ndarray
    reaches: np.ndarray

    @classmethod
    def around(cls, rows: np.ndarray, k: int) -> "_Balls":
        """Return the balls of samples (N, D), each to its k-th neighbour."""
        from sklearn.neighbors import NearestNeighbors

        distances, _ = NearestNeighbors(n_neighbors=k).fit(rows).kneighbors()
        norms = np.einsum("nd,nd->n", rows, rows)
        return cls(rows, norms, distances[:, -1] ** 2 * (1.0 + 1e-12) + 1e-12 * norms)
