"""Variational bounds, of losses and of likelihoods, against closed forms."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, NO_SIGNAL_AT_END, PROCESSES, chosen, drawn, few

from jaxdiff import (
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


KEPT = ("vp", "ve", "cosine", "edm", "flow", "ddpm")
"""One process of each family, in one program."""


def process_of(name):
    return chosen(name, KEPT if name in KEPT else tuple(PROCESSES))


@functools.partial(jax.jit, static_argnums=1)
def _grids(process, num_steps):
    t_end = process.time_of_log_snr(jnp.minimum(7.0, process.log_snr(0.0) - 0.5))
    return {kind: make(process, num_steps, t_end) for kind, make in GRIDS.items()}


def grid(name, kind, num_steps=64):
    return _grids(process_of(name), num_steps)[kind]


@functools.cache
def data(num=2000):
    x0 = drawn(1, num)
    return x0, np.asarray(jax.jit(MIXTURE.log_prob)(x0))


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", few(PROCESSES, KEPT))
def test_the_exact_denoisers_bound_is_above_the_closed_form(name, kind):
    x0, log_prob = data()
    total = _bound(process_of(name), grid(name, kind), x0).total
    gap, stderr = mean_and_stderr(total + log_prob)
    print(f"gap {gap:.4f} +- {stderr:.4f} nats")
    assert gap > 4 * stderr  # 64 steps: an honest loss, not a rounding
    if kind == "log_snr":
        assert gap < 1.5


@pytest.mark.slow
def test_finer_grids_close_the_gap():
    x0, log_prob = data()
    gaps = [
        mean_and_stderr(_bound(process_of("vp"), grid("vp", "log_snr", n), x0).total + log_prob)
        for n in (8, 32, 128)
    ]
    print(gaps)
    assert gaps[0][0] > 3 * gaps[1][0] > 6 * gaps[2][0] > 0


def test_weights_of_chains_are_unbiased_for_the_density():
    # One standard normal: with the reverse chain's variance the model's own density is Gaussian,
    # p(x_s | x_t) being linear, so that the mean of the weights has a closed form.
    x0 = np.array([[0.0], [1.0], [-2.0]])

    def denoise(x_t, t):  # x0_hat = alpha x_t / (alpha^2 + sigma^2), and alpha^2 + sigma^2 = 1
        return VP.alpha(t) * x_t

    @jax.jit
    def weights(key):
        ts = timesteps.log_snr(VP, 8, VP.time_of_log_snr(jnp.asarray(3.0)))

        def run(key):
            return likelihood.elbo(key, VP, denoise, x0, ts).log_weight

        return VP.alpha(ts), VP.variance(ts), jax.vmap(run)(jax.random.split(key, 20_000))

    alphas, variances, log_weights = jax.device_get(weights(jax.random.key(2)))
    variance = variances[0]
    for t, s in itertools.pairwise(range(len(alphas))):
        scale = alphas[t] / alphas[s]
        added = variances[t] - scale**2 * variances[s]
        keep = scale * variances[s] / variances[t]
        pull = alphas[s] * added / variances[t]
        variance = (keep + pull * alphas[t]) ** 2 * variance
        variance += variances[s] * added / variances[t]
    variance = (variance + variances[-1]) / alphas[-1] ** 2
    exact = -0.5 * x0[:, 0] ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)
    ratio = np.exp(log_weights - exact)
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
    found = _bound(process_of("cosine"), grid("cosine", "uniform"), x0)
    gap, stderr = mean_and_stderr(found.total + found.log_weight)
    assert abs(gap) < 4 * stderr
    assert float(np.abs(found.prior).max()) == 0.0  # alpha(t_max) = 0


@jax.jit
def _prior(process, x0):
    end = process.t_max
    return variational.prior_divergence(process, x0), process.alpha(end), process.sigma(end)


@pytest.mark.parametrize("name", few(PROCESSES, KEPT))
def test_the_prior_term_is_the_divergence_of_two_gaussians(name):
    x0, _ = data()
    prior, alpha, sigma = jax.device_get(_prior(process_of(name), x0))
    np.testing.assert_allclose(prior, 0.5 * (alpha * x0 / sigma) ** 2 @ np.ones(2), rtol=1e-12)
    assert (float(prior.max()) == 0.0) == (name in NO_SIGNAL_AT_END)


def exact_network(process, kind):
    exact = MIXTURE.denoiser(process)

    def apply(params, x_t, t, cond=None, *, key=None):
        return predictions.convert(process, "x0", kind, exact(x_t, t), x_t, t)

    return apply


@pytest.mark.parametrize(
    ("name", "kind"), few([("vp", "eps"), ("flow", "v"), ("cosine", "velocity")], [("vp", "eps")])
)
def test_the_loss_estimates_the_whole_bound(name, kind):
    process, (x0, log_prob) = PROCESSES[name], data()
    ts = grid(name, "uniform")
    apply = exact_network(process, kind)
    steps = losses.elbo(apply, process, prediction=kind, ts=ts)
    infinite = losses.elbo(apply, process, prediction=kind, t_min=ts[-1])

    @jax.jit
    def evaluate(keys):
        return jax.lax.map(
            lambda key: (steps(0.0, key, {"x0": x0})[0], infinite(0.0, key, {"x0": x0})[0]), keys
        )

    in_steps, in_continuous_time = evaluate(jax.random.split(jax.random.key(3), 16))
    whole = _bound(process_of(name), ts, x0).total
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
    mean, spread = 1.0, 0.5

    def schedule(params):
        return processes.vp(0.1, jnp.exp(params["log_beta_max"]))

    def apply(params, x_t, t, cond=None, *, key=None):
        process = schedule(params)
        alpha, variance = (of(t)[:, None] for of in (process.alpha, process.variance))
        gain = alpha * spread**2 / (alpha**2 * spread**2 + variance)
        x0_hat = mean + gain * (x_t - alpha * mean)
        return predictions.convert(process, "x0", "v", x0_hat, x_t, t)

    loss_fn = losses.elbo(apply, schedule, prediction="v", t_min=0.05)

    @jax.jit
    def learn(params, key, x0):
        def descend(params, key):
            grads = jax.grad(lambda p: loss_fn(p, key, {"x0": x0})[0].mean())(params)
            return jax.tree.map(lambda p, g: p - 0.2 * g, params, grads), None

        learned, _ = jax.lax.scan(descend, params, jax.random.split(key, 100))
        priors = (variational.prior_divergence(schedule(p), x0).mean() for p in (params, learned))
        return learned, *priors

    x0 = mean + spread * np.random.default_rng(4).normal(size=(512, 1))
    params, before, after = learn({"log_beta_max": np.log(3.0)}, jax.random.key(5), x0)
    print(f"beta_max {np.exp(params['log_beta_max']):.1f}, prior {before:.3f} to {after:.3f} nats")
    assert after < 0.5 * before


def test_a_process_among_the_parameters_has_gradients():
    def apply(params, x_t, t, cond=None, *, key=None):
        return jnp.tanh(x_t)

    loss_fn = losses.elbo(apply, lambda params: params["process"], t_min=0.1)
    x0 = {"x0": data()[0][:32]}
    params = {"process": processes.vp(0.1, 3.0)}
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, jax.random.key(0), x0)[0].mean()))(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(np.isfinite(leaf) and leaf != 0.0 for leaf in jax.tree.leaves(grads))


def test_levels_have_probabilities():
    decode = variational.level_decoder(5)
    centers = (2.0 * np.arange(5.0) + 1.0) / 5 - 1.0

    @jax.jit
    def evaluate(t):
        log_prob = decode(VP, centers[:, None], jnp.full((5, 1), 0.13), t)
        both = decode(VP, np.stack([centers[:2]] * 3), jnp.full((3, 2), 0.13), t)
        return log_prob, both, VP.alpha(t), VP.sigma(t)

    log_prob, both, alpha, sigma = jax.device_get(evaluate(0.2))
    np.testing.assert_allclose(np.exp(log_prob).sum(), 1.0, rtol=1e-12)
    shares = np.exp(-0.5 * ((0.13 / alpha - centers) / (sigma / alpha)) ** 2)
    np.testing.assert_allclose(np.exp(log_prob), shares / shares.sum(), rtol=1e-10)
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
