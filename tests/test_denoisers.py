import equinox
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, NO_SIGNAL_AT_END, PROCESSES, known

from jaxdiff import denoisers, predictions, processes
from jaxdiff.predictions import KINDS

X_T = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
VP = processes.vp()


@jax.jit
def _knows_v(process, t):
    exact = MIXTURE.denoiser(process)
    expected = predictions.convert(process, "x0", "v", exact(X_T, t), X_T, t)

    def network(kind):
        return lambda x_t, t: predictions.convert(process, "x0", kind, exact(x_t, t), x_t, t)

    made = {kind: denoisers.from_network(network(kind), process, kind) for kind in KINDS}
    made["edm"] = denoisers.edm_preconditioned(lambda x, c: jnp.sin(x), process, 0.4)
    x0_hat = made["edm"](X_T, t)
    edm = predictions.convert(process, "x0", "v", x0_hat, X_T, t)
    found = {kind: one.v(X_T, t) for kind, one in made.items()}
    return {**dict.fromkeys(KINDS, expected), "edm": edm}, found


@pytest.mark.parametrize("kind", [*KINDS, "edm"])
@pytest.mark.parametrize("name", ["vp", "flow", "edm", "zero_snr"])
def test_the_v_of_a_denoiser_is_that_of_its_x0(name, kind):
    t = 0.4 * PROCESSES[name].t_max
    expected, found = _knows_v(known(name, t), t)
    np.testing.assert_allclose(found[kind], expected[kind], rtol=1e-7, atol=1e-9)


@jax.jit
def _denoise_all(process, t):
    """The exact denoiser, and networks of all kinds that know it, made into denoisers."""
    exact = MIXTURE.denoiser(process)

    def denoise(kind, t):
        def network(x_t, t):
            return predictions.convert(process, "x0", kind, exact(x_t, t), x_t, t)

        return denoisers.from_network(network, process, kind)(X_T, t)

    denoised = {kind: (denoise(kind, t), denoise(kind, jnp.full(4, t))) for kind in KINDS}
    return exact(X_T, t), denoised


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vp", "flow", "edm", "zero_snr"])
def test_a_network_of_any_kind_gives_the_exact_denoiser(name, kind):
    t = 0.4 * PROCESSES[name].t_max
    exact, denoised = _denoise_all(known(name, t), t)
    one_time, rows = denoised[kind]
    np.testing.assert_allclose(one_time, exact, rtol=1e-8)
    np.testing.assert_allclose(rows, exact, rtol=1e-8)


def test_edm_preconditioning_is_the_published_one():
    process, sigma_data = processes.edm(), 0.5

    def network(x, c_noise):
        return jnp.sin(x) + c_noise

    x_t, sigma = np.asarray(X_T), 1.7
    total = sigma**2 + sigma_data**2
    expected = sigma_data**2 / total * x_t + sigma * sigma_data / np.sqrt(total) * (
        np.sin(x_t / np.sqrt(total)) + np.log(sigma) / 4
    )

    @jax.jit
    def denoise(process, log_snr):
        t = process.time_of_log_snr(log_snr)
        denoise = denoisers.edm_preconditioned(network, process, sigma_data)
        return denoise(process.alpha(t) * X_T, t)

    np.testing.assert_allclose(denoise(process, -2 * np.log(sigma)), expected, rtol=1e-13)
    # Any process at the same noise level is the same denoiser of x_t / alpha.
    np.testing.assert_allclose(denoise(VP, -2 * np.log(sigma)), expected, rtol=1e-10)


def test_clip_limits_x0():
    denoise = denoisers.from_network(lambda x, t: 5.0 * x, VP, "x0", clip=1.0)
    assert jnp.abs(denoise(X_T, 0.5)).max() == 1.0


def test_a_bfloat16_network_leaves_float32():
    x_t = X_T.astype(jnp.float32)
    for denoise in (
        denoisers.from_network(lambda x, t: x.astype(jnp.bfloat16), VP, "v"),
        denoisers.edm_preconditioned(lambda x, t: x.astype(jnp.bfloat16), VP),
    ):
        assert jax.eval_shape(denoise, x_t, jnp.float32(0.5)).dtype == jnp.float32


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, t):
        return flax.linen.Dense(2)(x) * jnp.reshape(t, (-1, 1))


class Equinox(equinox.Module):
    weight: jax.Array

    def __call__(self, x, t):
        return x @ self.weight * jnp.reshape(t, (-1, 1))


def test_the_score_of_a_network_of_noise_keeps_its_digits():
    """sigma = 1e-3: alpha x0_hat - x_t would be the rounding of x_t."""
    flow = processes.flow()
    denoise = denoisers.from_network(lambda x, t: jnp.sin(x), flow, "eps")
    x_t, t = X_T.astype(jnp.float32), jnp.float32(1e-3)
    score = denoisers.to_score(flow, denoise)(x_t, t)
    np.testing.assert_allclose(score, -np.sin(np.asarray(x_t, np.float64)) / 1e-3, rtol=1e-5)


def test_linen_equinox_and_plain_functions_are_networks():
    module = Linen()
    variables = module.init(jax.random.key(0), X_T, jnp.ones(4))
    networks = [
        lambda x, t: module.apply(variables, x, t),
        Equinox(jnp.eye(2)),
        lambda x, t: x,
    ]
    for network in networks:
        x0_hat = jax.jit(denoisers.from_network(network, VP, "v"))(X_T, jnp.asarray(0.5))
        assert x0_hat.shape == X_T.shape


@pytest.mark.parametrize("name", NO_SIGNAL_AT_END)
@pytest.mark.parametrize("kind", ["eps", "score"])
def test_kinds_without_x0_are_refused_where_alpha_is_zero(name, kind):
    denoise = denoisers.from_network(lambda x, t: x, PROCESSES[name], kind)
    with pytest.raises(ValueError, match=f"alpha is 0 for a network that predicts {kind}"):
        denoise(X_T, PROCESSES[name].t_max)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: denoisers.from_network(lambda x, t: x, VP, "noise"), "`prediction`"),
        (lambda: denoisers.from_network(lambda x, t: x, VP, clip=-1.0), "`clip`"),
        (lambda: denoisers.from_network(lambda x, t: x[:2], VP)(X_T, 0.5), "`network` must return"),
        (lambda: denoisers.edm_preconditioned(lambda x, t: x, VP, 0.0), "`sigma_data`"),
        (lambda: denoisers.edm_preconditioned(lambda x, t: x[:2], VP)(X_T, 0.5), "`network`"),
    ],
)
def test_bad_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: denoisers.from_network(None, VP), "`network` must be a function"),
        (lambda: denoisers.from_network(jnp.multiply, processes.vp), r"Call it: vp\(\)"),
        (lambda: denoisers.from_network(jnp.multiply, VP, clip="1"), "`clip` must be a real num"),
        (lambda: denoisers.from_network(lambda x, t: (x, x), VP)(X_T, 0.5), "`network` must ret"),
        (lambda: denoisers.to_score(jnp.multiply, VP), "`process` must be a process"),
        (lambda: denoisers.to_score(VP, MIXTURE), "`denoise` must be a function"),
    ],
)
def test_what_is_no_network_or_process_is_refused(call, match):
    with pytest.raises(TypeError, match=match):
        call()
