"""Variational bounds, of losses and of likelihoods, against closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, NO_SIGNAL_AT_END, PROCESSES, chosen

from jaxdiff import (
    Mixture,
    denoisers,
    likelihood,
    losses,
    predictions,
    processes,
    timesteps,
    variational,
)

VP, FLOW = processes.vp(), processes.flow()
KEY = jax.random.key(0)
TS = jnp.array([1.0, 0.5, 0.1])
GRIDS = {"uniform": timesteps.uniform, "log_snr": timesteps.log_snr}


def mean_and_stderr(values):
    values = np.asarray(values)
    return values.mean(), values.std(ddof=1) / math.sqrt(values.size)


@jax.jit
def _bound(process, ts, x0):
    return likelihood.elbo(jax.random.key(0), process, MIXTURE.denoiser(process), x0, ts)


def grid(name, kind, num_steps):
    process = PROCESSES[name]
    t_end = process.time_of_log_snr(jnp.asarray(min(7.0, process.log_snr(0.0) - 0.5)))
    return GRIDS[kind](process, num_steps, t_end)


@functools.cache
def data(num=2000):
    x0 = jax.jit(MIXTURE.sample, static_argnums=1)(jax.random.key(1), num)
    return x0, np.asarray(MIXTURE.log_prob(x0))


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_exact_denoisers_bound_is_above_the_closed_form(name, kind):
    x0, log_prob = data()
    total = _bound(chosen(name), grid(name, kind, 64), x0).total
    gap, stderr = mean_and_stderr(total + log_prob)
    print(f"gap {gap:.4f} +- {stderr:.4f} nats")
    assert gap > 4 * stderr  # 64 steps: an honest loss, not a rounding
    if kind == "log_snr":
        assert gap < 1.5


@pytest.mark.slow
def test_finer_grids_close_the_gap():
    x0, log_prob = data()
    gaps = [
        mean_and_stderr(_bound(chosen("vp"), grid("vp", "log_snr", n), x0).total + log_prob)
        for n in (8, 32, 128)
    ]
    print(gaps)
    assert gaps[0][0] > 3 * gaps[1][0] > 6 * gaps[2][0] > 0


def test_weights_of_chains_are_unbiased_for_the_density():
    # One standard normal: with the reverse chain's variance the model's own density is Gaussian,
    # p(x_s | x_t) being linear, so that the mean of the weights has a closed form.
    process, ts = VP, timesteps.log_snr(VP, 8, VP.time_of_log_snr(jnp.asarray(3.0)))
    unit = Mixture(jnp.ones(1), jnp.zeros((1, 1)), jnp.ones((1, 1, 1)))
    variance = process.variance(ts[0])
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        scale = process.alpha(t) / process.alpha(s)
        added = process.variance(t) - scale**2 * process.variance(s)
        keep = scale * process.variance(s) / process.variance(t)
        pull = process.alpha(s) * added / process.variance(t)
        # x0_hat = alpha x_t / (alpha^2 + sigma^2), and alpha^2 + sigma^2 = 1
        variance = (keep + pull * process.alpha(t)) ** 2 * variance
        variance += process.variance(s) * added / process.variance(t)
    end = ts[-1]
    variance = (variance + process.variance(end)) / process.alpha(end) ** 2
    x0 = jnp.array([[0.0], [1.0], [-2.0]])
    exact = -0.5 * x0[:, 0] ** 2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance)

    @jax.jit
    def weights(keys):
        def run(key):
            return likelihood.elbo(key, process, unit.denoiser(process), x0, ts).log_weight

        return jax.vmap(run)(keys)

    log_weights = jax.device_get(weights(jax.random.split(jax.random.key(2), 20_000)))
    ratio = np.exp(log_weights - np.asarray(exact))
    stderr = ratio.std(0) / math.sqrt(len(ratio))
    print(f"mean weights over the density {ratio.mean(0)} +- {stderr}")
    assert np.all(np.abs(ratio.mean(0) - 1.0) < 4 * stderr)
    one, many = (
        likelihood.importance_weighted(log_weights[: 50 * k].reshape(k, -1)[:, :150]).mean()
        for k in (1, 50)
    )
    assert one < many


def test_the_mean_log_weight_is_minus_the_bound():
    x0, _ = data()
    found = _bound(chosen("cosine"), grid("cosine", "uniform", 32), x0)
    gap, stderr = mean_and_stderr(found.total + found.log_weight)
    assert abs(gap) < 4 * stderr
    assert float(np.abs(found.prior).max()) == 0.0  # alpha(t_max) = 0


@pytest.mark.parametrize("name", PROCESSES)
def test_the_prior_term_is_the_divergence_of_two_gaussians(name):
    process, (x0, _) = PROCESSES[name], data()
    prior = variational.prior_divergence(process, x0)
    alpha, sigma = process.alpha(process.t_max), process.sigma(process.t_max)
    np.testing.assert_allclose(prior, 0.5 * (alpha * x0 / sigma) ** 2 @ np.ones(2), rtol=1e-12)
    assert (float(prior.max()) == 0.0) == (name in NO_SIGNAL_AT_END)


def exact_network(process, kind):
    exact = MIXTURE.denoiser(process)

    def apply(params, x_t, t, cond=None, *, key=None):
        return predictions.convert(process, "x0", kind, exact(x_t, t), x_t, t)

    return apply


@pytest.mark.parametrize(("name", "kind"), [("vp", "eps"), ("flow", "v"), ("cosine", "velocity")])
def test_the_loss_estimates_the_whole_bound(name, kind):
    process, (x0, log_prob) = PROCESSES[name], data()
    ts = grid(name, "uniform", 64)
    apply = exact_network(process, kind)
    steps = losses.elbo(apply, process, prediction=kind, ts=ts)
    infinite = losses.elbo(apply, process, prediction=kind, t_min=ts[-1])

    @jax.jit
    def evaluate(keys):
        return jax.lax.map(
            lambda key: (steps(0.0, key, {"x0": x0})[0], infinite(0.0, key, {"x0": x0})[0]), keys
        )

    in_steps, in_continuous_time = evaluate(jax.random.split(jax.random.key(3), 16))
    whole = _bound(chosen(name), ts, x0).total
    gap, stderr = mean_and_stderr(in_steps.mean(0) - whole)
    print(f"one step at a time {gap:.3f} +- {stderr:.3f} from the sum over all")
    assert abs(gap) < 4 * stderr
    gap, stderr = mean_and_stderr(in_continuous_time.mean(0) + log_prob)
    print(f"continuous time: {gap:.3f} +- {stderr:.3f} above the closed form")
    assert gap > -4 * stderr
    assert gap < 0.5


def test_a_schedule_is_learned_with_the_network():
    # The denoiser of a Gaussian is known for every schedule, so only the schedule learns: what is
    # left to gain is the prior's mismatch, which a larger beta_max takes away.
    gaussian = Mixture(jnp.ones(1), jnp.ones((1, 1)), 0.25 * jnp.ones((1, 1, 1)))

    def schedule(params):
        return processes.vp(0.1, jnp.exp(params["log_beta_max"]))

    def apply(params, x_t, t, cond=None, *, key=None):
        process = schedule(params)
        x0_hat = gaussian.denoiser(process)(x_t, t)
        return predictions.convert(process, "x0", "v", x0_hat, x_t, t)

    loss_fn = losses.elbo(apply, schedule, prediction="v", t_min=0.05)
    x0 = {"x0": gaussian.sample(jax.random.key(4), 512)}

    @jax.jit
    def descend(params, key):
        grads = jax.grad(lambda p: loss_fn(p, key, x0)[0].mean())(params)
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, grads)

    params = {"log_beta_max": jnp.log(3.0)}
    before = variational.prior_divergence(schedule(params), x0["x0"]).mean()
    for key in jax.random.split(jax.random.key(5), 100):
        params = descend(params, key)
    after = variational.prior_divergence(schedule(params), x0["x0"]).mean()
    print(f"beta_max {np.exp(params['log_beta_max']):.1f}, prior {before:.3f} to {after:.3f} nats")
    assert after < 0.5 * before


def test_a_process_among_the_parameters_has_gradients():
    loss_fn = losses.elbo(exact_network(VP, "eps"), lambda params: params["process"], t_min=0.1)
    x0 = {"x0": data()[0][:32]}
    params = {"process": processes.vp(0.1, 3.0)}
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, jax.random.key(0), x0)[0].mean()))(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(np.isfinite(leaf) and leaf != 0.0 for leaf in jax.tree.leaves(grads))


def test_levels_have_probabilities():
    decode = variational.level_decoder(5)
    centers = (2.0 * jnp.arange(5.0) + 1.0) / 5 - 1.0
    t = jnp.asarray(0.2)
    x_t = jnp.full((5, 1), 0.13)
    log_prob = decode(VP, centers[:, None], x_t, t)
    np.testing.assert_allclose(jnp.exp(log_prob).sum(), 1.0, rtol=1e-12)
    level = VP.sigma(t) / VP.alpha(t)
    expected = jax.nn.softmax(-0.5 * ((0.13 / VP.alpha(t) - centers) / level) ** 2)
    np.testing.assert_allclose(jnp.exp(log_prob), expected, rtol=1e-10)
    both = decode(VP, jnp.stack([centers[:2]] * 3), jnp.full((3, 2), 0.13), t)
    np.testing.assert_allclose(both, log_prob[:2].sum(), rtol=1e-12)


def test_bad_bounds_are_refused():
    apply, x0 = exact_network(VP, "eps"), jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="`ts` or `t_min`"):
        losses.elbo(apply, VP)
    with pytest.raises(ValueError, match="`ts` or `t_min`"):
        losses.elbo(apply, VP, ts=jnp.array([1.0, 0.1]), t_min=0.1)
    with pytest.raises(ValueError, match="`prediction`"):
        losses.elbo(apply, VP, prediction="noise", t_min=0.1)
    with pytest.raises(ValueError, match="with noise"):
        losses.elbo(apply, VP, ts=jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="with noise"):
        likelihood.elbo(jax.random.key(0), VP, MIXTURE.denoiser(VP), x0, jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="`log_weights`"):
        likelihood.importance_weighted(jnp.zeros(3))
    with pytest.raises(ValueError, match="`num_levels`"):
        variational.level_decoder(1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p, x: likelihood.elbo(KEY, p, lambda x, t: x[:, :1], x, TS), "`denoise` must ret"),
        (lambda p, x: likelihood.elbo(KEY, p, jnp.multiply, x[:0], TS), "`x0`.*one row"),
        (lambda p, x: likelihood.elbo(KEY, p, jnp.multiply, x, TS + 0.5), "t_max"),
        (lambda p, x: likelihood.elbo(0, p, jnp.multiply, x, TS), "`key` must be a typed key"),
        (lambda p, x: likelihood.elbo(KEY, jnp.multiply, p, x, TS), "`process`"),
        (
            lambda p, x: likelihood.elbo(KEY, p, denoisers.from_network(jnp.multiply, p), x, TS),
            "alpha is 0 for a network that predicts eps",
        ),
    ],
)
def test_what_is_no_denoiser_of_the_data_is_refused(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call(processes.flow(), jnp.ones((3, 2)))
