"""Losses that differ from denoising by a constant only, where the exact score is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, PROCESSES, drawn, few

from jaxdiff import denoisers, losses, predictions, processes, timesteps

VP = processes.vp()
TIMES = timesteps.draw_log_snr(-3.0, 3.0)
NUM, ROWS = 3000, 8


def scores(process):
    return denoisers.to_score(process, MIXTURE.denoiser(process))


def network(process, kind):
    """Not the exact score: its parameters bend and shift it."""

    def apply(params, x_t, t, cond=None, *, key=None):
        x0_hat = jnp.tanh(params["scale"] * x_t) + params["shift"]
        return predictions.convert(process, "x0", kind, x0_hat, x_t, t)

    return apply


def factories(process, kind):
    apply, options = network(process, kind), {"prediction": kind, "times": TIMES}
    return {
        "denoising": losses.denoising(apply, process, **options),
        "explicit": losses.explicit(apply, process, scores(process), **options),
        "implicit": losses.implicit(apply, process, **options),
        "sliced": losses.sliced(apply, process, **options),
        "finite_difference": losses.finite_difference(apply, process, step=1e-3, **options),
    }


PARAMS = {"scale": jnp.array([[0.7, 1.2]]), "shift": jnp.array([[0.3, -0.2]])}


@functools.cache
def gradients(name, kind):
    """Return {loss: gradients (NUM, 4)}, a row a batch of 8."""
    process = PROCESSES[name]
    made = factories(process, kind)

    def flat(loss_fn, key, x0):
        # Forward mode: of few parameters, and half the program that reverse mode makes.
        grads = jax.jacfwd(lambda p: loss_fn(p, key, {"x0": x0})[0].mean())(PARAMS)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(grads)])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0))
    def evaluate(key, x0):
        return {loss: flat(loss_fn, key, x0) for loss, loss_fn in made.items()}

    keys = jax.random.split(jax.random.key(0), NUM)
    return jax.device_get(evaluate(keys, drawn(1, NUM * ROWS).reshape(NUM, ROWS, 2)))


@pytest.mark.parametrize("loss", ["explicit", "implicit", "sliced", "finite_difference"])
@pytest.mark.parametrize(
    ("name", "kind"), few([("vp", "score"), ("flow", "eps"), ("edm", "x0")], [("flow", "eps")])
)
def test_every_form_of_score_matching_has_the_gradient_of_denoising(name, kind, loss):
    found = gradients(name, kind)
    ours, denoising = found[loss], found["denoising"]
    spread = (ours - denoising).std(0) / np.sqrt(NUM)
    z = (ours - denoising).mean(0) / spread
    size = np.abs(denoising.mean(0)) / spread
    print(f"differences {z} standard errors of gradients {size} standard errors from 0")
    assert np.abs(z).max() < 4
    assert size.max() > 20


def test_explicit_is_zero_at_the_exact_score_and_implicit_is_minus_its_square():
    def exact(params, x_t, t, cond=None, *, key=None):
        return params * scores(VP)(x_t, t)

    options = {"times": timesteps.draw_at(0.3)}
    explicit = losses.explicit(exact, VP, scores(VP), **options)
    implicit = losses.implicit(exact, VP, **options)

    @jax.jit
    def evaluate(key, x0, eps):
        t = jnp.asarray(0.3)
        x_t = VP.alpha(t) * x0 + VP.sigma(t) * eps
        batch = {"x0": x0}
        return explicit(1.0, key, batch)[0], implicit(1.0, key, batch)[0], scores(VP)(x_t, t)

    eps = np.random.default_rng(4).normal(size=(4000, 2))
    found = evaluate(jax.random.key(3), drawn(2, 4000), eps)
    at_exact, minus, score = jax.device_get(found)
    np.testing.assert_array_equal(at_exact, 0.0)
    squares = np.mean(score**2, axis=1)
    stderr = np.hypot(minus.std(), squares.std()) / np.sqrt(4000)
    print(f"{minus.mean():.3f} against {-squares.mean():.3f} +- {stderr:.3f}")
    assert abs(minus.mean() + squares.mean()) < 4 * stderr


def test_without_noise_score_matching_is_that_of_the_data():
    def linear(params, x_t, t, cond=None, *, key=None):
        return -(x_t - params["mean"]) * params["precision"]

    params = {"mean": np.array([[0.3, 0.1]]), "precision": np.array([[2.0, 0.5]])}
    x0 = drawn(5, 6)

    @jax.jit
    def evaluate(params, key, batch):
        return [
            make(linear, VP, times=timesteps.draw_at(0.0))(params, key, batch)[0]
            for make in (losses.implicit, losses.sliced)
        ]

    implicit, sliced = evaluate(params, jax.random.key(6), {"x0": x0})
    score = -(x0 - params["mean"]) * params["precision"]
    expected = np.mean(score**2, axis=1) - np.sum(params["precision"])  # 2 / D tr J, D = 2
    np.testing.assert_allclose(implicit, expected, rtol=1e-12)
    np.testing.assert_allclose(sliced, expected, rtol=1e-12)  # J is diagonal: signs give its trace


def test_more_projections_come_closer_to_the_trace():
    def turning(params, x_t, t, cond=None, *, key=None):
        return x_t @ jnp.array([[1.0, 3.0], [-1.0, 0.5]]) * jnp.cos(x_t)

    @jax.jit
    def evaluate(key, batch):
        exact = losses.implicit(turning, VP, times=TIMES)(0.0, key, batch)[0]
        few, many = (
            losses.sliced(turning, VP, num_projections=num, times=TIMES)(0.0, key, batch)[0]
            for num in (1, 16)
        )
        return jnp.std(few - exact), jnp.std(many - exact)

    errors = jax.device_get(evaluate(jax.random.key(8), {"x0": drawn(7, 200)}))
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.4)


def test_finite_differences_err_by_the_square_of_their_step():
    apply = network(VP, "score")
    options = {"times": TIMES, "num_projections": 2}

    @jax.jit
    def evaluate(key, batch):
        exact = losses.sliced(apply, VP, **options)(PARAMS, key, batch)[0]
        found = (
            losses.finite_difference(apply, VP, step=h, **options)(PARAMS, key, batch)[0]
            for h in (0.02, 0.01)
        )
        return [jnp.abs(each - exact).max() for each in found]

    errors = jax.device_get(evaluate(jax.random.key(1), {"x0": drawn(9, 64)}))
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("loss", few(["sliced", "finite_difference"], ["sliced"]))
def test_an_example_has_the_same_projections_in_any_batch(loss):
    make = getattr(losses, loss)
    loss_fn = make(network(VP, "score"), VP, times=timesteps.draw_uniform(), num_projections=3)

    @jax.jit
    def evaluate(key, x0):
        return [loss_fn(PARAMS, key, {"x0": rows})[0] for rows in (x0, x0[:5])]

    large, small = evaluate(jax.random.key(1), drawn(9, 16))
    np.testing.assert_allclose(large[:5], small, rtol=1e-10)


def test_bad_options_are_refused():
    apply = network(VP, "score")
    with pytest.raises(ValueError, match="`num_projections`"):
        losses.sliced(apply, VP, num_projections=0)
    with pytest.raises(ValueError, match="`step`"):
        losses.finite_difference(apply, VP, step=0.0)
    with pytest.raises(ValueError, match="`prediction`"):
        losses.implicit(apply, VP, prediction="noise")
    with pytest.raises(ValueError, match="`t` must be"):
        timesteps.draw_at(-1.0)
    wide = losses.implicit(lambda p, x, t, c=None, *, key=None: x[:, :1], VP)
    with pytest.raises(ValueError, match="`apply` must return the shape of x0"):
        jax.eval_shape(wide, 0.0, jax.random.key(0), {"x0": np.zeros((3, 2))})
