import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NO_SIGNAL_AT_END, PROCESSES
from scipy import stats

from jaxdiff import numerics, processes, timesteps

each_process = pytest.mark.parametrize("name", PROCESSES)
KEY = jax.random.key(0)


@each_process
@pytest.mark.parametrize("num_steps", [1, 2, 17])
@pytest.mark.parametrize("make", [timesteps.uniform, timesteps.quadratic, timesteps.log_snr])
def test_grids_fall_from_t_max_to_t_end(name, num_steps, make):
    process = PROCESSES[name]
    ts = make(process, num_steps, t_end=1e-3)
    assert ts.shape == (num_steps + 1,)
    assert ts[0] == process.t_max
    assert ts[-1] == 1e-3
    assert (jnp.diff(ts) < 0).all()


def test_uniform_and_quadratic_are_what_they_say():
    process = processes.vp()
    np.testing.assert_allclose(timesteps.uniform(process, 4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(timesteps.quadratic(process, 2), [1, 0.25, 0])
    np.testing.assert_allclose(timesteps.uniform(process, 2, t_start=0.5), [0.5, 0.25, 0])


@each_process
def test_log_snr_grid_is_uniform_in_log_snr(name):
    process = PROCESSES[name]
    nodes = process.log_snr(timesteps.log_snr(process, 20))
    if name in NO_SIGNAL_AT_END:
        assert nodes[0] == -jnp.inf
        np.testing.assert_allclose(nodes[1], timesteps.INFINITE_START, rtol=1e-9)
        nodes = nodes[1:]
    np.testing.assert_allclose(jnp.diff(nodes, 2), 0.0, atol=1e-7)


def test_karras_gives_the_published_levels():
    ts = timesteps.karras(processes.edm(), 18, 0.002, 80.0)
    steps = np.arange(18) / 17
    levels = (80 ** (1 / 7) + steps * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(ts, np.append(levels, 0.0), rtol=1e-12)
    vp = timesteps.karras(processes.vp(), 5, 0.01, 80.0)
    ratio = processes.vp().sigma(vp[:-1]) / processes.vp().alpha(vp[:-1])
    np.testing.assert_allclose(ratio[jnp.array([0, -1])], [80.0, 0.01], rtol=1e-10)


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


def test_equal_neighbours_are_allowed_in_a_grid():
    timesteps.check_grid(jnp.array([1.0, 0.5, 0.5, 0.0]))


DRAWS = {
    "uniform": (timesteps.draw_uniform(), lambda p, t: t / p.t_max),
    "stratified": (timesteps.draw_stratified(), lambda p, t: t / p.t_max),
    "log_normal": (
        timesteps.draw_log_normal(-1.2, 1.2),
        lambda p, t: stats.norm.cdf(-0.5 * np.asarray(p.log_snr(t)), -1.2, 1.2),
    ),
    "log_snr": (timesteps.draw_log_snr(-8.0, 8.0), lambda p, t: (p.log_snr(t) + 8.0) / 16.0),
}


@pytest.mark.parametrize("draw_name", DRAWS)
@pytest.mark.parametrize("name", ["vp", "edm", "flow", "ddpm"])
def test_draws_have_their_distribution_and_are_never_zero(draw_name, name):
    process = PROCESSES[name]
    draw, cdf = DRAWS[draw_name]
    t = draw(KEY, process, 4000)
    assert (t > 0).all()
    assert (t <= process.t_max).all()
    inside = t < process.t_max
    distance = stats.kstest(np.asarray(cdf(process, t[inside])), "uniform").statistic
    print(f"Kolmogorov-Smirnov distance {distance:.4f}")
    assert distance < 1.95 / np.sqrt(4000)  # 0.1% of independent draws exceed it


def test_stratified_draws_are_evenly_spread_over_the_global_batch():
    whole = timesteps.draw_stratified()(KEY, processes.vp(), 16)
    np.testing.assert_allclose(jnp.diff(jnp.sort(whole)), 1 / 16, rtol=1e-6)
    with numerics.shard_rows(1, 4):
        part = timesteps.draw_stratified()(KEY, processes.vp(), 4)
    np.testing.assert_array_equal(part, whole[4:8])
