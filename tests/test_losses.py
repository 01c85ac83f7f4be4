import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, PROCESSES, drawn

from jaxdiff import losses, numerics, predictions, processes, timesteps, weightings

KEY = jax.random.key(0)
VP = processes.vp()


def exact_network(process, kind):
    """A network whose parameters are a factor on the exact prediction."""
    exact = MIXTURE.denoiser(process)

    def apply(params, x_t, t, cond=None, *, key=None):
        return params * predictions.convert(process, "x0", kind, exact(x_t, t), x_t, t)

    return apply


def zeros(params, x_t, t, cond=None, *, key=None):
    return jnp.zeros_like(x_t) + params


@functools.cache
def data():
    return drawn(7, 16000)


def batch(n):
    return {"x0": data()[:n]}


@functools.cache
def slopes(name):
    """Return the slopes of all kinds of loss, 2000 batches of 8, as a function of the factor."""
    process = PROCESSES[name]
    times = timesteps.draw_log_snr(-4.0, 4.0)
    loss_fns = {
        kind: losses.denoising(exact_network(process, kind), process, prediction=kind, times=times)
        for kind in predictions.KINDS
    }

    def all_losses(factor, key, x0):
        return {
            kind: loss_fn(factor, key, {"x0": x0})[0].mean() for kind, loss_fn in loss_fns.items()
        }

    slope = jax.jit(jax.vmap(jax.jacfwd(all_losses), (None, 0, 0)))
    keys, x0 = jax.random.split(KEY, 2000), data().reshape(2000, 8, 2)
    return {factor: jax.device_get(slope(factor, keys, x0)) for factor in (1.0, 1.3)}


@pytest.mark.parametrize("kind", predictions.KINDS)
@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_the_exact_denoiser_is_a_stationary_point(name, kind):
    at_exact, away = slopes(name)[1.0][kind], slopes(name)[1.3][kind]
    z = float(at_exact.mean() / (at_exact.std() / np.sqrt(2000)))
    print(f"gradient at the exact denoiser: {z:.2f} standard errors from 0")
    assert abs(z) < 4
    assert away.mean() / (away.std() / np.sqrt(2000)) > 10


WEIGHTINGS = {
    "min_snr": weightings.min_snr(),
    "edm": weightings.edm(),
    "likelihood": weightings.likelihood(),
}


@functools.cache
def weighted_losses():
    """Return {(weighting, kind): loss (B,)} of one denoiser, seen as networks of all kinds."""

    def network(kind):
        def apply(params, x_t, t, cond=None, *, key=None):
            return predictions.convert(VP, "x0", kind, jnp.tanh(x_t), x_t, t)

        return apply

    @jax.jit
    def evaluate(batch):
        return {
            (name, kind): losses.denoising(network(kind), VP, prediction=kind, weighting=weighting)(
                0.0, KEY, batch
            )[0]
            for name, weighting in WEIGHTINGS.items()
            for kind in predictions.KINDS
        }

    return evaluate(batch(64))


@pytest.mark.parametrize("kind", predictions.KINDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_weighting_means_the_same_loss_for_every_prediction(kind, weighting):
    values = weighted_losses()
    np.testing.assert_allclose(values[weighting, kind], values[weighting, "x0"], rtol=1e-8)


def test_the_weightings_are_the_published_ones():
    t = np.linspace(0.01, 0.99, 9)

    @jax.jit
    def evaluate(t):
        slope = jax.jvp(VP.log_snr, (t,), (jnp.ones_like(t),))[1]
        on_eps = predictions.error_ratio(VP, "x0", "eps", t) ** 2
        weights = (
            weightings.min_snr(5.0).weight(VP, t) * on_eps,
            weightings.edm(0.5).weight(VP, t),
            weightings.likelihood().weight(VP, t),
        )
        return VP.alpha(t) ** 2 / VP.variance(t), on_eps, slope, weights

    snr, on_eps, slope, (min_snr, edm, likelihood) = jax.device_get(evaluate(t))
    np.testing.assert_allclose(on_eps, 1 / snr, rtol=1e-9)
    # Hang et al. 2023: the weight of an eps loss
    np.testing.assert_allclose(min_snr, np.minimum(snr, 5.0) / snr, rtol=1e-9)
    np.testing.assert_allclose(edm, (1 / snr + 0.25) / (0.25 / snr), rtol=1e-9)
    np.testing.assert_allclose(likelihood, -slope / 2, rtol=1e-9)


def test_simple_loss_is_the_mean_squared_error_of_what_it_is_on():
    @jax.jit
    def evaluate(batch):
        loss, metrics = losses.denoising(zeros, VP, prediction="eps")(0.0, KEY, batch)
        on_x0, _ = losses.denoising(zeros, VP, prediction="eps", loss_on="x0")(0.0, KEY, batch)
        key_time, key_eps = jax.random.split(KEY, 4)[:2]
        t = timesteps.draw_stratified()(key_time, VP, 5)
        snr = VP.alpha(t) ** 2 / VP.variance(t)
        return loss, metrics, on_x0, numerics.normal(key_eps, batch["x0"]), snr

    loss, metrics, on_x0, eps, snr = jax.device_get(evaluate(batch(5)))
    np.testing.assert_allclose(loss, np.mean(eps**2, axis=1), rtol=1e-13)
    np.testing.assert_array_equal(metrics["loss"], loss)
    np.testing.assert_array_equal(metrics["squared_error"], loss)
    np.testing.assert_allclose(on_x0, loss / snr, rtol=1e-10)


def test_an_example_has_the_same_noise_in_any_batch():
    times = timesteps.draw_uniform()  # stratified times depend on the size of the global batch
    loss_fn = jax.jit(losses.denoising(zeros, VP, times=times))
    large, _ = loss_fn(0.0, KEY, batch(64))
    small, _ = loss_fn(0.0, KEY, batch(7))
    np.testing.assert_allclose(large[:7], small, rtol=1e-13)


def test_conditioning_is_dropped_at_its_rate():
    def sees_label(params, x_t, t, cond=None, *, key=None):
        return jnp.zeros_like(x_t) + jnp.where(cond == 10, 1e6, 0.0)[:, None]

    labelled = {**batch(4000), "cond": jnp.zeros(4000, jnp.int32)}
    loss_fn = jax.jit(losses.denoising(sees_label, VP, drop_cond=0.2, null_cond=10))
    dropped = float((loss_fn(0.0, KEY, labelled)[0] > 1e6).mean())
    stderr = np.sqrt(0.2 * 0.8 / 4000)
    print(f"dropped {dropped:.3f}, expected 0.2 +- {stderr:.3f}")
    assert abs(dropped - 0.2) < 4 * stderr


def test_the_loss_stays_finite_for_eps_at_small_times_in_float32():
    @jax.jit
    def evaluate(process, x0):
        loss_fn = losses.denoising(
            zeros,
            process,
            prediction="v",
            weighting=weightings.min_snr(),
            times=timesteps.draw_log_snr(-12.0, 40.0),
        )
        return loss_fn(0.0, KEY, {"x0": x0})[0]

    for name in ("vp", "flow", "ddpm"):
        process = jax.tree.map(jnp.float32, PROCESSES[name])
        loss = evaluate(process, batch(64)["x0"].astype(np.float32))
        assert loss.dtype == jnp.float32
        assert np.isfinite(loss).all(), name


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prediction": "noise"}, "`prediction`"),
        ({"loss_on": "noise"}, "`loss_on`"),
        ({"drop_cond": 1.5, "null_cond": 0}, "`drop_cond`"),
        ({"drop_cond": 0.1}, "`null_cond`"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        losses.denoising(zeros, VP, **options)


def test_bad_batches_and_networks_are_refused():
    loss_fn = losses.denoising(zeros, VP)
    with pytest.raises(TypeError, match="`x0` must hold floating-point"):
        loss_fn(0.0, KEY, {"x0": jnp.zeros((4, 2), jnp.uint8)})
    narrow = losses.denoising(lambda p, x, t, c=None, *, key=None: x[:, :1], VP)
    with pytest.raises(ValueError, match="`apply` must return the shape of x0"):
        jax.eval_shape(narrow, 0.0, KEY, batch(4))
    for make in (weightings.min_snr, weightings.edm):
        with pytest.raises(ValueError, match="must be positive"):
            make(0.0)
