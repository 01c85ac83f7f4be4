import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES

from jaxdiff import forward, processes

each_process = pytest.mark.parametrize("name", PROCESSES)
X0 = jax.random.normal(jax.random.key(0), (4, 3))


@each_process
@pytest.mark.parametrize("num_steps", [100, 1000])
def test_single_transitions_compose_to_the_marginal(name, num_steps):
    process = PROCESSES[name]
    ts = jnp.linspace(0.0, process.t_max, num_steps + 1)

    @jax.jit
    def compose(ts):
        def body(carry, times):
            mean, variance = carry
            mean, std = forward.transition(process, mean, *times)
            scale, _ = forward.step_coefficients(process, *times)
            return (mean, scale**2 * variance + std**2), None

        return jax.lax.scan(body, (X0, process.variance(ts[0])), (ts[:-1], ts[1:]))[0]

    mean, variance = compose(ts)
    start = process.alpha(ts[0])
    exact_mean, exact_std = forward.marginal(process, X0 * start, ts[-1])
    np.testing.assert_allclose(mean, exact_mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variance, exact_std**2, rtol=1e-12)


@each_process
def test_posterior_is_bayes_rule(name):
    """Mean and precision of the product of two Gaussians in x_s, computed the long way."""
    process = PROCESSES[name]
    s, t = 0.35 * process.t_max, 0.8 * process.t_max
    x_t = jax.random.normal(jax.random.key(1), X0.shape)
    mean, std = forward.posterior(process, x_t, X0, t, s)
    prior_mean, prior_std = forward.marginal(process, X0, s)
    scale, variance = forward.step_coefficients(process, jnp.asarray(s), jnp.asarray(t))
    precision = 1 / prior_std**2 + scale**2 / variance
    expected = (prior_mean / prior_std**2 + scale * x_t / variance) / precision
    np.testing.assert_allclose(mean, expected, rtol=1e-9)
    np.testing.assert_allclose(std, precision**-0.5, rtol=1e-9)


def test_posterior_is_the_published_ddpm_posterior():
    betas = np.array([0.1, 0.2, 0.3])
    process = processes.from_betas(betas)
    kept = np.cumprod(1 - betas)
    x_t = jnp.ones_like(X0)
    mean, std = forward.posterior(process, x_t, X0, 3 / 3, 2 / 3)
    published = (
        np.sqrt(kept[1]) * betas[2] / (1 - kept[2]) * X0
        + np.sqrt(1 - betas[2]) * (1 - kept[1]) / (1 - kept[2]) * x_t
    )
    np.testing.assert_allclose(mean, published, rtol=1e-13)
    np.testing.assert_allclose(std**2, (1 - kept[1]) / (1 - kept[2]) * betas[2], rtol=1e-13)


@each_process
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_step_of_no_length_stays(name, fraction):
    process = PROCESSES[name]
    t = jnp.asarray(fraction * process.t_max)
    x_t = jax.random.normal(jax.random.key(1), X0.shape)
    for mean, std in (
        forward.posterior(process, x_t, X0, t, t),
        forward.transition(process, x_t, t, t),
    ):
        np.testing.assert_array_equal(mean, x_t)
        assert std == 0.0


@each_process
def test_one_time_and_a_time_a_row_agree(name):
    process = PROCESSES[name]
    t, s = 0.7 * process.t_max, 0.2 * process.t_max
    rows_t, rows_s = jnp.full(4, t), jnp.full(4, s)
    for one, many in (
        (forward.marginal(process, X0, t), forward.marginal(process, X0, rows_t)),
        (forward.transition(process, X0, s, t), forward.transition(process, X0, rows_s, rows_t)),
        (
            forward.posterior(process, X0, X0, t, s),
            forward.posterior(process, X0, X0, rows_t, rows_s),
        ),
    ):
        np.testing.assert_allclose(one[0], many[0], rtol=1e-14)
        np.testing.assert_allclose(jnp.broadcast_to(one[1], (4, 1)), many[1], rtol=1e-14)


@each_process
def test_perturb_draws_the_marginal(name):
    process = PROCESSES[name]
    t = jnp.full(50_000, 0.6 * process.t_max)
    x0 = jnp.full((50_000, 1), 1.5)
    x_t, eps = forward.perturb(jax.random.key(0), process, x0, t)
    mean, std = forward.marginal(process, x0, t)
    np.testing.assert_allclose(x_t, mean + std * eps, rtol=1e-14)
    z = float(((x_t - mean) / std).mean() * np.sqrt(50_000))
    print(f"mean off by {z:.2f} standard errors")
    assert abs(z) < 4


@each_process
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_gradients_are_finite_at_the_ends(name, fraction):
    process = PROCESSES[name]

    def total(process, x0):
        t = jnp.asarray(fraction * process.t_max)
        x_t, _ = forward.perturb(jax.random.key(0), process, x0, t)
        mean, std = forward.posterior(process, x_t, x0, process.t_max, t)
        return jnp.sum(x_t**2) + jnp.sum(mean**2) + std

    grads = jax.grad(total, argnums=(0, 1))(jax.tree.map(jnp.asarray, process), X0)
    for leaf in jax.tree.leaves(grads):
        if name != "zero_snr":  # its last node is at -inf, which has no gradient
            assert jnp.isfinite(leaf).all()
    assert jnp.isfinite(grads[1]).all()


def test_the_schedule_is_float32_whatever_the_data():
    mean, std = forward.marginal(processes.vp(), X0.astype(jnp.bfloat16), jnp.float32(0.3))
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
