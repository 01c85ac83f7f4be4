"""One noun for training and sampling, and EDM's preconditioning of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES

from jaxdiff import Model, denoisers, losses, predictions, processes, timesteps, weightings

KEY = jax.random.key(0)
VP = processes.vp()
X0 = 0.4 * np.random.default_rng(0).normal(size=(64, 2))
PARAMS = jnp.asarray(0.7)
SIGMA_DATA = 0.4
each_process = pytest.mark.parametrize("name", ["vp", "flow", "edm"])
each_kind = pytest.mark.parametrize("kind", ["x0", "v"])


def apply(params, x, level, cond=None, *, key=None):
    level = jnp.reshape(level, (-1, 1))
    return jnp.sin(params * x) + 0.1 * level + (0.0 if cond is None else cond[:, None])


def model_of(process, kind, network=apply, **options):
    made = denoisers.preconditioned(network, process, SIGMA_DATA, prediction=kind, **options)
    return Model(made, process, kind)


@each_process
@each_kind
def test_a_preconditioned_model_is_the_preconditioned_denoiser(name, kind):
    process = PROCESSES[name]
    published = denoisers.edm_preconditioned(lambda x, c: apply(PARAMS, x, c), process, SIGMA_DATA)
    made = model_of(process, kind).denoiser(PARAMS)
    t = 0.4 * process.t_max
    for times in (jnp.asarray(t), jnp.linspace(0.1, 1.0, 64) * t):
        for of in ("__call__", "v"):
            expected, found = (getattr(one, of)(X0, times) for one in (published, made))
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_its_scales_are_those_of_table_1():
    """c_skip, c_out, c_in and c_noise of Karras et al. 2022, on their own process."""
    edm, d = processes.edm(), SIGMA_DATA
    for sigma in (0.01, 0.4, 7.0):
        total = sigma**2 + d**2
        seen = {}

        def network(value, seen=seen):
            def raw(params, x, level, cond=None, *, key=None):
                seen.update(x=x, level=level)
                return jnp.full_like(x, value)

            return model_of(edm, "x0", raw).denoiser(None)

        skipped = network(0.0)(X0, sigma)
        np.testing.assert_allclose(skipped, d**2 / total * X0, rtol=1e-12)
        out = network(1.0)(X0, sigma) - skipped
        np.testing.assert_allclose(out, sigma * d / np.sqrt(total), rtol=1e-9)
        np.testing.assert_allclose(seen["x"], X0 / np.sqrt(total), rtol=1e-12)
        np.testing.assert_allclose(seen["level"], np.log(sigma) / 4, rtol=1e-12)


@each_process
@each_kind
def test_the_loss_is_the_raw_network_s_own_squared_error_and_what_is_sampled(name, kind):
    """Karras et al. 2022, eq. 8: weight 1, a target of variance 1; what is trained is sampled."""
    process, d, seen = PROCESSES[name], SIGMA_DATA, {}

    def spy(params, x, level, cond=None, *, key=None):
        seen.update(x=x, level=level, output=apply(params, x, level))
        return seen["output"]

    x0 = d * np.random.default_rng(1).normal(size=(4096, 2))
    model = model_of(process, kind, spy)
    loss_fn = losses.denoising(
        model, weighting=weightings.edm(d), times=timesteps.draw_log_normal()
    )
    loss, metrics = loss_fn(PARAMS, KEY, {"x0": x0})
    seen = {name: np.asarray(value) for name, value in seen.items()}
    x, raw, sigma = seen["x"], seen["output"], np.exp(4 * seen["level"])[:, None]  # over alpha
    total = sigma**2 + d**2
    y = x * np.sqrt(total)  # x_t / alpha
    target = (x0 - d**2 / total * y) / (sigma * d / np.sqrt(total))
    np.testing.assert_allclose(loss, ((raw - target) ** 2).mean(1), rtol=1e-7)
    deviation = (target**2).mean(1)
    z = (deviation.mean() - 1) / (deviation.std() / np.sqrt(len(x0)))
    print(f"{float(z):.2f} standard errors from variance 1")
    assert abs(z) < 4

    t = process.time_of_log_snr(-8 * seen["level"])
    x_t = process.alpha(t)[:, None] * y
    x0_hat = model.denoiser(PARAMS)(x_t, t)
    ratio = predictions.error_ratio(process, kind, "x0", t) ** 2
    expected = ratio * ((x0_hat - x0) ** 2).mean(1)
    np.testing.assert_allclose(metrics["squared_error"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("noise_level", "expected"),
    [("edm", -1 / 8), ("log_snr", 1.0), (lambda log_snr: 3.0 * log_snr, 3.0)],
)
def test_the_network_sees_the_noise_level_that_is_asked_for(noise_level, expected):
    def raw(params, x, level, cond=None, *, key=None):
        return jnp.broadcast_to(jnp.reshape(level, (-1, 1)), x.shape)

    zero = model_of(VP, "x0", lambda params, x, *_, key=None: 0.0 * x).denoiser(None)
    made = model_of(VP, "x0", raw, noise_level=noise_level).denoiser(None)

    @jax.jit
    def level_of(log_snr, x):
        t = VP.time_of_log_snr(log_snr)
        alpha, sigma = VP.alpha(t), VP.sigma(t)
        out = sigma * SIGMA_DATA / jnp.sqrt(sigma**2 + (alpha * SIGMA_DATA) ** 2)
        return (made(x, t) - zero(x, t))[:, 0] / out

    log_snr = np.asarray([-3.0, 0.0, 2.0])
    level = level_of(log_snr, X0[:3])
    np.testing.assert_allclose(level, expected * log_snr, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", predictions.KINDS)
def test_a_model_gives_the_denoiser_of_its_network_and_conditioning(kind):
    model, cond, t = Model(apply, VP, kind), jnp.arange(64.0), jnp.asarray(0.3)
    expected = denoisers.from_network(lambda x, t: apply(PARAMS, x, t, cond), VP, kind)(X0, t)
    np.testing.assert_array_equal(model.denoiser(PARAMS, cond)(X0, t), expected)
    later = denoisers.conditioned(model.denoiser(PARAMS), cond)
    np.testing.assert_array_equal(later(X0, t), expected)
    v = model.denoiser(PARAMS, cond).v(X0, t)
    np.testing.assert_array_equal(later.v(X0, t), v)
    assert model.needs_signal == (kind in ("eps", "score"))
    assert (later.needs_signal is not None) == model.needs_signal
    assert jnp.abs(model.denoiser(PARAMS, cond, clip=0.1)(X0, t)).max() <= 0.1


def test_a_denoiser_without_conditioning_stays_as_it_is():
    def denoise(x_t, t):
        return x_t

    assert denoisers.conditioned(denoise, None) is denoise
    with pytest.raises(TypeError, match="`denoise` must be a function .x_t, t, cond"):
        denoisers.conditioned(denoise, X0)


LOSSES = {
    "denoising": (losses.denoising, {"loss_on": "eps"}),
    "flow_matching": (losses.flow_matching, {}),
    "explicit": (losses.explicit, {"score": lambda x_t, t: -x_t}),
    "implicit": (losses.implicit, {}),
    "sliced": (losses.sliced, {}),
    "finite_difference": (losses.finite_difference, {}),
    "elbo": (losses.elbo, {"t_min": 0.1}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_take_a_model_or_its_parts_and_not_both(name):
    make, options = LOSSES[name]
    whole = make(Model(apply, VP, "v"), **options)
    parts = make(apply, VP, prediction="v", **options)
    found, expected = jax.jit(
        lambda batch: [loss_fn(PARAMS, KEY, batch)[0] for loss_fn in (whole, parts)]
    )({"x0": X0[:4]})
    np.testing.assert_array_equal(found, expected)
    for argument, value in (("process", VP), ("prediction", "v")):
        with pytest.raises(ValueError, match=f"`{argument}` must not be given beside a Model"):
            make(Model(apply, VP), **options, **{argument: value})
    if name != "flow_matching":
        with pytest.raises(TypeError, match="`process` must be given with a network"):
            make(apply, **options)


def taking(time):
    def network(params, x, t, cond=None, *, key=None):
        return x

    network.time = time
    return network


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: denoisers.preconditioned(apply, VP, prediction="eps"), "`prediction` must be one"),
        (lambda: denoisers.preconditioned(apply, VP, 0.0), "`sigma_data` must be positive"),
        (lambda: denoisers.preconditioned(apply, VP, noise_level="t"), "`noise_level` must be one"),
        (lambda: denoisers.preconditioned(taking("t"), VP), "before it went through on_log_snr"),
        (lambda: denoisers.preconditioned(taking("log_snr"), VP), 'give `noise_level="log_snr"`'),
        (lambda: denoisers.preconditioned(taking("step"), VP), "takes steps .* a function from"),
        (
            lambda: denoisers.preconditioned(taking("step"), VP, noise_level="log_snr"),
            "takes steps .* got 'log_snr'",
        ),
        (
            lambda: model_of(VP, "x0", lambda params, x, *_, key=None: x[:2]).denoiser(None)(X0, 1),
            "`apply` must return the shape",
        ),
    ],
)
def test_what_cannot_be_preconditioned_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_preconditioned_network_of_log_snr_takes_times():
    made = denoisers.preconditioned(taking("log_snr"), VP, noise_level="log_snr")
    assert made.time == "t"
    losses.denoising(Model(made, VP, "x0"))  # which refuses networks of log-SNR


def test_a_preconditioned_network_of_steps_sees_what_a_function_makes_of_log_snr():
    chain = processes.ddpm(100)

    def step(log_snr):
        return chain.time_of_log_snr(log_snr) * 100 - 1

    def raw(params, x, n, cond=None, *, key=None):
        return jnp.full_like(x, n)

    raw.time = "step"
    made = denoisers.preconditioned(raw, chain, noise_level=step)
    one = jnp.ones((1, 1))
    known = denoisers.preconditioned(lambda *_, key=None: one, chain)
    zero = denoisers.preconditioned(lambda *_, key=None: 0 * one, chain)
    t = jnp.asarray(0.3)
    outer = known(None, one, t) - zero(None, one, t)
    np.testing.assert_allclose((made(None, one, t) - zero(None, one, t)) / outer, 29, rtol=1e-9)
