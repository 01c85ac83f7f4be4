"""What a sampler says of itself: where it may start, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, NO_SIGNAL_AT_END, PROCESSES
from sampler_cases import DIVIDES_BY_ALPHA, SAMPLERS, STOCHASTIC

from experiments.common.methods import METHODS
from jaxdiff import denoisers, processes, sample, samplers, timesteps

VP = processes.vp()
KEY = jax.random.key(0)
GRIDS = {
    "to data": [1.0, 0.7, 0.4, 0.0],
    "to noise": [1.0, 0.7, 0.4, 0.1],
    "standing": [1.0, 0.7, 0.7, 0.4, 0.0, 0.0],
}


def made(name, denoise=MIXTURE.denoiser(VP), process=VP):  # noqa: B008
    return SAMPLERS[name](process, denoise)


@pytest.mark.parametrize(
    "name",
    [
        "ddim",
        "heun",
        "edm",
        "edm_churn",
        "unipc_3",
        "deis_3",
        "dpm_solver_pp_sde",
        "ddim_corrected",
    ],
)
def test_calls_are_those_that_were_made(name):
    count = [0]

    def counted(x_t, t):
        def host(x):
            count[0] += 1
            return 0.5 * np.asarray(x)

        return jax.pure_callback(host, jax.ShapeDtypeStruct(x_t.shape, x_t.dtype), x_t)

    sampler = made(name, counted)
    run = jax.jit(lambda ts: sample(KEY, sampler, jnp.ones((2, 2)), ts))
    longest = max(map(len, GRIDS.values()))
    for ts in GRIDS.values():
        ts = jnp.asarray([1.0] * (longest - len(ts)) + ts)  # one program
        count[0] = 0
        jax.block_until_ready(run(ts))
        assert samplers.count_calls(sampler, ts) == count[0], ts


def test_calls_are_the_methods_own():
    ts = timesteps.uniform(VP, 6)
    found = {name: samplers.count_calls(made(name), ts) for name in SAMPLERS}
    assert found.pop("adaptive") is None
    twice = {"heun": 11, "edm": 11, "edm_churn": 11, "ddim_corrected": 11, "unipc_corrected": 11}
    assert found == dict.fromkeys(found, 6) | twice
    with pytest.raises(TypeError, match="`sampler` must be a Sampler"):
        samplers.count_calls(samplers.ddim, ts)


def test_nothing_is_said_by_samplers_that_know_nothing():
    mine = samplers.Sampler(lambda x: x, lambda key, x, t, s: x)
    assert samplers.count_calls(mine, timesteps.uniform(VP, 2)) is None
    assert mine.info(jnp.ones(2)) == {}
    assert not mine.needs_signal
    assert made("ddim").info(jnp.ones((2, 2))) == {}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_says_whether_it_needs_signal(name):
    assert made(name).needs_signal == (name in DIVIDES_BY_ALPHA)
    eps = denoisers.from_network(lambda x, t: x, VP, "eps")
    assert made(name, eps).needs_signal
    assert made(name).deterministic == (name not in STOCHASTIC)


@pytest.mark.parametrize("name", PROCESSES)
def test_what_needs_signal_starts_at_the_last_time_with_some(name):
    process = PROCESSES[name]
    assert timesteps.start(process, False) is process.t_max
    start = timesteps.start(process, True)
    if name not in NO_SIGNAL_AT_END:
        assert start is process.t_max
        return
    np.testing.assert_allclose(process.log_snr(jnp.asarray(start)), timesteps.SIGNAL_START)
    made("edm", process=process).check(timesteps.uniform(process, 2, t_start=start))


def test_the_start_of_a_traced_process_is_known_when_it_runs():
    start = jax.jit(lambda process: timesteps.start(process, True))
    assert start(VP) == 1.0
    shifted = processes.cosine(-2.0)
    np.testing.assert_allclose(start(shifted), timesteps.start(shifted, True), rtol=1e-12)
    with pytest.raises(TypeError, match="`process` must be a process"):
        timesteps.start(processes.vp, True)


def test_methods_by_name_say_what_their_samplers_say():
    flow = PROCESSES["flow"]
    for name, method in METHODS.items():
        assert method.needs_signal == (name in (*DIVIDES_BY_ALPHA, "euler_maruyama")), name
        assert method.start(flow) == (1.0 if not method.needs_signal else timesteps.start(flow, 1))
        assert method.start(flow, needs_signal=True) < 1.0
        assert method.deterministic == (method.order is not None or name == "adaptive"), name
    assert METHODS["heun"].calls(5) == 9
    assert METHODS["heun"].calls(5, to_data=False) == 10
    assert METHODS["predictor_corrector"].calls(5) == 9
    assert METHODS["ddim"].calls(5) == 5
    assert METHODS["adaptive"].calls(5) is None
