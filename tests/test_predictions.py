import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NO_SIGNAL_AT_END, PROCESSES, chosen, known

from jaxdiff import forward, predictions

each_process = pytest.mark.parametrize("name", PROCESSES)
X0, EPS = np.random.default_rng(0).normal(size=(2, 5, 3))
PAIRS = tuple(itertools.product(predictions.KINDS, repeat=2))


def times(name):
    return PROCESSES[name].t_max * np.array([1e-3, 0.1, 0.4, 0.7, 0.99])


@jax.jit
def _truth(process, t):
    return {kind: predictions.from_pair(process, kind, X0, EPS, t) for kind in predictions.KINDS}


@jax.jit
def _convert(process, t, truth, error):
    """Every kind as every other, with an error added to what is converted."""
    mean, std = forward.marginal(process, X0, t)
    return {
        (source, target): predictions.convert(
            process, source, target, truth[source] + error, mean + std * EPS, t
        )
        for source, target in PAIRS
    }


def convert_all(name, error=0.0):
    t = times(name)
    truth = _truth(chosen(name), t)
    return truth, _convert(known(name, t), t, truth, error)


@each_process
def test_every_kind_converts_to_every_other(name):
    truth, converted = convert_all(name)
    for (_, target), value in converted.items():
        # x0 from eps loses sigma / alpha, 5e4 at worst here, of double precision
        np.testing.assert_allclose(value, truth[target], rtol=1e-8, atol=1e-8)


@jax.jit
def _path(process, t):
    """The conditional path and its time derivative."""

    def path(t):
        mean, std = forward.marginal(process, X0, t)
        return mean + std * EPS

    return jax.jvp(path, (t,), (jnp.ones(5),))


@each_process
def test_the_definitions_are_the_published_ones(name):
    t = times(name)
    truth, table = _truth(chosen(name), t), known(name, t)
    alpha, sigma = np.asarray(table.alphas)[:5, None], np.asarray(table.sigmas)[:5, None]
    np.testing.assert_array_equal(truth["x0"], X0)
    np.testing.assert_array_equal(truth["eps"], EPS)
    np.testing.assert_allclose(truth["v"], alpha * EPS - sigma * X0, rtol=1e-13)
    np.testing.assert_allclose(truth["score"], -EPS / sigma, rtol=1e-13)
    np.testing.assert_allclose(truth["velocity"], _path(chosen(name), t)[1], rtol=1e-10)


@jax.jit
def _ratios(process, t):
    return {(s, t_): predictions.error_ratio(process, t_, s, t) for s, t_ in PAIRS}


@each_process
def test_an_error_converts_by_its_ratio(name):
    (_, right), (_, wrong) = convert_all(name), convert_all(name, 0.1)
    for pair, ratio in _ratios(known(name, times(name)), times(name)).items():
        expected = 0.1 * np.broadcast_to(np.asarray(ratio)[:, None], (5, 3))
        np.testing.assert_allclose(wrong[pair] - right[pair], expected, rtol=1e-6)


@jax.jit
def _there_and_back(process, t):
    there = {kind: predictions.from_pair(process, kind, X0, EPS, t) for kind in predictions.KINDS}
    return {
        kind: predictions.convert(process, kind, "x0", there[kind], EPS, t)
        for kind in ("x0", "v", "velocity")
    }


@pytest.mark.parametrize("name", NO_SIGNAL_AT_END)
@pytest.mark.parametrize("kind", ["x0", "v", "velocity"])
def test_x0_survives_where_alpha_is_zero(name, kind):
    end = PROCESSES[name].t_max  # there x_t is eps
    np.testing.assert_allclose(_there_and_back(known(name, end), end)[kind], X0, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("noise", "x0", X0, X0, 0.5), "`source` must be one of x0, eps, v, score, velocity"),
        (("x0", "noise", X0, X0, 0.5), "`target` must be one of"),
        (("x0", "eps", X0[:2], X0, 0.5), "`value` must have the shape"),
        (("x0", "eps", X0, X0, jnp.ones(4)), "`t` must have shape"),
    ],
)
def test_bad_arguments_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        predictions.convert(PROCESSES["vp"], *arguments)
