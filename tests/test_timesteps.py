import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NO_SIGNAL_AT_END, PROCESSES, chosen
from scipy import stats

from jaxdiff import processes, rows, timesteps

each_process = pytest.mark.parametrize("name", PROCESSES)
KEY = jax.random.key(0)


EVEN = (timesteps.uniform, timesteps.quadratic, timesteps.flow_shift)
MAKERS = {make.__name__: make for make in EVEN}
MAKERS["log_snr"] = timesteps.log_snr


@jax.jit
def _grids(process):
    grids = {
        (maker, num_steps): make(process, num_steps, t_end=1e-3)
        for maker, make in MAKERS.items()
        for num_steps in (1, 2, 17)
    }
    return grids, process.log_snr(timesteps.log_snr(process, 20))


@functools.cache
def grids(name):
    """Return {(maker, num_steps): times} and the log-SNRs of `timesteps.log_snr`, 20 steps."""
    return jax.device_get(_grids(chosen(name)))


@each_process
@pytest.mark.parametrize("num_steps", [1, 2, 17])
@pytest.mark.parametrize("maker", MAKERS)
def test_grids_fall_from_t_max_to_t_end(name, num_steps, maker):
    ts = grids(name)[0][maker, num_steps]
    assert ts.shape == (num_steps + 1,)
    assert ts[0] == PROCESSES[name].t_max
    assert ts[-1] == 1e-3
    assert (np.diff(ts) < 0).all()


def test_uniform_and_quadratic_are_what_they_say():
    process = processes.vp()
    np.testing.assert_allclose(timesteps.uniform(process, 4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(timesteps.quadratic(process, 2), [1, 0.25, 0])
    np.testing.assert_allclose(timesteps.uniform(process, 2, t_start=0.5), [0.5, 0.25, 0])


def test_flow_shift_multiplies_the_noise_level_of_flow_matching():
    flow = processes.flow()
    plain, shifted = timesteps.uniform(flow, 8), timesteps.flow_shift(flow, 8, shift=3.0)
    np.testing.assert_allclose(
        flow.log_snr(shifted[1:-1]), flow.log_snr(plain[1:-1]) - 2.0 * np.log(3.0), atol=1e-12
    )
    np.testing.assert_allclose(timesteps.flow_shift(flow, 8, shift=1.0), plain, rtol=1e-14)
    part = timesteps.flow_shift(flow, 4, 3.0, t_end=shifted[6], t_start=shifted[2])
    np.testing.assert_allclose(part, shifted[2:7], rtol=1e-12)


@each_process
def test_log_snr_grid_is_uniform_in_log_snr(name):
    nodes = grids(name)[1]
    if name in NO_SIGNAL_AT_END:
        assert nodes[0] == -np.inf
        np.testing.assert_allclose(nodes[1], timesteps.INFINITE_START, rtol=1e-9)
        nodes = nodes[1:]
    np.testing.assert_allclose(np.diff(nodes, 2), 0.0, atol=1e-7)


def test_karras_gives_the_published_levels():
    ts = jax.jit(lambda: timesteps.karras(processes.edm(), 18, 0.002, 80.0))()
    steps = np.arange(18) / 17
    levels = (80 ** (1 / 7) + steps * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(ts, np.append(levels, 0.0), rtol=1e-12)

    @jax.jit
    def ratio(process):
        ts = timesteps.karras(process, 5, 0.01, 80.0)[:-1]
        return process.sigma(ts) / process.alpha(ts)

    np.testing.assert_allclose(ratio(processes.vp())[np.array([0, -1])], [80.0, 0.01], rtol=1e-10)


def test_new_ends_of_a_grid_compile_nothing_anew():
    traces = []

    @jax.jit
    def grid(process, t_end):
        traces.append(1)
        return timesteps.log_snr(process, 5, t_end=t_end)

    grid(processes.vp(0.1, 20.0), 1e-3)
    grid(processes.vp(0.2, 10.0), 1e-2)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: timesteps.uniform(p, 0), "`num_steps`"),
        (lambda p: timesteps.uniform(p, 5, t_end=1.0), "`t_end`"),
        (lambda p: timesteps.uniform(p, 5, t_end=-0.1), "`t_end`"),
        (lambda p: timesteps.uniform(p, 5, t_end=float("nan")), "`t_end`"),
        (lambda p: timesteps.quadratic(p, 5, t_start=1.5), "`t_start`"),
        (lambda p: timesteps.uniform(p, 5, t_end=0.5, t_start=0.4), "`t_end`"),
        (lambda p: timesteps.log_snr(p, 5, t_end=0.0), "`t_end` must have a finite log-SNR"),
        (lambda p: timesteps.karras(p, 5, 1.0, 0.5), "`sigma_min` and `sigma_max`"),
        (lambda p: timesteps.karras(p, 5, 0.1, 1e6), "`sigma_min` and `sigma_max`"),
        (lambda p: timesteps.check_grid(jnp.array([0.0, 1.0])), "`ts` must decrease"),
        (lambda p: timesteps.check_grid(jnp.array([1.0, jnp.nan])), "`ts` must hold finite"),
        (lambda p: timesteps.check_grid(jnp.ones((2, 2))), "`ts` must be a vector"),
        (lambda p: timesteps.check_grid(jnp.ones(1)), "`ts` must be a vector"),
        (
            lambda p: timesteps.check_grid(jnp.array([1.0, 0.0]), decreasing=False),
            "`ts` must increase",
        ),
        (lambda p: timesteps.draw_log_normal(std=0.0), "`std`"),
        (lambda p: timesteps.draw_log_snr(1.0, -1.0), "`low`"),
    ],
)
def test_bad_arguments_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make(processes.vp())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: timesteps.uniform(p, 2.5), "`num_steps` must be a whole number; got 2.5"),
        (lambda p: timesteps.uniform(50, p), "`process` must be a process.*got 50"),
        (lambda p: timesteps.uniform(processes.cosine, 5), r"Call it: cosine\(\)"),
        (lambda p: timesteps.log_snr(p, 5, t_start=[1.0]), "`t_start` must be one number"),
        (lambda p: timesteps.karras(p, 5, 0.1, 10.0, rho=0), "`rho` must be positive"),
        (lambda p: timesteps.karras(p, 5, 0.1, 10.0, rho=np.inf), "`rho` must be positive"),
        (lambda p: timesteps.karras(p, 5, 0.1, 10.0, rho=1e-4), "with `rho` 0.0001"),
        (lambda p: timesteps.karras(p, 5, "0.1", 10.0), "`sigma_min` must be a real number"),
        (lambda p: timesteps.draw_log_snr(-np.inf, 5), "`low` must be finite"),
        (lambda p: timesteps.draw_log_snr(5, np.nan), "`high` must be finite"),
        (lambda p: timesteps.draw_log_normal(np.nan), "`mean` must be finite"),
        (lambda p: timesteps.draw_at("0.5"), "`t` must be a real number"),
        (lambda p: timesteps.check_grid(jnp.array([2.0, 0.0]), process=p), "t_max"),
    ],
)
def test_what_is_no_number_of_its_kind_is_refused(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make(processes.vp())


def test_equal_neighbours_are_allowed_in_a_grid():
    timesteps.check_grid(jnp.array([1.0, 0.5, 0.5, 0.0]))


NUM_DRAWS = 4000
DRAWN_FOR = ("vp", "edm", "flow", "ddpm")
DRAWS = {  # and their cumulative distributions, functions of (t / t_max, log_snr)
    "uniform": (timesteps.draw_uniform(), lambda t, log_snr: t),
    "stratified": (timesteps.draw_stratified(), lambda t, log_snr: t),
    "log_normal": (
        timesteps.draw_log_normal(-1.2, 1.2),
        lambda t, log_snr: stats.norm.cdf(-0.5 * log_snr, -1.2, 1.2),
    ),
    "log_snr": (timesteps.draw_log_snr(-8.0, 8.0), lambda t, log_snr: (log_snr + 8.0) / 16.0),
}


@jax.jit
def _draws(process):
    drawn = {key: draw(KEY, process, NUM_DRAWS) for key, (draw, _) in DRAWS.items()}
    return {key: (t, process.log_snr(t)) for key, t in drawn.items()}


@functools.cache
def draws(name):
    return jax.device_get(_draws(chosen(name, DRAWN_FOR)))


@pytest.mark.parametrize("draw_name", DRAWS)
@pytest.mark.parametrize("name", DRAWN_FOR)
def test_draws_have_their_distribution_and_are_never_zero(draw_name, name):
    t_max = PROCESSES[name].t_max
    t, log_snr = draws(name)[draw_name]
    assert t.shape == (NUM_DRAWS,)
    assert (t > 0).all()
    assert (t <= t_max).all()
    inside = t < t_max
    cdf = DRAWS[draw_name][1]
    distance = stats.kstest(cdf(t[inside] / t_max, log_snr[inside]), "uniform").statistic
    print(f"Kolmogorov-Smirnov distance {distance:.4f}")
    assert distance < 1.95 / np.sqrt(NUM_DRAWS)  # 0.1% of independent draws exceed it


def test_stratified_draws_are_evenly_spread_over_the_global_batch():
    whole = timesteps.draw_stratified()(KEY, processes.vp(), 16)
    np.testing.assert_allclose(np.diff(np.sort(whole)), 1 / 16, rtol=1e-6)
    part = timesteps.draw_stratified()(rows.part_key(KEY, 4, 1, 16), processes.vp(), 4)
    np.testing.assert_array_equal(part, whole[4:8])
