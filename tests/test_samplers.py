import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, NO_SIGNAL_AT_END, PROCESSES, chosen, known

from jaxdiff import Mixture, denoisers, processes, sample, samplers, timesteps
from jaxdiff.samplers import Sampler, ancestral, ddim

KEY = jax.random.key(0)
ROWS = np.arange(8)
VP = processes.vp()
SAMPLERS = {
    "ancestral": ancestral,
    "ancestral_upper": lambda p, d: ancestral(p, d, variance="upper"),
    "ddim": ddim,
    "ddim_0.5": lambda p, d: ddim(p, d, eta=0.5),
    "ddim_1": lambda p, d: ddim(p, d, eta=1.0),
}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
each_process = pytest.mark.parametrize("name", PROCESSES)


def noise(process, n=8, dtype=float):
    return process.prior_sample(jax.random.key(3), (n, 2), dtype=dtype)


def grid(process, num_steps=6):
    return timesteps.uniform(process, num_steps)


@functools.cache
def case(name):
    """Return a process, as a table at the times of its grid, with noise (8, 2) and the grid."""
    ts = grid(PROCESSES[name])
    return known(name, ts), noise(PROCESSES[name]), ts


@functools.cache
def runner(sampler, map_axes=None):
    """Return `sample` with the exact denoiser, compiled once for all processes."""

    def run(process, x_T, ts, index):
        made = SAMPLERS[sampler](process, MIXTURE.denoiser(process))
        return sample(KEY, made, x_T, ts, index=index)

    return jax.jit(run if map_axes is None else jax.vmap(run, map_axes))


# --- The protocol, for every sampler and process --------------------------------------------


@each_sampler
@each_process
def test_protocol(sampler, name):
    process, x_T, ts = case(name)
    jitted = runner(sampler)(process, x_T, ts, ROWS)
    assert jitted.shape == x_T.shape
    assert jitted.dtype == x_T.dtype
    assert np.isfinite(jitted).all()
    stacked = runner(sampler, (None, 0, None, None))(process, np.stack([x_T, -x_T]), ts, ROWS)
    np.testing.assert_allclose(stacked[0], jitted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(eagerly(sampler, name), jitted, rtol=1e-9, atol=1e-12)


def eagerly(sampler, name):
    """Run a sampler step by step, every number known, with the process rather than its table."""
    made = SAMPLERS[sampler](PROCESSES[name], MIXTURE.denoiser(PROCESSES[name]))
    _, x_T, ts = case(name)
    made.check(ts)
    state = made.init(x_T)
    for key, t, s in zip(jax.random.split(KEY, len(ts) - 1), ts[:-1], ts[1:], strict=True):
        state = made.step(key, state, t, s)
    return made.value(state)


@each_sampler
@each_process
def test_first_rows_of_a_large_batch_are_the_small_batch(sampler, name):
    process, x_T, ts = case(name)
    large = runner(sampler)(process, x_T, ts, ROWS)
    small = runner(sampler)(process, x_T[:3], ts, None)
    np.testing.assert_allclose(large[:3], small, rtol=1e-9, atol=1e-12)


@each_sampler
@each_process
def test_rows_are_those_of_their_global_numbers(sampler, name):
    process, x_T, ts = case(name)
    whole = runner(sampler)(process, x_T, ts, ROWS)
    rows = np.array([4, 5, 6, 7, 7, 0, 2, 1])
    part = runner(sampler)(process, x_T[rows], ts, rows)
    np.testing.assert_allclose(part, whole[rows], rtol=1e-9, atol=1e-12)


@functools.cache
def stepper(sampler):
    """Return one step with a v network, and its x0_hat, compiled once for all processes."""

    @jax.jit
    def step(process, x_t, t, s):
        denoise = denoisers.from_network(lambda x, t: jnp.tanh(x), process, "v")
        made = SAMPLERS[sampler](process, denoise)
        return made.value(made.step(KEY, made.init(x_t), t, s)), denoise(x_t, t)

    return step


@each_sampler
@each_process
def test_the_last_step_to_no_noise_is_x0_hat(sampler, name):
    if name == "ve":  # never gets there
        assert PROCESSES[name].sigma(0.0) > 0
        return
    t, x_t = 0.3 * PROCESSES[name].t_max, case(name)[1]
    x_s, x0_hat = stepper(sampler)(known(name, [0.0, t]), x_t, t, 0.0)
    np.testing.assert_allclose(x_s, x0_hat, rtol=1e-13)


@each_sampler
@each_process
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_step_of_no_length_stands_still(sampler, name, fraction):
    t, x_t = fraction * PROCESSES[name].t_max, case(name)[1]
    np.testing.assert_array_equal(stepper(sampler)(known(name, t), x_t, t, t)[0], x_t)


@pytest.mark.parametrize("name", NO_SIGNAL_AT_END)
@each_sampler
def test_schedules_without_signal_at_the_end_work_with_v(sampler, name):
    process, x_t, ts = case(name)
    for t, s in itertools.pairwise(ts):
        x_t, x0_hat = stepper(sampler)(process, x_t, t, s)
        assert np.isfinite(x_t).all()
        assert np.isfinite(x0_hat).all()


@functools.cache
def slope_of(sampler):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def total(shift, x_T, process, ts):
        made = SAMPLERS[sampler](process, lambda x, t: jnp.tanh(x) + shift)
        return sample(KEY, made, x_T, ts).sum()

    return total


@each_sampler
@each_process
def test_gradients_flow_through_sampling(sampler, name):
    process, x_T, ts = case(name)
    total, step = slope_of(sampler), 1e-5
    _, (slope, x_slope) = total(0.1, x_T, process, ts)
    above, below = (total(0.1 + h, x_T, process, ts)[0] for h in (step, -step))
    np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-5)
    assert np.isfinite(x_slope).all()


# --- What the methods are -------------------------------------------------------------------


@each_process
def test_ddim_with_eta_1_is_ancestral_sampling(name):
    runs = [runner(sampler)(*case(name), ROWS) for sampler in ("ancestral", "ddim_1")]
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-10)


BETAS = np.array([0.1, 0.2, 0.3, 0.4])
X_T, EPS_HAT = np.array([[0.7, -1.1]]), 0.3


@functools.cache
def published_steps(make, t, s):
    """Return the step of a chain of BETAS whose network says EPS_HAT, and the noise it draws."""

    @jax.jit
    def step(t, s):
        process = processes.from_betas(BETAS)
        denoise = denoisers.from_network(lambda x, t: jnp.full_like(x, EPS_HAT), process, "eps")
        z = jax.random.normal(jax.random.fold_in(KEY, 0), (2,))
        return make(process, denoise).step(KEY, X_T, t, s), z[None]

    return step(t, s)


@pytest.mark.parametrize("variance", ["posterior", "upper"])
def test_ancestral_step_is_the_published_ddpm_update(variance):
    """Algorithm 2 of Ho et al. 2020, both variances, written with eps and beta."""
    kept = np.cumprod(1 - BETAS)
    mean = (X_T - BETAS[2] / np.sqrt(1 - kept[2]) * EPS_HAT) / np.sqrt(1 - BETAS[2])
    shrink = {"posterior": (1 - kept[1]) / (1 - kept[2]), "upper": 1.0}[variance]
    x_s, z = published_steps(functools.partial(ancestral, variance=variance), 3 / 4, 2 / 4)
    np.testing.assert_allclose(x_s, mean + np.sqrt(shrink * BETAS[2]) * z, rtol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_step_is_the_published_update(eta):
    """Eqs. 12 and 16 of Song et al. 2021, whose alpha is the cumulative product."""
    a = np.cumprod(1 - BETAS)
    sigma = eta * np.sqrt((1 - a[1]) / (1 - a[3])) * np.sqrt(1 - a[3] / a[1])
    x0 = (X_T - np.sqrt(1 - a[3]) * EPS_HAT) / np.sqrt(a[3])
    x_s, z = published_steps(functools.partial(ddim, eta=eta), 4 / 4, 2 / 4)
    expected = np.sqrt(a[1]) * x0 + np.sqrt(1 - a[1] - sigma**2) * EPS_HAT + sigma * z
    np.testing.assert_allclose(x_s, expected, rtol=1e-10)


SIZES = np.array([128, 256, 512])


@jax.jit
def _ddim_errors(process, x_t, t_start, t_end):
    """Errors of ddim with each of SIZES steps, against the exact flow map of one Gaussian."""
    std, mean = 0.4, np.array([0.7, -0.2])
    data = Mixture([1.0], mean[None], [std**2 * np.eye(2)])

    def spread(t):
        return jnp.sqrt((process.alpha(t) * std) ** 2 + process.variance(t))

    # y - mean shrinks as the std does
    start, end = ((process.alpha(t) * mean)[None] for t in (t_start, t_end))
    exact = end + spread(t_end) / spread(t_start) * (x_t - start)

    def error(ts):
        x0 = sample(KEY, ddim(process, data.denoiser(process)), x_t, ts)
        return jnp.abs(x0 - exact).max()

    grids = [timesteps.log_snr(process, n, t_end, t_start) for n in SIZES]
    longest = len(grids[-1])  # a step of no length stands still
    return jax.vmap(error)(
        jnp.stack([jnp.pad(ts, (0, longest - len(ts)), mode="edge") for ts in grids])
    )


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "cosine"])
def test_ddim_reaches_order_one(name):
    t_max = PROCESSES[name].t_max
    errors = _ddim_errors(chosen(name), case(name)[1], 0.9 * t_max, 0.05 * t_max)
    order = -np.polyfit(np.log(SIZES), np.log(errors), 1)[0]
    print(f"order {order:.3f}, errors {errors}")
    assert order > 0.8


@pytest.mark.parametrize(
    ("sampler", "num_steps"), [("ancestral", 800), ("ddim_0.5", 500), ("ddim", 400)]
)
def test_samples_have_the_moments_of_the_mixture(sampler, num_steps):
    # N steps leave second moments low by O(1/N), with these N by at most 1.0 standard error:
    # computed for one Gaussian of variance 0.1, 0.2 or 0.95, and halved when N is doubled.
    n, ts = 20_000, timesteps.quadratic(VP, num_steps, t_end=1e-3)
    mixture = jax.tree.map(jnp.float32, MIXTURE)
    made = SAMPLERS[sampler](VP, mixture.denoiser(VP))
    optimized = {"xla_backend_optimization_level": 2}  # the one program here that runs for long
    run = jax.jit(lambda key, x_T: sample(key, made, x_T, ts), compiler_options=optimized)
    x = np.asarray(run(jax.random.key(5), noise(VP, n, jnp.float32)), float)
    weights, means, covariances = (
        np.asarray(leaf) for leaf in jax.tree.leaves(MIXTURE.diffuse(VP, 1e-3))
    )
    second = np.einsum("k,kij->ij", weights, covariances)
    second += np.einsum("k,ki,kj->ij", weights, means, means)
    products = x[:, :, None] * x[:, None, :]
    z_mean = (x.mean(0) - weights @ means) / (x.std(0) / np.sqrt(n))
    z_second = (products.mean(0) - second) / (products.std(0) / np.sqrt(n))
    print("standard errors off:", z_mean, z_second)
    assert np.abs(z_mean).max() < 4
    assert np.abs(z_second).max() < 4


# --- What the loop promises -----------------------------------------------------------------


def test_the_denoiser_is_traced_once_for_all_grids_and_hyper_parameters():
    traces = []

    @jax.jit
    def generate(process, key, x_T, ts, eta):
        def denoise(x, t):
            traces.append(1)
            return jnp.tanh(x)

        return sample(key, ddim(process, denoise, eta), x_T, ts)

    generate(processes.vp(0.1, 20.0), KEY, noise(VP), grid(VP), 0.0)
    generate(processes.vp(0.2, 10.0), KEY, noise(VP), timesteps.log_snr(VP, 6), 0.5)
    assert len(traces) == 1


def test_collect_stacks_what_it_is_given_and_only_that():
    sampler = ddim(VP, lambda x, t: jnp.tanh(x))
    x0, path = sample(KEY, sampler, noise(VP), grid(VP), collect=lambda x: {"x": x})
    assert path["x"].shape == (6, 8, 2)
    np.testing.assert_array_equal(path["x"][-1], x0)


def test_memory_does_not_grow_with_the_number_of_steps():
    def bytes_needed(num_steps, collect=None):
        run = jax.jit(lambda x_T, ts: sample(KEY, ddim(VP, jnp.multiply), x_T, ts, collect=collect))
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


EPS = denoisers.from_network(lambda x, t: x, PROCESSES["flow"], "eps")


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
        (
            lambda s: sample(KEY, ddim(PROCESSES["flow"], EPS), noise(VP), grid(VP)),
            ValueError,
            "alpha is 0 for a network that predicts eps",
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(samplers.ddim(VP, jnp.multiply))
