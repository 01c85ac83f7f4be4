import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, NO_SIGNAL_AT_END, PROCESSES, chosen
from jax.scipy.stats import norm

from jaxdiff import Mixture, denoisers, likelihood

X = np.random.default_rng(2).normal(size=(4, 2)) * np.array([1.0, 0.5])


@jax.jit
def _run(process, mixture, x, tolerance):
    """The likelihood of a mixture's exact denoiser, and the closed forms at both ends."""
    log_prob, x_T = likelihood.log_prob(
        process, mixture.denoiser(process), x, rtol=tolerance, atol=tolerance
    )
    prior = norm.logpdf(x_T, 0.0, process.sigma(process.t_max)).sum(1)
    at_start = mixture.diffuse(process, likelihood.default_t_min(process)).log_prob(x)
    at_end = mixture.diffuse(process, process.t_max).log_prob(x_T)
    return log_prob, x_T, prior, at_start, at_end


@functools.cache
def exact_case(name):
    return jax.device_get(_run(chosen(name), MIXTURE, X, 1e-8))


@pytest.mark.parametrize("name", PROCESSES)
def test_log_prob_of_the_exact_denoiser_is_the_closed_form(name):
    log_prob, _, prior, at_start, at_end = exact_case(name)
    mismatch = np.abs(at_end - prior).max()
    error = np.abs(log_prob - prior + at_end - at_start).max()
    print(f"error {error:.1e} nats; prior mismatch {mismatch:.4f} nats")
    assert error < 1e-5
    assert mismatch < (1e-12 if name in NO_SIGNAL_AT_END else 0.1)


def test_rows_do_not_change_each_other():
    others = np.concatenate([X[:1], -3.0 * X[1:]])
    log_prob, x_T, *_ = _run(chosen("vp"), MIXTURE, others, 1e-8)
    np.testing.assert_allclose(log_prob[0], exact_case("vp")[0][0], rtol=1e-12)
    np.testing.assert_allclose(x_T[0], exact_case("vp")[1][0], rtol=1e-12)


def test_hutchinson_is_unbiased_and_a_rows_own():
    process = PROCESSES["flow"]
    denoise = MIXTURE.denoiser(process)
    copies = np.broadcast_to(X[:1], (400, 2))
    estimate = jax.jit(
        lambda key, x: likelihood.log_prob(process, denoise, x, key=key, num_probes=1)[0]
    )
    values = np.asarray(estimate(jax.random.key(0), copies))
    exact = exact_case("flow")[0][0]
    z = float((values.mean() - exact) / (values.std() / np.sqrt(400)))
    print(f"{z:.2f} standard errors; standard deviation of one {float(values.std()):.3f} nats")
    assert values.std() > 1e-3
    assert abs(z) < 4
    np.testing.assert_allclose(estimate(jax.random.key(0), copies[:3]), values[:3], rtol=1e-12)


def test_it_integrates_to_one():
    """A density of a denoiser that is no mixture's: in one dimension, by quadrature."""
    process = PROCESSES["flow"]
    denoise = denoisers.from_network(lambda x, t: jnp.tanh(2 * x) * (1 - t), process, "x0")
    x = np.linspace(-4, 4, 401)[:, None]
    log_prob, _ = jax.jit(lambda x: likelihood.log_prob(process, denoise, x, t_min=0.05))(x)
    np.testing.assert_allclose(np.trapezoid(np.exp(log_prob), x[:, 0]), 1.0, atol=1e-3)


def test_x_T_is_where_the_exact_flow_ends():
    component = np.array([0.5, 0.5]), 0.25 * np.eye(2)
    data = Mixture([0.3, 0.7], *(np.stack([part, part]) for part in component))  # one Gaussian
    _, x_T, *_ = _run(chosen("edm"), data, X, 1e-9)
    grow = np.sqrt((0.25 + 80.0**2) / (0.25 + 1e-6))
    np.testing.assert_allclose(x_T, 0.5 + grow * (X - 0.5), rtol=1e-6)


def test_images_keep_their_shape():
    process = PROCESSES["vp"]

    def network(x, t):
        assert x.ndim == 4
        return 0.1 * x

    denoise = denoisers.from_network(network, process, "v")
    log_prob, x_T = jax.eval_shape(
        lambda x: likelihood.log_prob(process, denoise, x), jnp.ones((2, 3, 3, 1))
    )
    assert log_prob.shape == (2,)
    assert x_T.shape == (2, 3, 3, 1)


def test_bits_per_dim_of_a_uniform_density_is_the_bits_of_its_levels():
    width = 2 / 256
    log_prob = jnp.full(3, 10 * jnp.log(1 / 2.0))  # uniform on [-1, 1]^10
    np.testing.assert_allclose(likelihood.bits_per_dim(log_prob, 10, width), 8.0, rtol=1e-13)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_probes": 0, "key": jax.random.key(0)}, "`num_probes`"),
        ({"num_probes": 1}, "`key`"),
        ({"t_min": 1.0}, "`t_min`"),
        ({"t_min": -0.1}, "`t_min`"),
        ({"t_min": 0.0}, "`t_min` must be a time with noise"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    process = PROCESSES["vp"]
    with pytest.raises(ValueError, match=match):
        likelihood.log_prob(process, MIXTURE.denoiser(process), X, **options)


def test_bad_bins_are_refused():
    with pytest.raises(ValueError, match="`bin_width`"):
        likelihood.bits_per_dim(jnp.zeros(2), 4, 0.0)
    with pytest.raises(ValueError, match="`num_dims`"):
        likelihood.bits_per_dim(jnp.zeros(2), 0, 0.1)
    with pytest.raises(TypeError, match="`x`"):
        likelihood.log_prob(PROCESSES["vp"], jnp.multiply, jnp.zeros((2, 2), int))
