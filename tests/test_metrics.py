import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from jaxdiff import metrics
from jaxdiff.metrics.mmd import HEURISTIC_ROWS

KEY = jax.random.key(0)


def _normal(seed, num_rows, num_dims):
    return np.random.default_rng(seed).normal(size=(num_rows, num_dims))


# --- Maximum mean discrepancy ---------------------------------------------------------------


def _gaussian_mmd(shift, scale, bandwidth):
    """MMD^2 of N(0, I) and N(shift, scale^2 I): kernel and densities are all Gaussian."""
    dims = len(shift)

    def mean_kernel(variance, gap):
        total = bandwidth**2 + variance
        return (bandwidth**2 / total) ** (dims / 2) * np.exp(-(gap @ gap) / (2 * total))

    same, other = mean_kernel(2.0, 0 * shift), mean_kernel(2 * scale**2, 0 * shift)
    return same + other - 2 * mean_kernel(1 + scale**2, shift)


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (0.3, 1.5), (0.0, 1.0)])
def test_mmd_of_gaussians_has_the_closed_form_as_its_mean(shift, scale):
    """With equal laws the truth is 0, which only an estimate that may be negative can average."""
    shift = np.array([shift, 0.0, -shift])
    values = [
        metrics.mmd(_normal(2 * i, 60, 3), scale * _normal(2 * i + 1, 80, 3) + shift, bandwidth=1.3)
        for i in range(200)
    ]
    stderr = np.std(values) / np.sqrt(len(values))
    truth = _gaussian_mmd(shift, scale, 1.3)
    print("mean", np.mean(values), "truth", truth, "standard error", stderr)
    assert abs(np.mean(values) - truth) < 4 * stderr
    assert np.min(values) < 0 or truth > 0


@pytest.mark.parametrize("block", [1, 7, 10, 1000])
def test_mmd_does_not_depend_on_the_block(block):
    x, y = _normal(0, 20, 3), _normal(1, 31, 3) + 1e4
    x += 1e4 - 0.5  # far from 0, where expanded squares would cancel
    kernel_x, kernel_y, across = (
        np.exp(-cdist(a, b, "sqeuclidean") / (2 * 0.9**2)) for a, b in ((x, x), (y, y), (x, y))
    )
    within = (kernel_x.sum() - 20) / (20 * 19) + (kernel_y.sum() - 31) / (31 * 30)
    value = metrics.mmd(x, y, bandwidth=0.9, block=block)
    np.testing.assert_allclose(value, within - 2 * across.mean(), rtol=1e-11)


def test_mmd_takes_the_median_distance_of_both_sets():
    x, y = _normal(0, 40, 2), _normal(1, 30, 2) + 1.0
    both = np.concatenate([x, y])
    median = np.median(cdist(both, both)[np.triu_indices(70, 1)])
    np.testing.assert_allclose(metrics.mmd(x, y), metrics.mmd(x, y, bandwidth=median), rtol=1e-13)


def test_the_median_is_of_evenly_spaced_rows():
    """Twice each row, side by side, in twice as many as are looked at: every other row is."""
    x, y = _normal(0, HEURISTIC_ROWS, 1), _normal(1, HEURISTIC_ROWS, 1) + 1.0
    both = np.concatenate([x, y])
    median = np.median(cdist(both, both)[np.triu_indices(2 * HEURISTIC_ROWS, 1)])
    x, y = np.repeat(x, 2, axis=0), np.repeat(y, 2, axis=0)
    np.testing.assert_allclose(metrics.mmd(x, y), metrics.mmd(x, y, bandwidth=median), rtol=1e-13)


# --- Sliced Wasserstein ---------------------------------------------------------------------


def test_sliced_wasserstein_of_a_shift_is_the_mean_square_of_its_projections():
    """A shift m costs (m . theta)^2 on a line, |m|^2 / D on average over directions."""
    x, shift = _normal(0, 50, 4), np.array([1.0, -2.0, 0.5, 0.0])
    num = 2003  # no whole number of chunks
    value = metrics.sliced_wasserstein(KEY, x, x + shift, num_projections=num) ** 2
    # (m . theta)^2 / |m|^2 has the law Beta(1 / 2, (D - 1) / 2)
    stderr = shift @ shift * stats.beta(0.5, 1.5).std() / np.sqrt(num)
    print("off by", (value - shift @ shift / 4) / stderr, "standard errors")
    assert abs(value - shift @ shift / 4) < 4 * stderr


def test_sliced_wasserstein_of_a_permutation_is_zero():
    x = _normal(0, 50, 4)
    # sums over D may be taken in another order
    assert metrics.sliced_wasserstein(KEY, x, x[::-1], num_projections=2003) < 1e-14


def test_sliced_wasserstein_on_a_line_is_scipys():
    x, y = _normal(0, 7, 1), 2 * _normal(1, 12, 1) + 0.3
    value = metrics.sliced_wasserstein(KEY, x, y, num_projections=3, p=1)
    truth = stats.wasserstein_distance(x[:, 0], y[:, 0])
    np.testing.assert_allclose(value, truth, rtol=1e-13)


@pytest.mark.parametrize("p", [2, 3.5])
def test_sliced_wasserstein_of_unequal_sizes_is_that_of_repeated_rows(p):
    """Rows that all occur three times have the quantile function of the rows."""
    x, y = _normal(0, 4, 3), _normal(1, 6, 3)
    value = metrics.sliced_wasserstein(KEY, x, y, p=p)
    repeated = np.repeat(x, 3, axis=0), np.repeat(y, 2, axis=0)
    np.testing.assert_allclose(value, metrics.sliced_wasserstein(KEY, *repeated, p=p), rtol=1e-13)


def test_sliced_wasserstein_of_two_widths_is_their_difference():
    """W_2 of N(0, 1) and N(0, 9) on a line is 2; quantiles cut the tails, by 2e-3 here."""
    quantiles = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)[:, None]
    value = metrics.sliced_wasserstein(KEY, quantiles, 3 * quantiles[::-1], num_projections=1)
    np.testing.assert_allclose(value, 2.0, atol=2e-3)


# --- Frechet --------------------------------------------------------------------------------


def _moments(mean, covariance, count=11):
    return metrics.Moments(count, np.asarray(mean), (count - 1) * np.asarray(covariance))


def _rotated(eigenvalues, seed=0):
    basis = np.linalg.qr(_normal(seed, len(eigenvalues), len(eigenvalues)))[0]
    return basis * eigenvalues @ basis.T


@pytest.mark.parametrize("last", [2.0, 0.0])
def test_frechet_of_commuting_covariances_is_the_distance_of_their_roots(last):
    """Also where one is singular: |m|^2 + sum (sqrt a - sqrt b)^2 over shared axes."""
    first, second = np.array([1.0, 4.0, last]), np.array([9.0, 0.0, 0.5])
    a, b = _moments(np.zeros(3), _rotated(first), 7), _moments([1.0, 2.0, 0.0], _rotated(second))
    truth = 5.0 + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    # a zero eigenvalue is known to 1e-16, its root to 1e-8
    np.testing.assert_allclose(metrics.frechet_of_moments(a, b), truth, atol=2e-7)
    np.testing.assert_allclose(metrics.frechet_of_moments(b, a), truth, atol=2e-7)


def test_frechet_of_planes_has_a_closed_form():
    """In 2-D tr (A B)^(1/2) = sqrt(tr A B + 2 sqrt(det A B)), whether or not they commute."""
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    overlap = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    value = metrics.frechet_of_moments(_moments([0.0, 0.0], a), _moments([0.3, 0.4], b))
    np.testing.assert_allclose(value, 0.25 + np.trace(a + b) - 2 * overlap, rtol=1e-12)


def test_frechet_of_lines_is_exact():
    """Covariances u u^T and v v^T overlap in |u . v|."""
    u, v = _normal(0, 2, 5)
    a, b = _moments(np.zeros(5), np.outer(u, u)), _moments(np.zeros(5), np.outer(v, v))
    truth = u @ u + v @ v - 2 * abs(u @ v)
    np.testing.assert_allclose(metrics.frechet_of_moments(a, b), truth, atol=2e-7)
    np.testing.assert_allclose(metrics.frechet_of_moments(a, a), 0.0, atol=2e-7)


def test_frechet_of_samples_nears_the_distance_of_the_laws():
    num, shift, scale = 20_000, np.array([0.5, 0.0, 0.0]), np.array([1.0, 2.0, 0.5])
    values = [
        metrics.frechet(_normal(2 * i, num, 3), scale * _normal(2 * i + 1, num, 3) + shift)
        for i in range(10)
    ]
    truth = 0.25 + ((scale - 1) ** 2).sum()
    stderr = np.std(values) / np.sqrt(10)
    print("mean off by", (np.mean(values) - truth) / stderr, "standard errors of", stderr)
    # the bias, of order D^2 / num, is below a standard error
    assert abs(np.mean(values) - truth) < 4 * stderr


def test_moments_are_numpys():
    x = (_normal(0, 10_000, 3) + 1000.0) * [1.0, 2.0, 3.0]  # three blocks, far from 0
    count, mean, scatter = metrics.moments(x)
    assert count == 10_000
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(scatter / (count - 1), np.cov(x, rowvar=False), atol=1e-10)


def test_merged_moments_are_those_of_the_whole():
    x = _normal(0, 100, 3) + [0.0, 5.0, -3.0]
    x[:30] += 10.0
    parts = [metrics.moments(part) for part in np.split(x, [1, 30, 31])]
    merged = metrics.merge(metrics.merge(parts[0], parts[1]), metrics.merge(parts[2], parts[3]))
    for part, whole in zip(merged, metrics.moments(x), strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-12, atol=1e-12)


# --- Precision and recall -------------------------------------------------------------------


def _brute_force(real, fake, k):
    def radii(rows):
        return np.sort(cdist(rows, rows), axis=1)[:, k]

    distances = cdist(fake, real)
    in_real, in_fake = distances <= radii(real)[None, :], distances <= radii(fake)[:, None]
    return (
        in_real.any(1).mean(),
        in_fake.any(0).mean(),
        in_real.sum() / (k * len(fake)),
        (in_real.any(0).mean()),
    )


@pytest.mark.parametrize(("num_real", "num_fake"), [(40, 30), (2049, 40), (40, 2500)])
@pytest.mark.parametrize("num_dims", [2, 20])
def test_precision_recall_is_the_brute_force_one(num_real, num_fake, num_dims):
    real, fake = _normal(0, num_real, num_dims), 1.3 * _normal(1, num_fake, num_dims) + 0.4
    np.testing.assert_allclose(
        metrics.precision_recall(real, fake, k=3), _brute_force(real, fake, 3), rtol=1e-13
    )


def test_precision_recall_by_hand():
    """Real balls: 0 +- 1, 1 +- 1, 3 +- 2, 10 +- 7; fake ones: 2 +- 3, 5 +- 3, 30 +- 25."""
    real, fake = np.array([[0.0], [1.0], [3.0], [10.0]]), np.array([[2.0], [5.0], [30.0]])
    precision, recall, density, coverage = metrics.precision_recall(real, fake, k=1)
    assert precision == pytest.approx(2 / 3)  # 2 lies in the balls of 1 and 3, 5 in those of 3, 10
    assert recall == 1.0  # 0, 1, 3 lie within 3 of 2, and 10 within 25 of 30
    assert density == pytest.approx(4 / 3)
    assert coverage == pytest.approx(3 / 4)


def test_a_dropped_mode_costs_recall_and_coverage_alone():
    mode, other = _normal(0, 300, 2), _normal(1, 300, 2) + 100.0
    result = metrics.precision_recall(np.concatenate([mode, other]), mode)
    assert result.precision == 1.0
    assert result.recall == 0.5
    assert result.coverage == 0.5


def test_an_invented_mode_costs_precision_and_density_alone():
    mode, other = _normal(0, 300, 2), _normal(1, 300, 2) + 100.0
    result = metrics.precision_recall(mode, np.concatenate([mode, other]))
    alone = metrics.precision_recall(mode, mode)
    assert result.precision == 0.5
    assert result.density == pytest.approx(alone.density / 2)
    assert result.recall == 1.0
    assert result.coverage == 1.0


def test_density_and_coverage_of_the_same_law_have_their_expectations():
    """Of the N - 1 + M others the k nearest to a real sample are any: all real, it is uncovered."""
    num_real, num_fake, k = 300, 400, 4
    results = [
        metrics.precision_recall(_normal(2 * i, num_real, 3), _normal(2 * i + 1, num_fake, 3), k=k)
        for i in range(100)
    ]
    drawn = np.arange(k)
    uncovered = np.prod((num_real - 1 - drawn) / (num_real - 1 + num_fake - drawn))
    for name, truth in (("density", 1.0), ("coverage", 1.0 - uncovered)):
        values = [getattr(result, name) for result in results]
        stderr = np.std(values) / np.sqrt(len(values))
        print(name, "off by", (np.mean(values) - truth) / stderr, "standard errors of", stderr)
        assert abs(np.mean(values) - truth) < 4 * stderr


def test_copies_lie_inside_balls_of_no_radius():
    real = np.repeat(_normal(0, 20, 30), 4, axis=0) + 1e4
    assert metrics.precision_recall(real, real[::3], k=1)[:2] == (1.0, 1.0)


# --- Classifier two-sample test -------------------------------------------------------------


def test_c2st_of_the_same_law_is_a_half():
    accuracy, stderr = metrics.c2st(_normal(0, 1000, 2), _normal(1, 1000, 2))
    print("off by", (accuracy - 0.5) / stderr, "standard errors of", stderr)
    assert stderr == pytest.approx(0.5 / np.sqrt(2000), rel=1e-2)
    assert abs(accuracy - 0.5) < 4 * stderr


def test_c2st_of_shifted_gaussians_nears_the_bayes_classifier():
    shift = np.array([1.0, 1.0])
    accuracy, stderr = metrics.c2st(_normal(0, 1500, 2), _normal(1, 1500, 2) + shift)
    bayes = stats.norm.cdf(np.linalg.norm(shift) / 2)
    print("accuracy", accuracy, "Bayes", bayes, "standard error", stderr)
    assert bayes - 4 * stderr - 0.01 < accuracy < bayes + 4 * stderr


def test_c2st_sees_what_is_not_linear():
    """N(0, I) and N(0, 9 I) in 2-D: a circle parts them best."""
    accuracy, stderr = metrics.c2st(_normal(0, 1500, 2), 3.0 * _normal(1, 1500, 2))
    square = 2 * np.log(9) / (1 - 1 / 9)  # where the densities are equal
    bayes = 0.5 * (stats.chi2(2).cdf(square) + stats.chi2(2).sf(square / 9))
    print("accuracy", accuracy, "Bayes", bayes, "standard error", stderr)
    assert bayes - 4 * stderr - 0.01 < accuracy < bayes + 4 * stderr


def test_c2st_cuts_long_training_short_without_a_warning():
    """Black and white squares of a 4 x 4 board, which it would go on learning for long."""
    points = np.random.default_rng(0).uniform(size=(4000, 2))
    black = np.floor(4 * points).sum(1) % 2 == 0
    accuracy, stderr = metrics.c2st(points[black], points[~black], num_folds=2)
    assert accuracy > 0.5 + 10 * stderr


def test_c2st_balances_sets_of_unequal_size():
    accuracy, stderr = metrics.c2st(_normal(0, 200, 2), _normal(1, 2000, 2))
    assert stderr == pytest.approx(0.5 / np.sqrt(400), rel=5e-2)
    assert abs(accuracy - 0.5) < 4 * stderr


def test_c2st_is_repeated_by_its_seed_and_runs_on_the_fewest_rows():
    x, y = _normal(0, 20, 2), _normal(1, 20, 2) + 5.0
    assert metrics.c2st(x, y, seed=3) == metrics.c2st(x, y, seed=3)
    assert metrics.c2st(x, y, num_folds=20).accuracy <= 1.0


# --- What all of them take and refuse -------------------------------------------------------

METRICS = {
    "mmd": metrics.mmd,
    "sliced_wasserstein": lambda x, y: metrics.sliced_wasserstein(KEY, x, y),
    "frechet": metrics.frechet,
    "precision_recall": metrics.precision_recall,
    "c2st": lambda x, y: metrics.c2st(x, y, num_folds=2),
}


@pytest.mark.parametrize("name", METRICS)
def test_samples_of_any_shape_and_kind_are_rows(name):
    x, y = _normal(0, 24, 6).astype(np.float16), _normal(1, 24, 6).astype(np.float16)
    images = jnp.asarray(x.reshape(24, 2, 3)), y.reshape(24, 2, 3)
    expected = METRICS[name](x.astype(np.float32), y.astype(np.float32))
    np.testing.assert_array_equal(METRICS[name](*images), expected)
    whole = METRICS[name](*(np.round(10 * rows).astype(int) for rows in (x, y)))
    np.testing.assert_array_equal(whole, METRICS[name](*(np.round(10.0 * r) for r in (x, y))))


GOOD = _normal(0, 30, 2)
HOLED = GOOD.copy()
HOLED[3, 1] = np.nan


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (GOOD[:, 0], GOOD, r"`(x|real)` must have shape .*got \(30,\).*x\[:, None\]"),
        (GOOD, GOOD[:, :0], r"`(y|fake)` must have shape .*got \(30, 0\)"),
        (GOOD, GOOD[:, :1], r"same shape of a sample; got \(2,\) and \(1,\)"),
        (GOOD, GOOD[:0], r"`(y|fake)` must hold at least \d+ rows; got 0"),
        (HOLED, GOOD, r"`(x|real)` must be finite; 1 of 30 rows are not, .* row 3"),
        (GOOD, 1j * GOOD, r"`(y|fake)` must hold real numbers; got complex128"),
    ],
)
def test_what_are_no_two_sets_of_samples_is_refused(name, x, y, match):
    with pytest.raises(ValueError, match=match):
        METRICS[name](x, y)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: metrics.mmd(GOOD[:1], GOOD), "`x` must hold at least 2 rows; got 1"),
        (lambda: metrics.mmd(GOOD, GOOD, bandwidth=0.0), "`bandwidth` must be positive"),
        (lambda: metrics.mmd(GOOD, GOOD, bandwidth=np.inf), "`bandwidth` must be positive"),
        (lambda: metrics.mmd(0 * GOOD, 0 * GOOD), "`bandwidth` has no default here"),
        (lambda: metrics.mmd(GOOD, GOOD, block=0), "`block` must be .* at least 1; got 0"),
        (
            lambda: metrics.sliced_wasserstein(KEY, GOOD, GOOD, num_projections=0),
            "`num_projections` must be .* at least 1; got 0",
        ),
        (lambda: metrics.sliced_wasserstein(KEY, GOOD, GOOD, p=0.5), "`p` must be .* got 0.5"),
        (lambda: metrics.sliced_wasserstein(KEY, GOOD, GOOD, p=np.inf), "`p` must be .* got inf"),
        (lambda: metrics.frechet(GOOD, GOOD[:1]), "`y` must hold at least 2 rows; got 1"),
        (lambda: metrics.moments(GOOD[0]), r"`x` must have shape"),
        (
            lambda: metrics.merge(metrics.moments(GOOD), metrics.moments(GOOD[:, :1])),
            r"`a` and `b` must be .* \(2,\) and \(1,\)",
        ),
        (
            lambda: metrics.frechet_of_moments(metrics.moments(GOOD), metrics.moments(GOOD[:1])),
            "`b` must be of at least 2 rows; got 1",
        ),
        (
            lambda: metrics.frechet_of_moments(metrics.moments(GOOD), metrics.moments(GOOD[:, :1])),
            "`a` and `b` must be of as many dimensions",
        ),
        (lambda: metrics.precision_recall(GOOD, GOOD, k=0), "`k` must be .* 1 to 29; got 0"),
        (lambda: metrics.precision_recall(GOOD, GOOD[:4], k=4), "`k` must be .* 1 to 3; got 4"),
        (lambda: metrics.precision_recall(GOOD, GOOD, k=1.5), "`k` must be .* got 1.5"),
        (lambda: metrics.c2st(GOOD, GOOD[:19]), "`y` must hold at least 20 rows; got 19"),
        (lambda: metrics.c2st(GOOD, GOOD, num_folds=1), "`num_folds` must be .* 2 to 30; got 1"),
        (lambda: metrics.c2st(GOOD, GOOD, num_folds=31), "`num_folds` must be .* got 31"),
    ],
)
def test_options_out_of_range_are_refused(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call()


@pytest.mark.slow  # test_layers says it of all that `import jaxdiff` imports, these among it
def test_importing_the_metrics_imports_no_scikit_learn():
    code = "import sys, jaxdiff.metrics; print('sklearn' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
