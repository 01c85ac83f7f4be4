"""Probabilities of levels against those of a Gaussian's bins."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm
from scipy import stats

from jaxdiff import data, likelihood

L, MEAN, STD = 6, 0.1, 0.25
KEY = jax.random.key(0)


def density(key, x):
    return norm.logpdf(x, MEAN, STD).sum(axis=tuple(range(1, x.ndim)))


def exact(levels):
    edges = 2.0 * np.arange(L + 1) / L - 1.0
    probs = np.diff(stats.norm.cdf(edges, MEAN, STD))
    return np.log(probs)[levels].sum(axis=tuple(range(1, levels.ndim)))


LEVELS = np.arange(L).repeat(2000).reshape(-1, 1)


def per_level(values):
    values = np.asarray(values).reshape(L, 2000)
    return values.mean(1), values.std(1) / math.sqrt(2000)


def test_uniform_noise_bounds_the_probability_and_more_samples_reach_it():
    log_prob = exact(np.arange(L)[:, None])

    @jax.jit
    def evaluate(levels):
        many = likelihood.levels_log_prob(KEY, density, levels, L, num_samples=64)
        one = likelihood.levels_log_prob(KEY, density, levels, L)
        return one, likelihood.importance_weighted(many)

    one, many = evaluate(LEVELS)
    assert one.shape == (1, 6 * 2000)
    mean, stderr = per_level(one)
    print(f"one sample {mean - log_prob} +- {stderr}")
    assert (mean < log_prob + 4 * stderr).all()
    assert (mean < log_prob - 4 * stderr).any()
    mean, stderr = per_level(many)
    print(f"64 samples {mean - log_prob} +- {stderr}")
    np.testing.assert_allclose(mean, log_prob, atol=0.02)


def test_the_mean_over_a_bin_agrees_with_bits_per_dim():
    @jax.jit
    def evaluate(levels):
        density_of_centers = density(None, data.centers(levels, L))
        center = likelihood.bits_per_dim(density_of_centers, 2, data.bin_width(L))
        return likelihood.levels_log_prob(KEY, density, levels, L)[0], center

    weights, center = evaluate(np.array([[0, 3], [5, 2]]))
    bits = -weights / (2 * math.log(2.0))
    assert bits.shape == (2,)
    np.testing.assert_allclose(bits, center, atol=2.5)


def learned(params, x):
    return params["mean"] + params["slope"] * x, jnp.full_like(x, params["log_std"])


def test_the_density_of_learned_noise_integrates_to_one():
    dequantizer = likelihood.logistic_normal(learned, L)
    params = {"mean": 0.3, "slope": 0.5, "log_std": 0.2}
    drawn = jax.jit(dequantizer)(params, KEY, np.zeros((200_000, 1), int))
    u, log_q = jax.device_get(drawn)
    assert ((u > 0) & (u < 1)).all()
    inside = ((u[:, 0] > 0.2) & (u[:, 0] < 0.9)) * np.exp(-log_q)
    stderr = inside.std() / math.sqrt(len(inside))
    print(f"volume of (0.2, 0.9): {inside.mean():.4f} +- {stderr:.4f}")
    assert abs(inside.mean() - 0.7) < 4 * stderr


def test_learned_noise_tightens_the_bound():
    dequantizer = likelihood.logistic_normal(learned, L)

    def minus_log_prob(params, key, batch):
        return -density(key, batch["x0"]), {}

    loss_fn = likelihood.dequantized(minus_log_prob, dequantizer, L)
    params = {"network": {}, "dequantizer": {"mean": 0.0, "slope": 0.0, "log_std": 0.5}}

    @jax.jit
    def learn(params, levels):
        def descend(params, key):
            loss = lambda p: loss_fn(p, key, {"x0": levels})[0].mean()  # noqa: E731
            return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params)), None

        params, _ = jax.lax.scan(descend, params, jax.random.split(jax.random.key(1), 150))
        weights = likelihood.levels_log_prob(
            KEY, density, levels, L, dequantizer=dequantizer, params=params["dequantizer"]
        )
        uniform = -likelihood.levels_log_prob(KEY, density, levels, L)
        return loss_fn(params, KEY, {"x0": levels})[0], weights, uniform

    values, weights, uniform = jax.device_get(learn(params, LEVELS))
    truth = float(-exact(LEVELS).mean())
    gaps = [float(v.mean()) - truth for v in (values, -weights, uniform)]
    stderr = float(values.std()) / math.sqrt(values.size)
    print(f"gaps: learned {gaps[0]:.4f} and {gaps[1]:.4f} +- {stderr:.4f}, uniform {gaps[2]:.4f}")
    assert gaps[0] > -4 * stderr
    assert abs(gaps[0] - gaps[1]) < 6 * stderr
    assert gaps[0] < 0.7 * gaps[2]


def test_a_rows_noise_is_its_own():
    @jax.jit
    def evaluate(*batches):
        return [likelihood.levels_log_prob(KEY, density, x, L, num_samples=3) for x in batches]

    large, small = evaluate(LEVELS[:50], LEVELS[:7])
    np.testing.assert_allclose(large[:, :7], small, rtol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda levels: data.centers(levels, L),
        lambda levels: data.dequantize(KEY, levels, L),
        lambda levels: likelihood.levels_log_prob(KEY, density, levels, L),
    ],
    ids=["centers", "dequantize", "levels_log_prob"],
)
def test_levels_that_do_not_exist_are_refused_or_where_traced_make_nan(call):
    traced = jax.jit(call)
    for bad in (np.array([[L]]), np.array([[-1]])):
        with pytest.raises(ValueError, match=r"`levels` must be in 0\.\.5; got values from"):
            call(bad)
        assert np.isnan(traced(bad)).all()
    assert np.isfinite(traced(np.array([[L - 1]]))).all()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`log_density` must return the shape of \(B,\)"):
        likelihood.levels_log_prob(KEY, lambda key, x: x, LEVELS[:3], L)
    with pytest.raises(TypeError, match="`num_samples` must be a whole number"):
        likelihood.levels_log_prob(KEY, density, LEVELS, L, num_samples=2.0)
    with pytest.raises(TypeError, match="`levels` must hold integers"):
        likelihood.levels_log_prob(KEY, density, jnp.zeros((2, 1)), L)
    with pytest.raises(ValueError, match="`num_levels`"):
        likelihood.levels_log_prob(KEY, density, LEVELS, 1)
    with pytest.raises(ValueError, match="`num_samples`"):
        likelihood.levels_log_prob(KEY, density, LEVELS, L, num_samples=0)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, jnp.int32])
def test_all_256_levels_of_bytes_have_a_place(dtype):
    """256 itself is no byte: a comparison with it must not wrap round."""
    levels = np.arange(256, dtype=dtype)[:, None]
    for draw in (
        jax.jit(lambda x: data.dequantize(jax.random.key(0), x, 256)),
        jax.jit(lambda x: data.centers(x, 256)),
        lambda x: data.centers(x, 256),
    ):
        x = np.asarray(draw(levels))
        assert (np.abs(x - (2 * np.arange(256)[:, None] + 1) / 256 + 1) <= 1 / 256).all()
