import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, PROCESSES
from scipy import stats

from jaxdiff import Mixture, predictions

POINTS = jax.random.normal(jax.random.key(0), (6, 2))


def test_log_prob_is_scipys():
    parts = [
        weight * stats.multivariate_normal(mean, cov).pdf(np.asarray(POINTS))
        for weight, mean, cov in zip(
            *(np.asarray(leaf) for leaf in jax.tree.leaves(MIXTURE)), strict=True
        )
    ]
    np.testing.assert_allclose(MIXTURE.log_prob(POINTS), np.log(sum(parts)), rtol=1e-11)


def test_score_is_the_gradient_of_log_prob():
    gradient = jax.vmap(jax.grad(MIXTURE.log_prob))(POINTS)
    np.testing.assert_allclose(MIXTURE.score(POINTS), gradient, rtol=1e-10)


def test_any_leading_axes_are_points():
    stacked = POINTS.reshape(2, 3, 2)
    np.testing.assert_allclose(MIXTURE.log_prob(stacked).ravel(), MIXTURE.log_prob(POINTS))
    assert MIXTURE.score(stacked).shape == (2, 3, 2)
    assert MIXTURE.log_prob(POINTS[0]).shape == ()


def test_samples_have_the_moments():
    x = MIXTURE.sample(jax.random.key(1), 100_000)
    mean = MIXTURE.weights @ MIXTURE.means
    second = jnp.einsum("k,kij->ij", MIXTURE.weights, MIXTURE.covariances) + jnp.einsum(
        "k,ki,kj->ij", MIXTURE.weights, MIXTURE.means, MIXTURE.means
    )
    stderr = x.std(0) / np.sqrt(100_000)
    print("mean off by", (x.mean(0) - mean) / stderr, "standard errors")
    assert (jnp.abs(x.mean(0) - mean) < 4 * stderr).all()
    products = x[:, :, None] * x[:, None, :]
    assert (jnp.abs(products.mean(0) - second) < 4 * products.std(0) / np.sqrt(100_000)).all()
    np.testing.assert_array_equal(MIXTURE.sample(jax.random.key(1), 3), x[:3])


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_diffused_mixture_is_the_law_of_perturbed_samples(name):
    """Its density integrates the forward Gaussian over the mixture, by quadrature in 1-D."""
    process = PROCESSES[name]
    mixture = Mixture([0.4, 0.6], [[-1.0], [0.8]], [[[0.05]], [[0.2]]])
    t = jnp.asarray(0.3 if name != "edm" else 0.7)
    x0 = np.linspace(-6, 6, 4001)
    x_t = np.array([-1.0, 0.0, 1.3])
    prior = np.exp(np.asarray(mixture.log_prob(x0[:, None])))
    mean, std = float(process.alpha(t)) * x0, float(process.sigma(t))
    joint = stats.norm.pdf(x_t[:, None], mean, std) * prior
    density = np.trapezoid(joint, x0, axis=1)
    diffused = mixture.diffuse(process, t).log_prob(x_t[:, None])
    np.testing.assert_allclose(jnp.exp(diffused), density, rtol=1e-9)
    posterior_mean = np.trapezoid(joint * x0, x0, axis=1) / density
    denoised = mixture.denoiser(process)(x_t[:, None], t)
    np.testing.assert_allclose(denoised[:, 0], posterior_mean, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", PROCESSES)
def test_denoiser_is_tweedies_formula(name):
    """alpha x0_hat = x_t + variance * score: score and denoiser are two closed forms."""
    process = PROCESSES[name]
    t = jnp.asarray(0.6 * process.t_max)
    score = MIXTURE.diffuse(process, t).score(POINTS)
    x0_hat = predictions.convert(process, "score", "x0", score, POINTS, t)
    denoise = MIXTURE.denoiser(process)
    np.testing.assert_allclose(denoise(POINTS, t), x0_hat, rtol=1e-7, atol=1e-9)
    rows = denoise(POINTS, jnp.full(6, t))
    np.testing.assert_allclose(rows, denoise(POINTS, t), rtol=1e-12)


def test_denoiser_returns_the_mean_without_signal_and_the_point_without_noise():
    denoise = MIXTURE.denoiser(PROCESSES["flow"])
    mean = jnp.broadcast_to(MIXTURE.weights @ MIXTURE.means, POINTS.shape)
    np.testing.assert_allclose(denoise(POINTS, 1.0), mean, rtol=1e-13)
    np.testing.assert_allclose(denoise(POINTS, 0.0), POINTS, rtol=1e-12)


def test_it_is_a_pytree_that_jit_grad_and_vmap_pass_through():
    gradient = jax.grad(lambda m: m.log_prob(POINTS).sum())(MIXTURE)
    assert isinstance(gradient, Mixture)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), MIXTURE)
    both = jax.jit(jax.vmap(lambda m: m.log_prob(POINTS)))(stacked)
    np.testing.assert_allclose(both[0], MIXTURE.log_prob(POINTS), rtol=1e-13)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        (([0.5, 0.6], np.zeros((2, 1)), np.ones((2, 1, 1))), "sum to 1"),
        (([1.5, -0.5], np.zeros((2, 1)), np.ones((2, 1, 1))), "non-negative"),
        (([0.5, 0.5], np.zeros((3, 1)), np.ones((2, 1, 1))), "`means`"),
        (([0.5, 0.5], np.zeros((2, 2)), np.ones((2, 1, 1))), "`covariances`"),
        (([[1.0]], np.zeros((1, 1)), np.ones((1, 1, 1))), "`weights`"),
        (([1.0], np.zeros((1, 2)), np.array([[[1.0, 0.5], [0.0, 1.0]]])), "symmetric"),
    ],
)
def test_arrays_that_are_no_mixture_are_refused(arrays, match):
    with pytest.raises(ValueError, match=match):
        Mixture(*arrays)


def test_points_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"`x` must have shape \(\.\.\., D\) with D=2"):
        MIXTURE.log_prob(jnp.zeros((4, 3)))
