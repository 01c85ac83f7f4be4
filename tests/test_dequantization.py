"""Probabilities of levels against those of a Gaussian's bins."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from jaxdiff import data, likelihood

L, MEAN, STD = 6, 0.1, 0.25
KEY = jax.random.key(0)


def density(key, x):
    return norm.logpdf(x, MEAN, STD).sum(axis=tuple(range(1, x.ndim)))


def exact(levels):
    edges = 2.0 * jnp.arange(L + 1) / L - 1.0
    probs = jnp.diff(norm.cdf(edges, MEAN, STD))
    return jnp.log(probs)[levels].sum(axis=tuple(range(1, levels.ndim)))


LEVELS = jnp.arange(L).repeat(2000).reshape(-1, 1)


def per_level(values):
    values = np.asarray(values).reshape(L, 2000)
    return values.mean(1), values.std(1) / math.sqrt(2000)


def test_uniform_noise_bounds_the_probability_and_more_samples_reach_it():
    log_prob = np.asarray(exact(jnp.arange(L)[:, None]))
    one = likelihood.levels_log_prob(KEY, density, LEVELS, L)
    assert one.shape == (1, 6 * 2000)
    mean, stderr = per_level(one)
    print(f"one sample {mean - log_prob} +- {stderr}")
    assert (mean < log_prob + 4 * stderr).all()
    assert (mean < log_prob - 4 * stderr).any()
    many = likelihood.levels_log_prob(KEY, density, LEVELS, L, num_samples=64)
    mean, stderr = per_level(likelihood.importance_weighted(many))
    print(f"64 samples {mean - log_prob} +- {stderr}")
    np.testing.assert_allclose(mean, log_prob, atol=0.02)


def test_the_mean_over_a_bin_agrees_with_bits_per_dim():
    levels = jnp.array([[0, 3], [5, 2]])
    weights = likelihood.levels_log_prob(KEY, density, levels, L)[0]
    bits = -weights / (2 * math.log(2.0))
    assert bits.shape == (2,)
    x = data.centers(levels, L)
    center = likelihood.bits_per_dim(density(None, x), 2, data.bin_width(L))
    np.testing.assert_allclose(bits, center, atol=2.5)


def learned(params, x):
    return params["mean"] + params["slope"] * x, jnp.full_like(x, params["log_std"])


def test_the_density_of_learned_noise_integrates_to_one():
    dequantizer = likelihood.logistic_normal(learned, L)
    params = {"mean": 0.3, "slope": 0.5, "log_std": 0.2}
    u, log_q = dequantizer(params, KEY, jnp.zeros((200_000, 1), int))
    assert ((u > 0) & (u < 1)).all()
    inside = np.asarray((u[:, 0] > 0.2) & (u[:, 0] < 0.9)) * np.exp(-np.asarray(log_q))
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
    def descend(params, key):
        loss = lambda p: loss_fn(p, key, {"x0": LEVELS})[0].mean()  # noqa: E731
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params))

    for key in jax.random.split(jax.random.key(1), 150):
        params = descend(params, key)
    truth = float(-exact(LEVELS).mean())
    values = loss_fn(params, KEY, {"x0": LEVELS})[0]
    weights = likelihood.levels_log_prob(
        KEY, density, LEVELS, L, dequantizer=dequantizer, params=params["dequantizer"]
    )
    uniform = -likelihood.levels_log_prob(KEY, density, LEVELS, L)
    gaps = [float(v.mean()) - truth for v in (values, -weights, uniform)]
    stderr = float(values.std()) / math.sqrt(values.size)
    print(f"gaps: learned {gaps[0]:.4f} and {gaps[1]:.4f} +- {stderr:.4f}, uniform {gaps[2]:.4f}")
    assert gaps[0] > -4 * stderr
    assert abs(gaps[0] - gaps[1]) < 6 * stderr
    assert gaps[0] < 0.7 * gaps[2]


def test_a_rows_noise_is_its_own():
    large = likelihood.levels_log_prob(KEY, density, LEVELS[:50], L, num_samples=3)
    small = likelihood.levels_log_prob(KEY, density, LEVELS[:7], L, num_samples=3)
    np.testing.assert_allclose(large[:, :7], small, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.array([[L]]), np.array([[-1]])])
def test_levels_that_do_not_exist_are_refused_or_where_traced_make_nan(bad):
    calls = {
        "centers": lambda levels: data.centers(levels, L),
        "dequantize": lambda levels: data.dequantize(KEY, levels, L),
        "levels_log_prob": lambda levels: likelihood.levels_log_prob(KEY, density, levels, L),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"`levels` must be in 0\.\.5; got values from"):
            call(bad)
        assert np.isnan(jax.jit(call)(bad)).all(), name
        assert np.isfinite(jax.jit(call)(np.array([[L - 1]]))).all(), name


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
    levels = jnp.arange(256).astype(dtype)[:, None]
    for draw in (
        jax.jit(lambda x: data.dequantize(jax.random.key(0), x, 256)),
        jax.jit(lambda x: data.centers(x, 256)),
        lambda x: data.centers(x, 256),
    ):
        x = draw(levels)
        assert (jnp.abs(x - (2 * jnp.arange(256)[:, None] + 1) / 256 + 1) <= 1 / 256).all()
