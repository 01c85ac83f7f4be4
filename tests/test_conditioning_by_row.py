"""Conditioning by row, in what solves each row by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import Model, likelihood, processes, sample, samplers

FLOW = processes.flow()
VARIANCE = 0.25
MEANS = np.random.default_rng(0).normal(size=(5, 2))
X = np.random.default_rng(1).normal(size=(5, 2))
OTHERS = np.arange(5)[:, np.newaxis] > 0
ROWS = {"mean": MEANS}


def denoise(x_t, t, cond):
    """The exact denoiser of N(mean, VARIANCE I), a mean a row."""
    alpha, sigma = FLOW.alpha(t), FLOW.sigma(t)
    gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    return cond["mean"] + gain * (x_t - alpha * cond["mean"])


@functools.cache
def judged(num_probes=None):
    options = {} if num_probes is None else {"key": jax.random.key(0), "num_probes": num_probes}
    options |= {"rtol": 1e-6, "atol": 1e-6, "t_min": 1e-3}
    return jax.jit(lambda x, cond: likelihood.log_prob(FLOW, denoise, x, cond=cond, **options)[0])


def test_the_likelihood_is_that_of_each_rows_own_distribution():
    found = judged()(X, ROWS)
    alpha, sigma = 1.0 - 1e-3, 1e-3
    variance = alpha**2 * VARIANCE + sigma**2
    squares = ((X - alpha * MEANS) ** 2).sum(1)
    np.testing.assert_allclose(
        found, -0.5 * squares / variance - np.log(2 * np.pi * variance), atol=2e-5
    )
    others = {"mean": MEANS + 1.0 * OTHERS}
    np.testing.assert_allclose(judged()(X, others)[0], found[0], rtol=1e-12)


def test_a_model_s_v_is_asked_by_row_too():
    seen = []

    def apply(params, x_t, t, cond=None, *, key=None):
        seen.append(cond["mean"].shape)
        return params * x_t - cond["mean"]

    model = Model(apply, FLOW, "v")

    def whole(x, cond):
        return likelihood.log_prob(FLOW, model.denoiser(0.5), x, cond=cond, rtol=1e-3, atol=1e-3)

    log_prob, x_T = jax.eval_shape(whole, X, ROWS)
    assert (log_prob.shape, x_T.shape) == ((5,), (5, 2))
    assert set(seen) == {(1, 2)}  # a batch of one, with its own row


@functools.cache
def sampled():
    @jax.jit
    def run(x_T, ts, cond):
        made = samplers.adaptive(FLOW, denoise, 1e-6, 1e-6, cond=cond)
        return sample(jax.random.key(0), made, x_T, ts, collect=made.info)

    return run


def test_samples_are_those_of_each_rows_own_flow():
    ts = jnp.asarray([1.0, 0.5, 0.1])
    x, info = sampled()(X, ts, ROWS)
    alpha, sigma = 0.9, 0.1
    expected = alpha * MEANS + np.sqrt(alpha**2 * VARIANCE + sigma**2) * X
    np.testing.assert_allclose(x, expected, atol=1e-4)
    calls = info["calls"]
    assert calls.shape == (2, 5)
    assert calls.dtype == jnp.int32
    assert (np.diff(calls, axis=0) > 0).all()
    others = {"mean": MEANS + 30.0 * OTHERS}
    _, info = sampled()(X, ts, others)
    np.testing.assert_array_equal(info["calls"][:, 0], calls[:, 0])


def test_the_calls_of_adaptive_are_those_that_were_made():
    count = [0]

    def counted(x_t, t):
        def host(x):
            count[0] += 1
            return np.sin(3.0 * np.asarray(x))

        shape = jax.ShapeDtypeStruct(x_t.shape, x_t.dtype)
        return jax.pure_callback(host, shape, x_t, vmap_method="sequential")  # one row, one call

    made = samplers.adaptive(FLOW, counted)

    @jax.jit
    def run(x_T, ts):
        return sample(jax.random.key(0), made, x_T, ts, collect=made.info)

    for end in (0.1, 0.0):
        count[0] = 0
        _, info = run(X[:1], jnp.asarray([1.0, 0.5, end]))
        jax.effects_barrier()
        assert int(info["calls"][-1, 0]) == count[0]
    assert samplers.count_calls(made, jnp.asarray([1.0, 0.5])) is None


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: likelihood.log_prob(FLOW, denoise, X, cond={"mean": MEANS[:2]}),
            ValueError,
            r"`cond\['mean'\]` must hold 5 rows",
        ),
        (
            lambda: likelihood.log_prob(FLOW, lambda x, t: x, X, cond=ROWS),
            TypeError,
            r"`denoise` must be a function \(x_t, t, cond\)",
        ),
        (
            lambda: samplers.adaptive(FLOW, lambda x, t: x, cond=ROWS),
            TypeError,
            r"`denoise` must be a function \(x_t, t, cond\)",
        ),
        (
            lambda: samplers.adaptive(FLOW, denoise, cond=ROWS).init(X[:2]),
            ValueError,
            r"`cond\['mean'\]` must hold 2 rows",
        ),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
