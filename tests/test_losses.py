import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, PROCESSES

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


def batch(n):
    return {"x0": MIXTURE.sample(jax.random.key(7), n)}


@pytest.mark.parametrize("kind", predictions.KINDS)
@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_the_exact_denoiser_is_a_stationary_point(name, kind):
    process = PROCESSES[name]
    times = timesteps.draw_log_snr(-4.0, 4.0)
    loss_fn = losses.denoising(exact_network(process, kind), process, prediction=kind, times=times)
    slope = jax.vmap(jax.grad(lambda p, key, x: loss_fn(p, key, {"x0": x})[0].mean()), (None, 0, 0))
    keys, x0 = jax.random.split(KEY, 2000), batch(16000)["x0"].reshape(2000, 8, 2)
    slopes = jax.jit(slope)(jnp.asarray(1.0), keys, x0)
    z = float(slopes.mean() / (slopes.std() / np.sqrt(2000)))
    print(f"gradient at the exact denoiser: {z:.2f} standard errors from 0")
    assert abs(z) < 4
    away = jax.jit(slope)(jnp.asarray(1.3), keys, x0)
    assert away.mean() / (away.std() / np.sqrt(2000)) > 10


@pytest.mark.parametrize("kind", predictions.KINDS)
@pytest.mark.parametrize(
    "weighting",
    [weightings.min_snr(), weightings.edm(), weightings.likelihood()],
    ids=["min_snr", "edm", "likelihood"],
)
def test_a_weighting_means_the_same_loss_for_every_prediction(kind, weighting):
    def network(kind):
        def apply(params, x_t, t, cond=None, *, key=None):
            return predictions.convert(VP, "x0", kind, jnp.tanh(x_t), x_t, t)

        return apply

    values = [
        losses.denoising(network(k), VP, prediction=k, weighting=weighting)(0.0, KEY, batch(64))[0]
        for k in ("x0", kind)
    ]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-8)


def test_the_weightings_are_the_published_ones():
    t = jnp.linspace(0.01, 0.99, 9)
    snr = VP.alpha(t) ** 2 / VP.variance(t)
    on_eps = predictions.error_ratio(VP, "x0", "eps", t) ** 2
    np.testing.assert_allclose(on_eps, 1 / snr, rtol=1e-9)
    min_snr = weightings.min_snr(5.0)
    expected = jnp.minimum(snr, 5.0) / snr  # Hang et al. 2023: the weight of an eps loss
    np.testing.assert_allclose(min_snr.weight(VP, t) * on_eps, expected, rtol=1e-9)
    sigma = 1 / jnp.sqrt(snr)
    edm = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    np.testing.assert_allclose(weightings.edm(0.5).weight(VP, t), edm, rtol=1e-9)
    slope = jax.jvp(VP.log_snr, (t,), (jnp.ones_like(t),))[1]
    np.testing.assert_allclose(weightings.likelihood().weight(VP, t), -slope / 2, rtol=1e-9)


def test_simple_loss_is_the_mean_squared_error_of_what_it_is_on():
    loss_fn = losses.denoising(zeros, VP, prediction="eps")
    loss, metrics = loss_fn(0.0, KEY, batch(5))
    eps = numerics.normal(jax.random.split(KEY, 4)[1], batch(5)["x0"])
    np.testing.assert_allclose(loss, jnp.mean(eps**2, axis=1), rtol=1e-13)
    np.testing.assert_array_equal(metrics["loss"], loss)
    on_x0, _ = losses.denoising(zeros, VP, prediction="eps", loss_on="x0")(0.0, KEY, batch(5))
    t = timesteps.draw_stratified()(jax.random.split(KEY, 4)[0], VP, 5)
    np.testing.assert_allclose(on_x0, loss * VP.variance(t) / VP.alpha(t) ** 2, rtol=1e-10)


def test_an_example_has_the_same_noise_in_any_batch():
    times = timesteps.draw_uniform()  # stratified times depend on the size of the global batch
    loss_fn = losses.denoising(zeros, VP, times=times)
    large, _ = loss_fn(0.0, KEY, batch(64))
    small, _ = loss_fn(0.0, KEY, {"x0": batch(64)["x0"][:7]})
    np.testing.assert_allclose(large[:7], small, rtol=1e-13)


def test_conditioning_is_dropped_at_its_rate():
    def sees_label(params, x_t, t, cond=None, *, key=None):
        return jnp.zeros_like(x_t) + jnp.where(cond == 10, 1e6, 0.0)[:, None]

    labelled = {**batch(4000), "cond": jnp.zeros(4000, jnp.int32)}
    loss_fn = losses.denoising(sees_label, VP, drop_cond=0.2, null_cond=10)
    dropped = float((loss_fn(0.0, KEY, labelled)[0] > 1e6).mean())
    stderr = np.sqrt(0.2 * 0.8 / 4000)
    print(f"dropped {dropped:.3f}, expected 0.2 +- {stderr:.3f}")
    assert abs(dropped - 0.2) < 4 * stderr


def test_the_loss_stays_finite_for_eps_at_small_times_in_float32():
    x0 = batch(64)["x0"].astype(jnp.float32)
    for name in ("vp", "flow", "ddpm"):
        loss_fn = losses.denoising(
            zeros,
            jax.tree.map(jnp.float32, PROCESSES[name]),
            prediction="v",
            weighting=weightings.min_snr(),
            times=timesteps.draw_log_snr(-12.0, 40.0),
        )
        loss, _ = loss_fn(0.0, KEY, {"x0": x0})
        assert loss.dtype == jnp.float32
        assert jnp.isfinite(loss).all(), name


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
        narrow(0.0, KEY, batch(4))
    for make in (weightings.min_snr, weightings.edm):
        with pytest.raises(ValueError, match="must be positive"):
            make(0.0)
