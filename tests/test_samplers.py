import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, NO_SIGNAL_AT_END, PROCESSES

from jaxdiff import denoisers, processes, sample, samplers, timesteps
from jaxdiff.samplers import Sampler, ancestral, ddim

KEY = jax.random.key(0)
VP = processes.vp()
SAMPLERS = {
    "ancestral": ancestral,
    "ancestral_upper": lambda p, d: ancestral(p, d, variance="upper"),
    "ddim": ddim,
    "ddim_0.5": lambda p, d: ddim(p, d, eta=0.5),
    "ddim_1": lambda p, d: ddim(p, d, eta=1.0),
}
each_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
each_process = pytest.mark.parametrize("name", PROCESSES)


def noise(process, n=8, dtype=float):
    return process.prior_sample(jax.random.key(3), (n, 2), dtype=dtype)


def grid(process, num_steps=6):
    return timesteps.uniform(process, num_steps)


# --- The protocol, for every sampler and process --------------------------------------------


@each_sampler
@each_process
def test_protocol(make, name):
    process = PROCESSES[name]
    sampler = make(process, MIXTURE.denoiser(process))
    x_T, ts = noise(process), grid(process)

    def run(x_T, ts):
        return sample(KEY, sampler, x_T, ts)

    jitted = jax.jit(run)(x_T, ts)
    assert jitted.shape == x_T.shape
    assert jitted.dtype == x_T.dtype
    assert jnp.isfinite(jitted).all()
    np.testing.assert_allclose(run(x_T, ts), jitted, rtol=1e-9, atol=1e-12)  # eager
    stacked = jax.jit(jax.vmap(run, (0, None)))(jnp.stack([x_T, -x_T]), ts)
    np.testing.assert_allclose(stacked[0], jitted, rtol=1e-9, atol=1e-12)


@each_sampler
@each_process
def test_first_rows_of_a_large_batch_are_the_small_batch(make, name):
    process = PROCESSES[name]
    sampler = make(process, MIXTURE.denoiser(process))
    run = jax.jit(lambda x_T: sample(KEY, sampler, x_T, grid(process)))
    large, small = run(noise(process, 64)), run(noise(process, 7))
    np.testing.assert_allclose(large[:7], small, rtol=1e-9, atol=1e-12)


@each_sampler
def test_rows_computed_apart_are_the_rows_of_the_whole(make):
    sampler = make(VP, MIXTURE.denoiser(VP))
    run = jax.jit(lambda x_T, index: sample(KEY, sampler, x_T, grid(VP), index=index))
    x_T = noise(VP)
    whole = sample(KEY, sampler, x_T, grid(VP))
    for rows in (slice(0, 4), slice(4, 8)):
        part = run(x_T[rows], jnp.arange(8)[rows])
        np.testing.assert_allclose(part, whole[rows], rtol=1e-9, atol=1e-12)


@each_sampler
@each_process
def test_the_last_step_to_no_noise_is_x0_hat(make, name):
    process = PROCESSES[name]
    if process.sigma(jnp.zeros(())) > 0:  # ve never gets there
        return
    denoise = MIXTURE.denoiser(process)
    x_t, t = noise(process), jnp.asarray(0.3 * process.t_max)
    sampler = make(process, denoise)
    x_s = sampler.value(sampler.step(KEY, sampler.init(x_t), t, jnp.zeros(())))
    np.testing.assert_allclose(x_s, denoise(x_t, t), rtol=1e-13)


@each_sampler
@each_process
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_step_of_no_length_stands_still(make, name, fraction):
    process = PROCESSES[name]
    sampler = make(process, lambda x, t: jnp.tanh(x))
    x_t, t = noise(process), jnp.asarray(fraction * process.t_max)
    np.testing.assert_array_equal(sampler.value(sampler.step(KEY, x_t, t, t)), x_t)


@each_sampler
@pytest.mark.parametrize("name", ["vp", "flow", "edm", "ddpm"])
def test_gradients_flow_through_sampling(make, name):
    process = PROCESSES[name]

    def total(shift, x_T):
        exact = MIXTURE.denoiser(process)
        sampler = make(process, lambda x, t: exact(x, t) + shift)
        return sample(KEY, sampler, x_T, grid(process)).sum()

    value = jax.jit(total)
    slope, x_slope = jax.jit(jax.grad(total, argnums=(0, 1)))(0.1, noise(process))
    step = 1e-5
    difference = (value(0.1 + step, noise(process)) - value(0.1 - step, noise(process))) / (
        2 * step
    )
    np.testing.assert_allclose(slope, difference, rtol=1e-5)
    assert jnp.isfinite(x_slope).all()


@pytest.mark.parametrize("name", NO_SIGNAL_AT_END)
@each_sampler
def test_schedules_without_signal_at_the_end_work_with_v(make, name):
    process = PROCESSES[name]
    denoise = denoisers.from_network(lambda x, t: 0.1 * x, process, "v")
    x0 = sample(KEY, make(process, denoise), noise(process), grid(process))
    assert jnp.isfinite(x0).all()


# --- What the methods are -------------------------------------------------------------------


def test_ddim_with_eta_1_is_ancestral_sampling():
    denoise = MIXTURE.denoiser(VP)
    runs = [
        sample(KEY, sampler, noise(VP), grid(VP))
        for sampler in (ancestral(VP, denoise), ddim(VP, denoise, eta=1.0))
    ]
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-10)


def test_ancestral_step_is_the_published_ddpm_update():
    """Algorithm 2 of Ho et al. 2020, both variances, written with eps and beta."""
    betas = np.array([0.1, 0.2, 0.3, 0.4])
    process = processes.from_betas(betas)
    kept = np.cumprod(1 - betas)
    eps_hat, x_t = 0.3, jnp.array([[0.7, -1.1]])
    denoise = denoisers.from_network(lambda x, t: jnp.full_like(x, eps_hat), process, "eps")
    mean = (x_t - betas[2] / np.sqrt(1 - kept[2]) * eps_hat) / np.sqrt(1 - betas[2])
    z = jax.random.normal(jax.random.fold_in(KEY, 0), (2,))
    small = np.sqrt((1 - kept[1]) / (1 - kept[2]) * betas[2])
    for variance, std in (("posterior", small), ("upper", np.sqrt(betas[2]))):
        step = ancestral(process, denoise, variance=variance).step
        x_s = step(KEY, x_t, jnp.asarray(3 / 4), jnp.asarray(2 / 4))
        np.testing.assert_allclose(x_s, mean + std * z, rtol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_step_is_the_published_update(eta):
    """Eqs. 12 and 16 of Song et al. 2021, whose alpha is the cumulative product."""
    betas = np.array([0.1, 0.2, 0.3, 0.4])
    process = processes.from_betas(betas)
    a = np.cumprod(1 - betas)
    eps_hat, x_t = 0.3, jnp.array([[0.7, -1.1]])
    denoise = denoisers.from_network(lambda x, t: jnp.full_like(x, eps_hat), process, "eps")
    sigma = eta * np.sqrt((1 - a[1]) / (1 - a[3])) * np.sqrt(1 - a[3] / a[1])
    x0 = (x_t - np.sqrt(1 - a[3]) * eps_hat) / np.sqrt(a[3])
    z = jax.random.normal(jax.random.fold_in(KEY, 0), (2,))
    expected = np.sqrt(a[1]) * x0 + np.sqrt(1 - a[1] - sigma**2) * eps_hat + sigma * z
    x_s = ddim(process, denoise, eta).step(KEY, x_t, jnp.asarray(4 / 4), jnp.asarray(2 / 4))
    np.testing.assert_allclose(x_s, expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "cosine"])
def test_ddim_reaches_order_one(name):
    """Against the exact flow map of one Gaussian: y - mean shrinks as the std does."""
    process = PROCESSES[name]
    std = 0.4
    data = type(MIXTURE)([1.0], [[0.7, -0.2]], [std**2 * np.eye(2)])
    t_start, t_end = 0.9 * process.t_max, 0.05 * process.t_max
    x_t = noise(process)

    def spread(t):
        return jnp.sqrt((process.alpha(t) * std) ** 2 + process.variance(t))

    ends = jnp.asarray(t_start), jnp.asarray(t_end)
    centre = [process.alpha(t) * data.means[0][None] for t in ends]
    exact = centre[1] + spread(ends[1]) / spread(ends[0]) * (x_t - centre[0])
    run = jax.jit(lambda ts: sample(KEY, ddim(process, data.denoiser(process)), x_t, ts))
    sizes = np.array([128, 256, 512])
    errors = [
        float(jnp.abs(run(timesteps.log_snr(process, n, t_end, t_start)) - exact).max())
        for n in sizes
    ]
    order = -np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    print(f"order {order:.3f}, errors {errors}")
    assert order > 0.8


@pytest.mark.parametrize("make", [ancestral, SAMPLERS["ddim_0.5"], ddim], ids=["1", "0.5", "0"])
def test_samples_have_the_moments_of_the_mixture(make):
    n = 100_000
    sampler = make(VP, MIXTURE.denoiser(VP))
    ts = timesteps.log_snr(VP, 400)
    x = jax.jit(lambda key: sample(key, sampler, VP.prior_sample(KEY, (n, 2)), ts))(
        jax.random.key(5)
    )
    exact = MIXTURE.diffuse(VP, ts[-1])
    mean = exact.weights @ exact.means
    second = jnp.einsum("k,kij->ij", exact.weights, exact.covariances) + jnp.einsum(
        "k,ki,kj->ij", exact.weights, exact.means, exact.means
    )
    products = x[:, :, None] * x[:, None, :]
    z_mean = (x.mean(0) - mean) / (x.std(0) / np.sqrt(n))
    z_second = (products.mean(0) - second) / (products.std(0) / np.sqrt(n))
    print("standard errors off:", z_mean, z_second)
    assert jnp.abs(z_mean).max() < 4
    assert jnp.abs(z_second).max() < 4


# --- What the loop promises -----------------------------------------------------------------


def test_the_denoiser_is_traced_once_for_all_grids_and_hyper_parameters():
    traces = []

    @jax.jit
    def generate(process, key, x_T, ts, eta):
        exact = MIXTURE.denoiser(process)

        def denoise(x, t):
            traces.append(1)
            return exact(x, t)

        return sample(key, ddim(process, denoise, eta), x_T, ts)

    generate(processes.vp(0.1, 20.0), KEY, noise(VP), grid(VP), 0.0)
    generate(processes.vp(0.2, 10.0), KEY, noise(VP), timesteps.log_snr(VP, 6), 0.5)
    assert len(traces) == 1


def test_collect_stacks_what_it_is_given_and_only_that():
    sampler = ddim(VP, MIXTURE.denoiser(VP))
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
    sampler = ddim(VP, denoisers.from_network(network, VP, "v"))
    assert sample(KEY, sampler, x_T, grid(VP)).dtype == jnp.float32
    plain = ddim(VP, lambda x, t: x.astype(jnp.bfloat16))
    assert sample(KEY, plain, x_T, grid(VP)).dtype == jnp.float32


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
        call(samplers.ddim(VP, MIXTURE.denoiser(VP)))
