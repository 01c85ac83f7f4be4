import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import NO_SIGNAL_AT_END, PROCESSES

from jaxdiff import processes

each_process = pytest.mark.parametrize("name", PROCESSES)
VALUES = ("alpha", "variance", "sigma", "log_snr")
DERIVATIVES = ("alpha_dot", "sigma_dot", "drift", "diffusion_sq")


def grid(process, num=501, dtype=float):
    return jnp.linspace(0.0, process.t_max, num, dtype=dtype)


@each_process
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_nothing_is_nan_from_data_to_noise(name, dtype):
    process = PROCESSES[name]
    t = grid(process, 2001, dtype)
    for method in VALUES + DERIVATIVES:
        value = jax.jit(getattr(process, method))(t)
        assert value.dtype == dtype, method
        assert value.shape == t.shape, method
        assert not jnp.isnan(value).any(), method
        finite_inside = jnp.isfinite(value[1:-1]).all()
        assert finite_inside, method


@each_process
def test_alpha_falls_and_log_snr_falls_strictly(name):
    process = PROCESSES[name]
    t = grid(process)
    assert (jnp.diff(process.alpha(t)) <= 0).all()
    assert (jnp.diff(process.log_snr(t)) < 0).all()


@each_process
def test_time_of_log_snr_inverts_log_snr(name):
    process = PROCESSES[name]
    t = grid(process)
    back = process.time_of_log_snr(process.log_snr(t))
    np.testing.assert_allclose(back, t, atol=1e-12 * process.t_max)  # rounding of a log and an exp


@pytest.mark.parametrize("name", NO_SIGNAL_AT_END)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_end_without_signal_is_exact(name, dtype):
    process = PROCESSES[name]
    end = jnp.asarray(process.t_max, dtype)
    assert process.alpha(end) == 0.0
    assert process.log_snr(end) == -jnp.inf
    assert process.sigma(end) == 1.0


@each_process
def test_derivatives_are_those_of_finite_differences(name):
    process = PROCESSES[name]
    t = process.t_max * jnp.linspace(0.0555, 0.9455, 90)  # between the nodes of the chains
    step = 1e-6 * process.t_max
    for value, derivative in (("alpha", "alpha_dot"), ("sigma", "sigma_dot")):
        fn = getattr(process, value)
        difference = (fn(t + step) - fn(t - step)) / (2 * step)
        np.testing.assert_allclose(
            getattr(process, derivative)(t), difference, rtol=1e-6, atol=1e-8
        )


@each_process
def test_the_sde_has_the_marginal_variance(name):
    """d variance / dt = 2 drift variance + g^2: what Ito's formula asks of f and g."""
    process = PROCESSES[name]
    t = process.t_max * jnp.linspace(0.0555, 0.9455, 90)
    step = 1e-6 * process.t_max
    growth = (process.variance(t + step) - process.variance(t - step)) / (2 * step)
    expected = growth - 2 * process.drift(t) * process.variance(t)
    np.testing.assert_allclose(process.diffusion_sq(t), expected, rtol=1e-5)
    assert (process.diffusion_sq(t) > 0).all()


def test_vp_has_its_published_drift_and_diffusion():
    t = jnp.linspace(0.0, 1.0, 11)
    beta = 0.1 + t * 19.9
    np.testing.assert_allclose(processes.vp().drift(t), -beta / 2, rtol=1e-12)
    np.testing.assert_allclose(processes.vp().diffusion_sq(t), beta, rtol=1e-9)


def test_sub_vp_has_its_published_diffusion():
    t = jnp.linspace(0.01, 1.0, 11)
    beta, integral = 0.1 + t * 19.9, 0.1 * t + 19.9 * t**2 / 2
    expected = beta * (1 - jnp.exp(-2 * integral))
    np.testing.assert_allclose(processes.sub_vp().diffusion_sq(t), expected, rtol=1e-9)


def test_ve_has_its_published_diffusion():
    t = jnp.linspace(0.0, 1.0, 11)
    sigma = 0.01 * 5000.0**t
    np.testing.assert_allclose(processes.ve().drift(t), 0.0)
    np.testing.assert_allclose(
        processes.ve().diffusion_sq(t), 2 * sigma**2 * np.log(5000.0), rtol=1e-12
    )


def test_flow_has_its_published_drift_and_diffusion():
    t = jnp.linspace(0.0, 0.99, 11)
    np.testing.assert_allclose(processes.flow().drift(t), -1 / (1 - t), rtol=1e-12)
    np.testing.assert_allclose(processes.flow().diffusion_sq(t), 2 * t / (1 - t), rtol=1e-12)


def test_shifted_cosine_shifts_log_snr():
    t = jnp.linspace(0.01, 0.99, 99)
    difference = processes.cosine(-2.0).log_snr(t) - processes.cosine().log_snr(t)
    np.testing.assert_allclose(difference, -2.0, rtol=1e-11)
    total = processes.cosine(-2.0).alpha(t) ** 2 + processes.cosine(-2.0).variance(t)
    np.testing.assert_allclose(total, 1.0, rtol=1e-14)


@pytest.mark.parametrize("name", ["ddpm", "zero_snr"])
def test_chain_nodes_are_the_cumulative_products(name):
    process = PROCESSES[name]
    kept = np.concatenate([[1.0], np.cumprod(1.0 - np.asarray(process.betas))])
    nodes = jnp.arange(process.num_steps + 1) / process.num_steps
    np.testing.assert_allclose(process.alpha(nodes) ** 2, kept, rtol=1e-11)
    np.testing.assert_allclose(process.variance(nodes), 1 - kept, rtol=1e-11, atol=1e-15)


def _sigma_in_high_precision(name, t):
    """Sigma at one float32 time, in 50 digits, from the definitions."""
    mp, t = mpmath.mp, mpmath.mpf(float(t))
    if name in ("vp", "sub_vp"):
        integral = mpmath.mpf(0.1) * t + (mpmath.mpf(20.0) - mpmath.mpf(0.1)) * t**2 / 2
        kept = mp.exp(-integral)
        return mp.sqrt(1 - kept) if name == "vp" else 1 - kept
    if name == "ve":
        return mpmath.mpf(0.01) * (mpmath.mpf(50.0) / mpmath.mpf(0.01)) ** t
    if name.startswith("cosine"):
        shift = mpmath.mpf(-2.0 if name == "cosine_shifted" else 0.0)
        ratio = abs(mp.tan(mp.pi * t / 2)) * mp.exp(-shift / 2)
        return ratio / mp.sqrt(1 + ratio**2)
    if name in ("edm", "flow"):
        return t
    process = PROCESSES[name]
    position = t * process.num_steps
    index = min(int(mp.floor(position)), process.num_steps - 1)
    betas = np.asarray(process.betas)
    logs = [mp.log1p(-mpmath.mpf(beta)) for beta in betas[:index].tolist()]
    here = mp.log1p(-mpmath.mpf(float(betas[index])))
    return mp.sqrt(-mp.expm1(mpmath.fsum(logs) + (position - index) * here))


@each_process
def test_sigma_keeps_its_precision_in_float32(name):
    process = PROCESSES[name]
    float32 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), process)
    last = 0.98 if name == "zero_snr" else 1.0
    t = jnp.geomspace(1e-6, last * process.t_max, 25, dtype=jnp.float32)
    t = jnp.minimum(t, jnp.float32(process.t_max))
    with mpmath.workdps(50):
        exact = [float(_sigma_in_high_precision(name, value)) for value in t]
    np.testing.assert_allclose(float32.sigma(t), exact, rtol=1e-5)


@each_process
def test_prior_has_the_variance_of_t_max(name):
    process = PROCESSES[name]
    draws = process.prior_sample(jax.random.key(0), (100_000, 1))
    ratio = float(draws.var() / process.variance(jnp.asarray(process.t_max)))
    stderr = np.sqrt(2 / 100_000)
    print(f"variance ratio {ratio:.4f} +- {stderr:.4f}")
    assert abs(ratio - 1) < 4 * stderr
    few = process.prior_sample(jax.random.key(0), (3, 1))
    np.testing.assert_array_equal(few, draws[:3])


def test_hyper_parameters_are_traced_and_trainable():
    traces = []

    @jax.jit
    def sigma(process, t):
        traces.append(1)
        return process.sigma(t)

    assert sigma(processes.vp(0.1, 20.0), 0.5) != sigma(processes.vp(0.1, 10.0), 0.5)
    assert len(traces) == 1
    slope = jax.grad(lambda beta_max: processes.vp(0.1, beta_max).sigma(jnp.float64(0.0)))(20.0)
    assert slope == 0.0
    betas = jnp.full(10, 0.1)
    grads = jax.grad(lambda b: processes.from_betas(b).alpha(jnp.float64(1.0)))(betas)
    np.testing.assert_allclose(grads, -0.5 * 0.9**4, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: processes.vp(20.0, 0.1), "`beta_min`"),
        (lambda: processes.vp(-0.1, 20.0), "`beta_min`"),
        (lambda: processes.sub_vp(20.0, 0.1), "`beta_min`"),
        (lambda: processes.vp(0.1, float("nan")), "`beta_max`"),
        (lambda: processes.ve(50.0, 0.01), "`sigma_min`"),
        (lambda: processes.ve(0.0, 1.0), "`sigma_min`"),
        (lambda: processes.ve(1.0, 1.0), "`sigma_min`"),
        (lambda: processes.edm(0.0), "`sigma_max`"),
        (lambda: processes.cosine(float("inf")), "`log_snr_shift`"),
        (lambda: processes.from_betas([0.1, 0.0]), r"betas\[1\]=0.0"),
        (lambda: processes.from_betas([1.0, 0.1]), r"betas\[0\]=1.0"),
        (lambda: processes.from_betas([0.1, 1.1]), r"betas\[1\]=1.1"),
        (lambda: processes.from_betas([0.1, float("nan")]), r"betas\[1\]=nan"),
        (lambda: processes.from_betas([]), "`betas`"),
        (lambda: processes.from_betas(np.ones((2, 2)) * 0.1), "`betas`"),
        (lambda: processes.ddpm(0), "`num_steps`"),
        (lambda: processes.vp(np.ones(3), 20.0), "`beta_min` must be one number"),
    ],
)
def test_bad_hyper_parameters_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_hyper_parameters_of_a_wrong_type_are_refused():
    with pytest.raises(TypeError, match="`beta_min` must be a real number"):
        processes.vp("0.1", 20.0)
