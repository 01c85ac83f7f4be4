import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, NO_SIGNAL_AT_END, PROCESSES, few
from sampler_cases import (
    CASES,
    CORRECTED,
    DIVIDES_BY_ALPHA,
    KEY,
    SAMPLERS,
    SOME,
    STOCHASTIC,
    case,
    noise,
    process_for,
)

from jaxdiff import Mixture, denoisers, processes, sample, samplers, timesteps
from jaxdiff.samplers import Sampler, ancestral, ddim, encode

ROWS = np.arange(8)
VP = processes.vp()
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
LONGEST = (("adaptive", "zero_snr"),)
REPEATED = ("unipc_corrected", "deis_4")
"""What works as `ddim_corrected` and `deis_2` do."""
EAGER = ("ddim", "ancestral", "dpm_solver_pp_3", "deis_2")
DIFFERENTIATED = ("ddim", "heun", "ancestral", "dpm_solver_pp_sde", "unipc_3")
STACKED = ("ddim", "heun", "ancestral", "dpm_solver_pp_3", "dpm_solver_pp_sde")
"""Without what takes long to compile once more: multistep, noise and both are there."""
SINGLE = ("heun", "dpm_solver_pp_3", "unipc_3")


def all_but_longest(cases):
    cases = list(cases)
    return few(cases, [each for each in cases if each not in LONGEST and each[0] not in REPEATED])


def of_cases(cases):
    """Let a test be of a sampler and a process, next to the others of them: they share programs."""
    return pytest.mark.parametrize(("sampler", "name"), cases, scope="module")


each_case = of_cases(all_but_longest(CASES))


def some(cases, kept=SOME):
    """Keep one sampler of each way of working; the others run with test-all."""
    cases = list(cases)
    return few(cases, [each for each in cases if each[0] in kept and each not in LONGEST])


each_process = pytest.mark.parametrize("name", PROCESSES)


def grid(process, num_steps=6):
    return timesteps.uniform(process, num_steps)


def v_network(process):
    return denoisers.from_network(lambda x, t: jnp.tanh(x), process, "v")


x0_hat_of_v = jax.jit(lambda process, x_t, t: v_network(process)(x_t, t))


@functools.cache
def runner(sampler, stacked=False):
    """Return `sample`, and the way, compiled once for all processes and both denoisers."""

    def run(process, x_T, ts, index, exact):
        mixture, network = MIXTURE.denoiser(process), v_network(process)

        def denoise(x, t):
            return jax.lax.cond(exact, lambda: mixture(x, t).astype(x.dtype), lambda: network(x, t))

        made = SAMPLERS[sampler](process, denoise)
        return sample(KEY, made, x_T, ts, index=index, collect=made.value)

    return jax.jit(jax.vmap(run, (None, 0, None, None, None)) if stacked else run)


@functools.cache
def x0_of(sampler, name):
    """Return what a sampler makes of its case with the exact denoiser."""
    return np.asarray(runner(sampler)(*case(sampler, name), ROWS, True)[0])


def way_with_v(sampler, process, x_T, ts):
    """Return x after each step of a grid, with the v network tanh(x)."""
    x0, way = runner(sampler)(process, x_T, ts, ROWS, False)
    np.testing.assert_array_equal(way[-1], x0)
    return np.asarray(way)


# --- The protocol, for every sampler and process --------------------------------------------


@each_case
def test_protocol(sampler, name):
    x_T, x0 = case(sampler, name)[1], x0_of(sampler, name)
    assert x0.shape == x_T.shape
    assert x0.dtype == x_T.dtype
    assert np.isfinite(x0).all()


@of_cases(some(CASES, STACKED))
def test_small_batches_stacked_by_vmap_are_the_first_rows_of_large_ones(sampler, name):
    process, x_T, ts = case(sampler, name)
    stack = np.stack([x_T, -x_T])
    found, _ = runner(sampler, stacked=True)(process, stack[:, :3], ts, None, True)
    mirrored, _ = runner(sampler)(process, -x_T, ts, ROWS, True)
    for small, large in zip(found, (x0_of(sampler, name), mirrored), strict=True):
        np.testing.assert_allclose(small, large[:3], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sampler", few(SAMPLERS, EAGER), scope="module")
def test_step_by_step_without_jit_is_the_same(sampler):
    """Every number known, with the process rather than its table."""
    made = SAMPLERS[sampler](VP, v_network(VP))
    process, x_T, ts = case(sampler, "vp")
    made.check(ts)
    state, way = made.init(x_T), []
    for key, t, s in zip(jax.random.split(KEY, len(ts) - 1), ts[:-1], ts[1:], strict=True):
        state = made.step(key, state, jnp.asarray(t), jnp.asarray(s))
        way.append(made.value(state))
    jitted = way_with_v(sampler, process, x_T, ts)
    np.testing.assert_allclose(way, jitted, rtol=1e-8, atol=1e-10)


@each_case
def test_rows_are_those_of_their_global_numbers(sampler, name):
    process, x_T, ts = case(sampler, name)
    rows = np.array([4, 5, 6, 7, 7, 0, 2, 1])
    part, _ = runner(sampler)(process, x_T[rows], ts, rows, True)
    np.testing.assert_allclose(part, x0_of(sampler, name)[rows], rtol=1e-8, atol=1e-10)


@of_cases(all_but_longest(case for case in CASES if case[0] not in ("edm_churn", "adaptive")))
def test_the_last_step_to_no_noise_is_x0_hat(sampler, name):
    if name == "ve":  # never gets there
        assert PROCESSES[name].sigma(0.0) > 0
        return
    process, x_T, ts = case(sampler, name)
    *_, x_t, x_s = way_with_v(sampler, process, x_T, ts)
    np.testing.assert_allclose(x_s, x0_hat_of_v(process, x_t, ts[-2]), rtol=1e-12)


@of_cases(all_but_longest(case for case in CASES if case[0] not in CORRECTED))
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_step_of_no_length_stands_still(sampler, name, fraction):
    _, x_t, ts = case(sampler, name)
    ts = np.full_like(ts, fraction * PROCESSES[name].t_max)
    way = way_with_v(sampler, process_for(sampler, name, ts), x_t, ts)
    np.testing.assert_array_equal(way, np.broadcast_to(x_t, way.shape))


@of_cases(
    some(case for case in CASES if case[0] not in DIVIDES_BY_ALPHA and case[1] in NO_SIGNAL_AT_END)
)
def test_schedules_without_signal_at_the_end_work_with_v(sampler, name):
    assert np.isfinite(way_with_v(sampler, *case(sampler, name))).all()


@pytest.mark.parametrize("sampler", sorted(set(SOME) - set(CORRECTED)))
def test_steps_of_no_length_within_a_grid_change_nothing(sampler):
    if sampler in STOCHASTIC:  # the noise goes by the number of the step
        return
    process, x_T, ts = case(sampler, "vp")
    plain = way_with_v(sampler, process, x_T, ts)
    step = np.array([1, 1] if sampler == "adaptive" else [1, 1, 2, 3, 3, 4])  # that leads there
    again = way_with_v(sampler, process, x_T, ts[[0, *step]])
    np.testing.assert_allclose(again, plain[step - 1], rtol=1e-12)


@functools.cache
def slope_of(sampler):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def total(shift, x_T, process, ts):
        made = SAMPLERS[sampler](process, lambda x, t: jnp.tanh(x) + shift)
        return sample(KEY, made, x_T, ts).sum()

    return total


@of_cases(some(CASES, DIFFERENTIATED))
def test_gradients_flow_through_sampling(sampler, name):
    process, x_T, ts = case(sampler, name)
    total, step = slope_of(sampler), 1e-5
    _, (slope, x_slope) = total(0.1, x_T, process, ts)
    above, below = (total(0.1 + h, x_T, process, ts)[0] for h in (step, -step))
    np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-5, atol=1e-7)
    assert np.isfinite(x_slope).all()


@each_sampler
@pytest.mark.parametrize("output", [lambda x: x[:, :1], lambda x: x[:, None], lambda x: x[:-1]])
def test_what_has_not_the_shape_of_x_is_refused(sampler, output):
    def generate(x_T, ts):
        made = SAMPLERS[sampler](VP, lambda x, t: output(x))
        return sample(KEY, made, x_T, ts)

    with pytest.raises(ValueError, match="`denoise` must return the shape of x_t"):
        jax.eval_shape(generate, noise(VP), grid(VP))


@of_cases(some((case for case in CASES if case[0] in (*SINGLE, "edm", "deis_4")), SINGLE))
def test_float32_gives_what_float64_does(sampler, name):
    """Three digits, of every kind of slope: in time, in noise, over outputs before."""
    _, x_T, ts = case(sampler, name)
    double = x0_of(sampler, name)
    single_ts = ts.astype(np.float32)
    process = process_for(sampler, name, single_ts)
    single, _ = runner(sampler)(process, x_T.astype(np.float32), single_ts, ROWS, True)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, atol=1e-3 * np.abs(double).max())


@functools.cache
def error_of(sampler):
    """Return the largest error on N(0, 1/4), of whose flow the marginal deviation is all."""
    data = Mixture(*(np.asarray(a, np.float32) for a in ([1.0], [[0.0]], [[[0.25]]])))

    @jax.jit
    def error(process, ts):
        spread = jnp.hypot(0.5 * process.alpha(ts), process.sigma(ts))
        x_T = jnp.linspace(-2.0, 2.0, 11, dtype=jnp.float32)[:, None] * spread[0]
        x0 = sample(KEY, SAMPLERS[sampler](process, data.denoiser(process)), x_T, ts)
        return jnp.abs(x0 - x_T * spread[-1] / spread[0]).max()

    return error


def largest_error_in_float32(sampler, process, ts, length=40):
    """Along a grid with steps of no length behind it, so that one program does for all."""
    ts = np.pad(ts, (0, length - len(ts)), mode="edge")
    return float(error_of(sampler)(process, ts.astype(np.float32)))


@pytest.mark.parametrize("sampler", ["unipc_3", "dpm_solver_pp_3", "deis_3"])
@pytest.mark.parametrize("gap", [1e-7, 1e-5])
def test_times_that_nearly_agree_do_no_harm(sampler, gap):
    """Joined grids have such pairs; a slope over one is the rounding of its ends."""
    ts = np.linspace(0.98, 0.0, 31)
    pairs = np.unique(np.concatenate([ts, ts[3:-1:5] + gap]))[::-1]
    plain = largest_error_in_float32(sampler, FLOW, ts)
    joined = largest_error_in_float32(sampler, FLOW, pairs)
    print(f"error {plain:.1e}, with pairs {joined:.1e}")
    assert joined < 2 * plain + 1e-4


@pytest.mark.parametrize("order", [2, 3])
def test_a_grid_of_close_pairs_does_not_let_errors_of_unipc_grow(order):
    """Its outputs are of points before correction: over a short distance, a large slope."""
    ts = np.linspace(0.98, 0.0, 21)
    for gap in (1e-3, 1e-4):
        pairs = np.sort(np.concatenate([ts, ts[1:-1] - gap]))[::-1]
        assert largest_error_in_float32(f"unipc_{order}", FLOW, pairs) < 0.02, gap


@pytest.mark.parametrize("sampler", few(["unipc_3", "dpm_solver_pp_3", "deis_4"], ["unipc_3"]))
def test_ten_thousand_steps_in_float32_add_up_rounding_alone(sampler):
    chain = processes.ddpm(1, 0.5, 0.5)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), chain)
    ts = np.linspace(1.0, 0.0, 10_001)
    error = largest_error_in_float32(sampler, single, ts, len(ts))
    print(f"error {error:.1e}")
    assert error < 1e-3


# --- What the methods are -------------------------------------------------------------------


@each_process
def test_ddim_with_eta_1_is_ancestral_sampling(name):
    np.testing.assert_allclose(x0_of("ancestral", name), x0_of("ddim_1", name), rtol=1e-10)


@each_process
def test_dpm_solver_pp_of_order_1_is_ddim(name):
    np.testing.assert_allclose(x0_of("dpm_solver_pp_1", name), x0_of("ddim", name), rtol=1e-10)


def test_a_replaced_x_is_what_a_multistep_sampler_goes_on_from():
    """With a denoiser that ignores x the history is the same, so x alone can differ."""
    exact = lambda x, t: jnp.full_like(x, 0.5)  # noqa: E731
    t, s, r = (jnp.asarray(time) for time in (0.9, 0.6, 0.3))

    @jax.jit
    def second_step(x, there):
        ends = []
        for make in (samplers.dpm_solver_pp, samplers.unipc):
            made = make(VP, exact)
            state = made.step(KEY, made.init(x), t, s)
            ends.append(made.value(made.step(KEY, made.replace(state, there), s, r)))
        return ends, ddim(VP, exact).step(KEY, there, s, r)

    ends, expected = second_step(np.ones((2, 1)), np.full((2, 1), 3.0))
    for end in ends:
        np.testing.assert_allclose(end, expected, rtol=1e-12)


def test_langevin_moves_at_t_and_ignores_s():
    def score(x, t):
        return -x / t

    x, t = jnp.ones((2, 3)), jnp.asarray(0.5)
    silent = samplers.langevin(score, lambda t: 0.2 * t, noise=0.0)
    np.testing.assert_allclose(silent.step(KEY, x, t, t), 0.8)
    loud = samplers.langevin(score, 0.1, noise=0.5)
    z = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(KEY, i), (3,)))(jnp.arange(2))
    expected = 0.8 + 0.5 * np.sqrt(0.2) * z
    for s in (t, jnp.asarray(0.0)):
        np.testing.assert_allclose(loud.step(KEY, x, t, s), expected, rtol=1e-12)


# --- What the loop promises -----------------------------------------------------------------


TRACES = dict.fromkeys(SAMPLERS, 1) | dict.fromkeys(CORRECTED, 2)  # the score, and the step


@each_sampler
def test_the_denoiser_is_traced_once_for_all_grids_and_hyper_parameters(sampler):
    traces = []

    @jax.jit
    def generate(process, key, x_T, ts):
        def denoise(x, t):
            traces.append(1)
            return jnp.tanh(x)

        return sample(key, SAMPLERS[sampler](process, denoise), x_T, ts)

    generate.eval_shape(processes.vp(0.1, 20.0), KEY, noise(VP), grid(VP))
    generate.eval_shape(processes.vp(0.2, 10.0), KEY, noise(VP), timesteps.log_snr(VP, 6))
    assert len(traces) == TRACES[sampler]


def test_options_may_be_traced():
    @jax.jit
    def run(eta, churn, step_size, noise_scale):
        x_T, ts = noise(VP), timesteps.uniform(VP, 3, t_end=0.1)
        exact = jnp.multiply
        made = [ddim(VP, exact, eta), samplers.edm(VP, exact, churn, churn, 1.0 + churn, eta)]
        made += [samplers.langevin(exact, step_size, noise=noise_scale)]
        return [sample(KEY, one, x_T, ts) for one in made]

    assert all(np.isfinite(x).all() for x in run(0.5, 0.1, 0.01, 1.0))


def test_collect_stacks_what_it_is_given_and_only_that():
    sampler = ddim(VP, lambda x, t: jnp.tanh(x))
    x0, path = sample(KEY, sampler, noise(VP), grid(VP), collect=lambda x: {"x": x})
    assert path["x"].shape == (6, 8, 2)
    np.testing.assert_array_equal(path["x"][-1], x0)


@pytest.mark.parametrize(
    "make",
    few(
        [ddim, samplers.heun, samplers.unipc, samplers.dpm_solver_pp_sde],
        [samplers.heun, samplers.unipc],
    ),
)
def test_memory_does_not_grow_with_the_number_of_steps(make):
    def bytes_needed(num_steps):
        run = jax.jit(lambda x_T, ts: sample(KEY, make(VP, jnp.multiply), x_T, ts))
        compiled = run.lower(noise(VP, 10_000), grid(VP, num_steps)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state = 10_000 * 2 * 8
    assert bytes_needed(1000) - bytes_needed(10) < state
    x_T, ts = noise(VP, 10_000), grid(VP, 100)
    _, path = jax.eval_shape(
        lambda: sample(KEY, ddim(VP, jnp.multiply), x_T, ts, collect=lambda x: x)
    )
    assert path.size == 100 * x_T.size


def test_the_state_is_float32_whatever_the_network():
    def network(x, t):
        return x.astype(jnp.bfloat16)

    x_T = noise(VP, dtype=jnp.bfloat16)
    for denoise in (network, denoisers.from_network(network, VP, "v")):
        x0 = jax.eval_shape(lambda d=denoise: sample(KEY, ddim(VP, d), x_T, grid(VP)))
        assert x0.dtype == jnp.float32


def test_a_sampler_of_ones_own_runs():
    def step(key, state, t, s):
        x, count = state
        return x * s / t, count + 1

    mine = Sampler(lambda x_T: (x_T, jnp.zeros(())), step, lambda state: state[0] + state[1])
    x0 = sample(KEY, mine, jnp.ones((2, 1)), jnp.array([1.0, 0.5, 0.25]))
    np.testing.assert_allclose(x0, 2.25)


FLOW = PROCESSES["flow"]
RISING = np.linspace(0.1, 1.0, 4)
LANGEVIN = samplers.langevin(denoisers.to_score(VP, jnp.multiply), 0.1)
LANGEVIN_ASCENT = samplers.langevin(jnp.multiply, lambda t: -0.1)
EPS = denoisers.from_network(lambda x, t: x, FLOW, "eps")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s: sample(KEY, s, noise(VP), jnp.array([0.0, 1.0])), ValueError, "must decrease"),
        (lambda s: sample(KEY, s, noise(VP), jnp.array([1.0, jnp.nan])), ValueError, "finite"),
        (lambda s: sample(KEY, s, noise(VP), jnp.ones((2, 2))), ValueError, "`ts` must be a vec"),
        (lambda s: sample(KEY, s, noise(VP), jnp.array([2.0, 0.0])), ValueError, "t_max"),
        (lambda s: sample(KEY, s, noise(VP), jnp.array([1, 0])), TypeError, "`ts`"),
        (lambda s: sample(KEY, s, jnp.ones((2, 2), int), grid(VP)), TypeError, "`x_T`"),
        (lambda s: sample(KEY, s, jnp.ones(()), grid(VP)), ValueError, "`x_T`"),
        (
            lambda s: sample(KEY, s, noise(VP), grid(VP), index=jnp.arange(3)),
            ValueError,
            "`index` must have shape",
        ),
        (lambda s: ddim(VP, jnp.multiply, eta=1.1), ValueError, "`eta`"),
        (lambda s: ddim(VP, jnp.multiply, eta=-0.1), ValueError, "`eta`"),
        (lambda s: ancestral(VP, jnp.multiply, variance="lower"), ValueError, "`variance`"),
        (lambda s: samplers.dpm_solver_pp(VP, jnp.multiply, order=4), ValueError, "1, 2, 3; got 4"),
        (lambda s: samplers.unipc(VP, jnp.multiply, order=0), ValueError, "`order`"),
        (lambda s: samplers.deis(VP, jnp.multiply, order=5), ValueError, "`order`"),
        (lambda s: samplers.edm(VP, jnp.multiply, churn=-0.1), ValueError, "`churn`"),
        (lambda s: samplers.edm(VP, jnp.multiply, s_tmin=2.0, s_tmax=1.0), ValueError, "`s_tmin`"),
        (lambda s: samplers.edm(VP, jnp.multiply, s_noise=jnp.nan), ValueError, "`s_noise`"),
        (lambda s: samplers.langevin(jnp.multiply, -0.1), ValueError, "`step_size`"),
        (lambda s: samplers.langevin(jnp.multiply, 0.1, noise=-1.0), ValueError, "`noise`"),
        (lambda s: samplers.predictor_corrector(s, s, -1), ValueError, "`num_corrections`"),
        (lambda s: samplers.predictor_corrector(s, s), ValueError, "`corrector` must move"),
        (lambda s: samplers.predictor_corrector(s, ddim), TypeError, "`corrector`.*function ddim"),
        (lambda s: sample(KEY, ddim, noise(VP), grid(VP)), TypeError, "`sampler`.*function ddim"),
        (lambda s: sample(s, KEY, noise(VP), grid(VP)), TypeError, "`key` must be a typed key"),
        (lambda s: sample(0, s, noise(VP), grid(VP)), TypeError, "`key` must be a typed key"),
        (
            lambda s: sample(jax.random.split(KEY, 8), s, noise(VP), grid(VP)),
            ValueError,
            "`key` must be one key; got 8",
        ),
        (lambda s: sample(KEY, s, noise(VP)[:0], grid(VP)), ValueError, "`x_T`.*one row"),
        (
            lambda s: sample(KEY, s, noise(VP), grid(VP), index=jnp.arange(8.0)),
            TypeError,
            "`index` must hold integers",
        ),
        (
            lambda s: sample(KEY, s, noise(VP), grid(VP), index=jnp.arange(8) - 1),
            ValueError,
            r"`index` must be in 0\.\.4294967295; got values from -1",
        ),
        (
            lambda s: sample(KEY, s, noise(VP), grid(VP), index=np.arange(8) + 2**32),
            ValueError,
            r"`index` must be in 0\.\.4294967295",
        ),
        (
            lambda s: sample(KEY, LANGEVIN_ASCENT, noise(VP), grid(VP)),
            ValueError,
            r"`step_size\(t\)` must be at least 0",
        ),
        (
            lambda s: sample(KEY, LANGEVIN, noise(VP), jnp.array([1.5, 0.5])),
            ValueError,
            r"t_max\] = \[0, 1\]; got 1.5",
        ),
        (lambda s: samplers.langevin(jnp.ones(2), 0.1), TypeError, "`score` must be a function"),
        (lambda s: ddim(processes.cosine, jnp.multiply), TypeError, r"Call it: cosine\(\)"),
        (lambda s: ddim(VP, None), TypeError, "`denoise` must be a function"),
        (lambda s: samplers.adaptive(VP, jnp.multiply, max_steps=1.5), TypeError, "`max_steps`"),
        (lambda s: samplers.adaptive(VP, jnp.multiply, rtol=0.0), ValueError, "`rtol`"),
        (
            lambda s: sample(KEY, samplers.edm(FLOW, jnp.multiply), noise(FLOW), grid(FLOW)),
            ValueError,
            "alpha is 0 for edm",
        ),
        (
            lambda s: sample(
                KEY, samplers.euler_maruyama(FLOW, jnp.multiply), noise(FLOW), grid(FLOW)
            ),
            ValueError,
            "alpha is 0 for euler_maruyama",
        ),
        (lambda s: encode(s, noise(VP), grid(VP)), ValueError, "must increase"),
        (lambda s: encode(s, noise(VP), jnp.array([0.0, 2.0])), ValueError, "t_max"),
        (lambda s: encode(s, jnp.ones((2, 2), int), grid(VP)[::-1]), TypeError, "`x0`"),
        (lambda s: encode(ddim(VP, jnp.multiply, 0.5), noise(VP), RISING), ValueError, "determin"),
        (lambda s: encode(ancestral(VP, jnp.multiply), noise(VP), RISING), ValueError, "determin"),
        (
            lambda s: sample(KEY, ddim(FLOW, EPS), noise(VP), grid(VP)),
            ValueError,
            "alpha is 0 for a network that predicts eps",
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(samplers.ddim(VP, jnp.multiply))
