import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES, chosen, known

from jaxdiff import forward, processes

each_process = pytest.mark.parametrize("name", PROCESSES)
X0, X_T = np.random.default_rng(0).normal(size=(2, 4, 3))


@jax.jit
def _compose(process, ts, num_steps):
    def body(i, carry):
        mean, variance = carry
        mean, std = forward.transition(process, mean, ts[i], ts[i + 1])
        scale, _ = forward.step_coefficients(process, ts[i], ts[i + 1])
        return mean, scale**2 * variance + std**2

    composed = jax.lax.fori_loop(0, num_steps, body, (jnp.asarray(X0), process.variance(ts[0])))
    return composed, forward.marginal(process, X0 * process.alpha(ts[0]), ts[-1])


@each_process
@pytest.mark.parametrize("num_steps", [100, 1000])
def test_single_transitions_compose_to_the_marginal(name, num_steps):
    ts = np.full(1001, PROCESSES[name].t_max, float)
    ts[: num_steps + 1] = np.linspace(0.0, PROCESSES[name].t_max, num_steps + 1)
    (mean, variance), (exact_mean, exact_std) = _compose(chosen(name), ts, num_steps)
    np.testing.assert_allclose(mean, exact_mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variance, exact_std**2, rtol=1e-12)


@jax.jit
def _bayes(process, t, s):
    """The product of two Gaussians in x_s, its mean and precision computed the long way."""
    prior_mean, prior_std = forward.marginal(process, X0, s)
    scale, variance = forward.step_coefficients(process, s, t)
    precision = 1 / prior_std**2 + scale**2 / variance
    expected = (prior_mean / prior_std**2 + scale * X_T / variance) / precision
    return forward.posterior(process, X_T, X0, t, s), (expected, precision**-0.5)


@each_process
def test_posterior_is_bayes_rule(name):
    s, t = PROCESSES[name].t_max * np.array([0.35, 0.8])
    (mean, std), (expected_mean, expected_std) = _bayes(known(name, [s, t]), t, s)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-9)
    np.testing.assert_allclose(std, expected_std, rtol=1e-9)


def test_posterior_is_the_published_ddpm_posterior():
    betas = np.array([0.1, 0.2, 0.3])
    kept = np.cumprod(1 - betas)
    x_t = np.ones_like(X0)
    mean, std = jax.jit(forward.posterior)(processes.from_betas(betas), x_t, X0, 3 / 3, 2 / 3)
    published = (
        np.sqrt(kept[1]) * betas[2] / (1 - kept[2]) * X0
        + np.sqrt(1 - betas[2]) * (1 - kept[1]) / (1 - kept[2]) * x_t
    )
    np.testing.assert_allclose(mean, published, rtol=1e-13)
    np.testing.assert_allclose(std**2, (1 - kept[1]) / (1 - kept[2]) * betas[2], rtol=1e-13)


@jax.jit
def _stay(process, t):
    return forward.posterior(process, X_T, X0, t, t), forward.transition(process, X_T, t, t)


@each_process
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_step_of_no_length_stays(name, fraction):
    t = fraction * PROCESSES[name].t_max
    for mean, std in _stay(known(name, t), t):
        np.testing.assert_array_equal(mean, X_T)
        assert std == 0.0


@jax.jit
def _everything(process, t, s):
    return (
        forward.marginal(process, X0, t),
        forward.transition(process, X0, s, t),
        forward.posterior(process, X_T, X0, t, s),
    )


@each_process
def test_one_time_and_a_time_a_row_agree(name):
    s, t = PROCESSES[name].t_max * np.array([0.2, 0.7])
    one = _everything(known(name, [s, t]), t, s)
    many = _everything(known(name, [s, t]), np.full(4, t), np.full(4, s))
    for (one_mean, one_std), (mean, std) in zip(one, many, strict=True):
        assert one_std.shape == ()
        assert std.shape == (4, 1)
        np.testing.assert_allclose(one_mean, mean, rtol=1e-14)
        np.testing.assert_allclose(np.broadcast_to(one_std, (4, 1)), std, rtol=1e-14)


@jax.jit
def _perturb(process, x0, t):
    x_t, eps = forward.perturb(jax.random.key(0), process, x0, t)
    return x_t, eps, forward.marginal(process, x0, t)


@each_process
def test_perturb_draws_the_marginal(name):
    t = np.full(50_000, 0.6 * PROCESSES[name].t_max)
    drawn = _perturb(known(name, t), np.full((50_000, 1), 1.5), t)
    x_t, eps, (mean, std) = jax.device_get(drawn)
    np.testing.assert_allclose(x_t, mean + std * eps, rtol=1e-14)
    z = float(((x_t - mean) / std).mean() * np.sqrt(50_000))
    print(f"mean off by {z:.2f} standard errors")
    assert abs(z) < 4


@functools.cache
def gradient(name):
    """Return the gradients by the process's hyper-parameters and the data, compiled."""

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def total(process, x0, fraction):
        t = fraction * process.t_max
        x_t, _ = forward.perturb(jax.random.key(0), process, x0, t)
        mean, std = forward.posterior(process, x_t, x0, process.t_max, t)
        return jnp.sum(x_t**2) + jnp.sum(mean**2) + std

    return functools.partial(total, jax.tree.map(jnp.asarray, PROCESSES[name]), X0)


@each_process
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_gradients_are_finite_at_the_ends(name, fraction):
    grads, x0_grad = gradient(name)(fraction)
    for leaf in jax.tree.leaves(grads):
        if name != "zero_snr":  # its last node is at -inf, which has no gradient
            assert np.isfinite(leaf).all()
    assert np.isfinite(x0_grad).all()


def test_the_schedule_is_float32_whatever_the_data():
    mean, std = forward.marginal(processes.vp(), jnp.asarray(X0, jnp.bfloat16), jnp.float32(0.3))
    assert mean.dtype == std.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p: forward.marginal(p, X0, 1.5), ValueError, r"`t` must lie in \[0, t_max\]"),
        (lambda p: forward.marginal(p, X0, -0.1), ValueError, "`t` must lie"),
        (lambda p: forward.marginal(p, X0, float("nan")), ValueError, "`t` must lie"),
        (lambda p: forward.marginal(p, X0, jnp.zeros(3)), ValueError, "`t` must have shape"),
        (lambda p: forward.marginal(p, jnp.ones((2, 2), int), 0.5), TypeError, "`x0`"),
        (lambda p: forward.transition(p, X0, 0.6, 0.5), ValueError, "`s` must be at most `t`"),
        (lambda p: forward.posterior(p, X0, X0, 0.5, 0.6), ValueError, "`s` must be at most `t`"),
        (lambda p: forward.posterior(p, X0, X0[:2], 0.6, 0.5), ValueError, "`x0` must have"),
    ],
)
def test_bad_arguments_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(processes.vp())
