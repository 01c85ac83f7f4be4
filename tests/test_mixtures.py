import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, PROCESSES, known
from scipy import stats

from jaxdiff import Mixture, predictions

POINTS = np.random.default_rng(0).normal(size=(6, 2))
WEIGHTS, MEANS, COVARIANCES = (np.asarray(leaf) for leaf in jax.tree.leaves(MIXTURE))


@jax.jit
def _density(mixture, x):
    return mixture.log_prob(x), mixture.score(x)


def test_log_prob_is_scipys():
    parts = [
        weight * stats.multivariate_normal(mean, covariance).pdf(POINTS)
        for weight, mean, covariance in zip(WEIGHTS, MEANS, COVARIANCES, strict=True)
    ]
    np.testing.assert_allclose(_density(MIXTURE, POINTS)[0], np.log(sum(parts)), rtol=1e-11)


def test_score_is_the_gradient_of_log_prob():
    gradient = jax.jit(jax.vmap(jax.grad(MIXTURE.log_prob)))(POINTS)
    np.testing.assert_allclose(_density(MIXTURE, POINTS)[1], gradient, rtol=1e-10)


def test_any_leading_axes_are_points():
    stacked_log_prob, stacked_score = _density(MIXTURE, POINTS.reshape(2, 3, 2))
    np.testing.assert_allclose(stacked_log_prob.ravel(), _density(MIXTURE, POINTS)[0])
    assert stacked_score.shape == (2, 3, 2)
    assert jax.eval_shape(MIXTURE.log_prob, POINTS[0]).shape == ()
    assert jax.eval_shape(MIXTURE.score, POINTS[0]).shape == (2,)


def test_samples_have_the_moments():
    draw = jax.jit(MIXTURE.sample, static_argnums=1)
    x = np.asarray(draw(jax.random.key(1), 100_000))
    mean = WEIGHTS @ MEANS
    second = np.einsum("k,kij->ij", WEIGHTS, COVARIANCES)
    second += np.einsum("k,ki,kj->ij", WEIGHTS, MEANS, MEANS)
    stderr = x.std(0) / np.sqrt(100_000)
    print("mean off by", (x.mean(0) - mean) / stderr, "standard errors")
    assert (np.abs(x.mean(0) - mean) < 4 * stderr).all()
    products = x[:, :, None] * x[:, None, :]
    assert (np.abs(products.mean(0) - second) < 4 * products.std(0) / np.sqrt(100_000)).all()
    np.testing.assert_array_equal(draw(jax.random.key(1), 3), x[:3])


@jax.jit
def _diffused(mixture, process, x_t, t):
    diffused = mixture.diffuse(process, t).log_prob(x_t)
    return jnp.exp(diffused), mixture.denoiser(process)(x_t, t), process.alpha(t), process.sigma(t)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_diffused_mixture_is_the_law_of_perturbed_samples(name):
    """Its density integrates the forward Gaussian over the mixture, by quadrature in 1-D."""
    mixture = Mixture([0.4, 0.6], [[-1.0], [0.8]], [[[0.05]], [[0.2]]])
    t = 0.3 if name != "edm" else 0.7
    x0 = np.linspace(-6, 6, 4001)
    x_t = np.array([-1.0, 0.0, 1.3])
    diffused, denoised, alpha, sigma = jax.device_get(
        _diffused(mixture, known(name, t), x_t[:, None], t)
    )
    parts = [0.4 * stats.norm.pdf(x0, -1.0, 0.05**0.5), 0.6 * stats.norm.pdf(x0, 0.8, 0.2**0.5)]
    joint = stats.norm.pdf(x_t[:, None], alpha * x0, sigma) * sum(parts)
    density = np.trapezoid(joint, x0, axis=1)
    np.testing.assert_allclose(diffused, density, rtol=1e-9)
    posterior_mean = np.trapezoid(joint * x0, x0, axis=1) / density
    np.testing.assert_allclose(denoised[:, 0], posterior_mean, rtol=1e-8, atol=1e-10)


@jax.jit
def _tweedie(process, t):
    denoise = MIXTURE.denoiser(process)
    score = MIXTURE.diffuse(process, t).score(POINTS)
    x0_hat = predictions.convert(process, "score", "x0", score, POINTS, t)
    return x0_hat, denoise(POINTS, t), denoise(POINTS, jnp.full(6, t))


@pytest.mark.parametrize("name", PROCESSES)
def test_denoiser_is_tweedies_formula(name):
    """alpha x0_hat = x_t + variance * score: score and denoiser are two closed forms."""
    t = 0.6 * PROCESSES[name].t_max
    x0_hat, denoised, rows = _tweedie(known(name, t), t)
    np.testing.assert_allclose(denoised, x0_hat, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(rows, denoised, rtol=1e-12)


def test_denoiser_returns_the_mean_without_signal_and_the_point_without_noise():
    denoise = jax.jit(MIXTURE.denoiser(PROCESSES["flow"]))
    mean = np.broadcast_to(WEIGHTS @ MEANS, POINTS.shape)
    np.testing.assert_allclose(denoise(POINTS, 1.0), mean, rtol=1e-13)
    np.testing.assert_allclose(denoise(POINTS, 0.0), POINTS, rtol=1e-12)


def test_it_is_a_pytree_that_jit_grad_and_vmap_pass_through():
    gradient = jax.jit(jax.grad(lambda m: m.log_prob(POINTS).sum()))(MIXTURE)
    assert isinstance(gradient, Mixture)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), MIXTURE)
    both = jax.jit(jax.vmap(lambda m: m.log_prob(POINTS)))(stacked)
    np.testing.assert_allclose(both[0], _density(MIXTURE, POINTS)[0], rtol=1e-13)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        (([0.5, 0.6], np.zeros((2, 1)), np.ones((2, 1, 1))), "sum to 1"),
        (([1.5, -0.5], np.zeros((2, 1)), np.ones((2, 1, 1))), "non-negative"),
        (([0.5, 0.5], np.zeros((3, 1)), np.ones((2, 1, 1))), "`means`"),
        (([0.5, 0.5], np.zeros((2, 2)), np.ones((2, 1, 1))), "`covariances`"),
        (([[1.0]], np.zeros((1, 1)), np.ones((1, 1, 1))), "`weights`"),
        (([1.0], np.zeros((1, 2)), np.array([[[1.0, 0.5], [0.0, 1.0]]])), "symmetric"),
        (([1.0], np.full((1, 1), np.nan), np.ones((1, 1, 1))), "`means` must be finite"),
        (([1.0], np.zeros((1, 1)), -np.ones((1, 1, 1))), "negative eigenvalue; got -1"),
        (([1.0], np.zeros((1, 1)), np.full((1, 1, 1), np.nan)), "`covariances` must be finite"),
    ],
)
def test_arrays_that_are_no_mixture_are_refused(arrays, match):
    with pytest.raises(ValueError, match=match):
        Mixture(*arrays)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: MIXTURE.sample(jax.random.key(0), 2.7), "`n` must be a whole number"),
        (lambda: MIXTURE.sample(3, jax.random.key(0)), "`n` must be a whole number"),
        (lambda: MIXTURE.sample(0, 3), "`key` must be a typed key"),
        (lambda: MIXTURE.denoiser(0.5), "`process` must be a process"),
        (lambda: MIXTURE.diffuse(0.5, PROCESSES["vp"]), "`process` must be a process"),
    ],
)
def test_what_is_no_count_key_or_process_is_refused(call, match):
    with pytest.raises(TypeError, match=match):
        call()


def test_points_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"`x` must have shape \(\.\.\., D\) with D=2"):
        MIXTURE.log_prob(jnp.zeros((4, 3)))
