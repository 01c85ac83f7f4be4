"""Peak signal-to-noise ratio and structural similarity of pairs of pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import metrics

RNG = np.random.default_rng(0)
X = np.tanh(RNG.normal(size=(2, 14, 12, 3)))
Y = np.clip(X + np.asarray([0.1, 0.5])[:, None, None, None] * RNG.normal(size=X.shape), -1, 1)


def ssim_by_window(x, y, data_range):
    """As the paper has it: weighted mean, variance about it and covariance, window by window."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights = (weights / weights.sum())[:, :, None]
    c_1, c_2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mu_a, mu_b = ((weights * each).sum((0, 1)) for each in (a, b))
            var_a = (weights * (a - mu_a) ** 2).sum((0, 1))
            var_b = (weights * (b - mu_b) ** 2).sum((0, 1))
            cov = (weights * (a - mu_a) * (b - mu_b)).sum((0, 1))
            luminance = (2 * mu_a * mu_b + c_1) / (mu_a**2 + mu_b**2 + c_1)
            values.append(luminance * (2 * cov + c_2) / (var_a + var_b + c_2))
    return np.mean(values)


@pytest.mark.parametrize("data_range", [2.0, 255.0])
def test_ssim_is_that_of_the_paper(data_range):
    x, y = (each * data_range / 2 for each in (X, Y))
    wanted = [ssim_by_window(a, b, data_range) for a, b in zip(x, y, strict=True)]
    found = metrics.ssim(x, y, data_range=data_range)
    assert found.shape == (2,)
    assert found[0] > found[1]
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_psnr_is_that_of_the_squared_error():
    wanted = 10 * np.log10(4 / np.mean((X - Y) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(metrics.psnr(X, Y), wanted, rtol=1e-12)
    levels = np.asarray([[0, 10], [255, 255]], np.uint8)  # whose differences do not wrap around
    found = metrics.psnr(levels, levels[::-1], data_range=255)
    np.testing.assert_allclose(found, 10 * np.log10(255**2 / np.mean([255**2, 245**2])), rtol=1e-6)


def test_a_picture_is_like_itself_and_both_are_symmetric():
    np.testing.assert_allclose(metrics.ssim(X, X), 1.0, rtol=1e-12)
    assert np.isinf(metrics.psnr(X, X)).all()
    for metric in (metrics.ssim, metrics.psnr):
        np.testing.assert_allclose(metric(X, Y), metric(Y, X), rtol=1e-12)


def test_both_may_be_compiled_and_keep_float32():
    x, y = X.astype(np.float32), Y.astype(np.float32)
    for metric in (metrics.ssim, metrics.psnr):
        found = jax.jit(metric)(x, y)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, metric(X, Y), rtol=1e-4)


@pytest.mark.parametrize(
    ("x", "y", "options", "match"),
    [
        (X, Y[:1], {}, "`x` and `y` must have the same shape"),
        (X[:, :10], Y[:, :10], {}, "`x` must have shape .* at least 11"),
        (X[0], Y[0], {}, "`x` must have shape"),
        (X, Y, {"data_range": 0.0}, "`data_range` must be positive"),
    ],
)
def test_other_pictures_are_refused(x, y, options, match):
    with pytest.raises(ValueError, match=match):
        metrics.ssim(x, y, **options)
