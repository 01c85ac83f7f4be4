import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, NO_SIGNAL_AT_END, PROCESSES, chosen, few
from jax.scipy.stats import norm

from jaxdiff import (
    Mixture,
    denoisers,
    guidance,
    likelihood,
    numerics,
    probability_flow,
    processes,
    sample,
    samplers,
)

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


KEPT = ("vp", "ve", "cosine", "edm", "flow", "ddpm")
"""One process of each family, in one program."""


@functools.cache
def exact_case(name):
    names = KEPT if name in KEPT else tuple(PROCESSES)
    return jax.device_get(_run(chosen(name, names), MIXTURE, X, 1e-8))


@pytest.mark.parametrize("name", few(PROCESSES, KEPT))
def test_log_prob_of_the_exact_denoiser_is_the_closed_form(name):
    log_prob, _, prior, at_start, at_end = exact_case(name)
    mismatch = np.abs(at_end - prior).max()
    error = np.abs(log_prob - prior + at_end - at_start).max()
    print(f"error {error:.1e} nats; prior mismatch {mismatch:.4f} nats")
    assert error < 1e-5
    assert mismatch < (1e-12 if name in NO_SIGNAL_AT_END else 0.1)


def test_rows_do_not_change_each_other():
    others = np.concatenate([X[:1], -3.0 * X[1:]])
    log_prob, x_T, *_ = _run(chosen("vp", KEPT), MIXTURE, others, 1e-8)
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
    others = np.concatenate([copies[:3], -3.0 * copies[3:]])
    np.testing.assert_allclose(estimate(jax.random.key(0), others)[:3], values[:3], rtol=1e-12)


@pytest.mark.slow
def test_probes_of_a_row_are_its_own_in_any_batch():
    estimate = jax.jit(
        lambda key, x: likelihood.log_prob(
            PROCESSES["flow"], MIXTURE.denoiser(PROCESSES["flow"]), x, key=key, num_probes=1
        )[0]
    )
    large, small = (estimate(jax.random.key(0), x) for x in (X, X[:3]))
    np.testing.assert_allclose(small, large[:3], rtol=1e-12)


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
    _, x_T, *_ = _run(chosen("edm", KEPT), data, X, 1e-9)
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


WEIGHTS = np.random.default_rng(0).normal(size=(2, 2)) / 2


def network(x, c_noise):
    """Rows by a small smooth function; the second argument is not used."""
    return jnp.tanh(x @ jnp.asarray(WEIGHTS, x.dtype))


KINDS = {
    "v": lambda p: denoisers.from_network(network, p, "v"),
    "velocity": lambda p: denoisers.from_network(network, p, "velocity"),
    "eps": lambda p: denoisers.from_network(network, p, "eps"),
    "edm_preconditioned": lambda p: denoisers.edm_preconditioned(network, p),
    "guided": lambda p: guidance.interval(
        p,
        guidance.classifier_free(KINDS["v"](p), KINDS["eps"](p), 2.0),
        KINDS["velocity"](p),
        0.0,
        0.1,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_at_small_noise_are_as_precise_as_the_network(kind):
    """By x0_hat, the difference of nearly equal numbers, three digits fewer would be left."""

    @jax.jit
    def slope_and_divergence(process, theta, y):
        field = probability_flow.vector_field(process, KINDS[kind](process))
        return numerics.divergence(lambda row: field(theta, row[None])[0], y)

    process, y, theta = PROCESSES["cosine"], X[0], 1e-3
    exact = slope_and_divergence(process, jnp.asarray(theta), jnp.asarray(y))
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), process)
    found = slope_and_divergence(single, jnp.float32(theta), jnp.asarray(y, jnp.float32))
    for value, truth in zip(found, exact, strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, truth, rtol=5e-6, atol=1e-6)


def test_a_clipped_or_plain_denoiser_is_asked_for_x0():
    vp = PROCESSES["vp"]
    clipped = denoisers.from_network(lambda x, t: 5.0 * x, vp, "x0", clip=0.1)
    theta, y = jnp.asarray(0.5), jnp.asarray(X)
    expected = (np.cos(0.5) * X - np.clip(5.0 * X, -0.1, 0.1)) / np.sin(0.5)
    for denoise in (clipped, lambda x, t: jnp.clip(5.0 * x, -0.1, 0.1)):
        found = probability_flow.vector_field(vp, denoise)(theta, y)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


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
        ({"rtol": -1.0}, "`rtol` must be positive"),
        ({"atol": 0.0}, "`atol` must be positive"),
        ({"max_steps": 0}, "`max_steps`"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    process = PROCESSES["vp"]
    with pytest.raises(ValueError, match=match):
        likelihood.log_prob(process, MIXTURE.denoiser(process), X, **options)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p: likelihood.log_prob(p, lambda x, t: x[:, :1], X), "`denoise` must return"),
        (lambda p: likelihood.log_prob(p, jnp.multiply, X[:0]), "`x` must hold at least one row"),
        (lambda p: likelihood.log_prob(p, MIXTURE, X), "`denoise` must be a function"),
        (lambda p: likelihood.log_prob(jnp.multiply, p, X), "`process` must be a process"),
        (lambda p: likelihood.default_t_min(processes.flow), r"Call it: flow\(\)"),
        (
            lambda p: likelihood.log_prob(p, jnp.multiply, X, key=0, num_probes=1),
            "`key` must be a typed key",
        ),
        (
            lambda p: likelihood.log_prob(p, denoisers.from_network(jnp.multiply, p), X),
            "alpha is 0 for a network that predicts eps",
        ),
    ],
)
def test_what_is_no_denoiser_of_the_data_is_refused(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call(PROCESSES["flow"])


def test_too_few_steps_are_one_sentence():
    process, said = PROCESSES["vp"], "`max_steps` must reach .*; 3 solver steps did not"
    denoise = denoisers.from_network(lambda x, t: jnp.tanh(2 * x), process, "x0")
    with pytest.raises(RuntimeError, match=rf"^{said} in 2 of 2 rows\. Raise it") as caught:
        likelihood.log_prob(process, denoise, X[:2], max_steps=3)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_too_few_steps_are_told_under_jit():
    process, said = PROCESSES["vp"], "`max_steps` must reach .*; 3 solver steps did not"
    denoise = denoisers.from_network(lambda x, t: jnp.tanh(2 * x), process, "x0")
    sampler = samplers.adaptive(process, denoise, max_steps=3)
    with pytest.raises(RuntimeError, match=said):  # the runtime says more
        jax.block_until_ready(sample(jax.random.key(0), sampler, X[:2], jnp.array([1.0, 0.0])))


def test_numbers_of_numpy_are_numbers():
    options = np.float32(0.1), np.float64(0.1), np.int64(64)
    assert probability_flow.check_tolerances(*options) == options


def test_bad_bins_are_refused():
    with pytest.raises(ValueError, match="`bin_width`"):
        likelihood.bits_per_dim(jnp.zeros(2), 4, 0.0)
    with pytest.raises(ValueError, match="`num_dims`"):
        likelihood.bits_per_dim(jnp.zeros(2), 0, 0.1)
    with pytest.raises(TypeError, match="`x`"):
        likelihood.log_prob(PROCESSES["vp"], jnp.multiply, jnp.zeros((2, 2), int))
