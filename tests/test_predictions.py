import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NO_SIGNAL_AT_END, PROCESSES

from jaxdiff import forward, predictions

each_process = pytest.mark.parametrize("name", PROCESSES)
X0 = jax.random.normal(jax.random.key(0), (5, 3))


def example(process):
    t = process.t_max * jnp.array([1e-3, 0.1, 0.4, 0.7, 0.99])
    x_t, eps = forward.perturb(jax.random.key(1), process, X0, t)
    return t, x_t, eps


@each_process
def test_every_kind_converts_to_every_other(name):
    process = PROCESSES[name]
    t, x_t, eps = example(process)

    @jax.jit
    def convert_all(process):
        truth = {
            kind: predictions.from_pair(process, kind, X0, eps, t) for kind in predictions.KINDS
        }
        return truth, {
            (source, target): predictions.convert(process, source, target, truth[source], x_t, t)
            for source, target in itertools.product(predictions.KINDS, repeat=2)
        }

    truth, converted = convert_all(process)
    for (_, target), value in converted.items():
        # x0 from eps loses sigma / alpha, 5e4 at worst here, of double precision
        np.testing.assert_allclose(value, truth[target], rtol=1e-8, atol=1e-8)


@each_process
def test_the_definitions_are_the_published_ones(name):
    process = PROCESSES[name]
    t, _, eps = example(process)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    v = predictions.from_pair(process, "v", X0, eps, t)
    np.testing.assert_allclose(v, alpha * eps - sigma * X0, rtol=1e-13)
    score = predictions.from_pair(process, "score", X0, eps, t)
    np.testing.assert_allclose(score, -eps / sigma, rtol=1e-13)

    def path(t):
        mean, std = forward.marginal(process, X0, t)
        return mean + std * eps

    velocity = predictions.from_pair(process, "velocity", X0, eps, t)
    np.testing.assert_allclose(velocity, jax.jvp(path, (t,), (jnp.ones(5),))[1], rtol=1e-10)


@each_process
def test_an_error_converts_by_its_ratio(name):
    process = PROCESSES[name]
    t, x_t, eps = example(process)
    for source, target in itertools.product(predictions.KINDS, repeat=2):
        truth = predictions.from_pair(process, source, X0, eps, t)
        wrong = predictions.convert(process, source, target, truth + 0.1, x_t, t)
        right = predictions.convert(process, source, target, truth, x_t, t)
        ratio = predictions.error_ratio(process, target, source, t)[:, None]
        np.testing.assert_allclose(wrong - right, 0.1 * jnp.broadcast_to(ratio, (5, 3)), rtol=1e-6)


@pytest.mark.parametrize("name", NO_SIGNAL_AT_END)
@pytest.mark.parametrize("kind", ["x0", "v", "velocity"])
def test_x0_survives_where_alpha_is_zero(name, kind):
    process = PROCESSES[name]
    x_t = jax.random.normal(jax.random.key(1), X0.shape)
    end = jnp.asarray(process.t_max)
    value = predictions.from_pair(process, kind, X0, x_t, end)
    x0 = predictions.convert(process, kind, "x0", value, x_t, end)
    np.testing.assert_allclose(x0, X0, rtol=1e-12)


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
