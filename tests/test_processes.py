import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import NO_SIGNAL_AT_END
from cases import PROCESSES as WHOLE

from jaxdiff import numerics, processes
from jaxdiff.processes import Process

PROCESSES = WHOLE | {
    "cosine_until": processes.until(processes.cosine(), 0.9),
    "edm_until": processes.until(processes.edm(), 40.0),
}
each_process = pytest.mark.parametrize("name", PROCESSES)
VALUES = ("alpha", "variance", "sigma", "log_snr")
DERIVATIVES = ("alpha_dot", "sigma_dot", "drift", "diffusion_sq")


STEP = 1e-6
MIDDLE = np.linspace(0.0555, 0.9455, 90)  # between the nodes of the chains
TIMES = {  # as fractions of t_max
    "grid": np.linspace(0.0, 1.0, 2001),
    "middle": MIDDLE,
    "before": MIDDLE - STEP,
    "after": MIDDLE + STEP,
}


@functools.cache
def evaluate(name, times="grid", dtype="float64"):
    """Return {method: values} at all times of that kind; one compiled program gives all kinds."""
    if times != "all":
        ends = np.cumsum([0] + [part.size for part in TIMES.values()])
        first = list(TIMES).index(times)
        part = slice(ends[first], ends[first + 1])
        return {key: value[part] for key, value in evaluate(name, "all", dtype).items()}
    process = PROCESSES[name]

    @jax.jit
    def all_methods(t):
        values = {method: getattr(process, method)(t) for method in VALUES + DERIVATIVES}
        return values | {"t": t, "back": process.time_of_log_snr(values["log_snr"])}

    t = process.t_max * np.concatenate(list(TIMES.values()))
    return jax.device_get(all_methods(jnp.asarray(t, dtype)))


@each_process
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_nan_from_data_to_noise(name, dtype):
    values = evaluate(name, "grid", dtype)
    for method in VALUES + DERIVATIVES:
        value = values[method]
        assert value.dtype == dtype, method
        assert value.shape == (2001,), method
        assert not np.isnan(value).any(), method
        assert np.isfinite(value[1:-1]).all(), method


@each_process
@pytest.mark.parametrize("method", ["alpha", "sigma", *DERIVATIVES])
def test_float32_agrees_with_float64(name, method):
    """At nodes of a chain too, where a rounded time must not fall into the next interval."""
    single, double = (evaluate(name, "grid", dtype) for dtype in ("float32", "float64"))
    inside = slice(1, -1)  # at the ends slopes may be infinite
    np.testing.assert_allclose(single[method][inside], double[method][inside], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("num_steps", [50, 100, 1000])
def test_slopes_of_a_chain_at_its_nodes_are_those_of_the_step_down(num_steps):
    betas = np.linspace(1e-4, 0.02, num_steps)
    chain = jax.tree.map(lambda leaf: leaf.astype(np.float32), processes.from_betas(betas))
    nodes = jnp.linspace(1.0, 0.0, num_steps + 1, dtype=jnp.float32)[:-1][::-1]
    expected = 0.5 * num_steps * np.log1p(-betas)
    np.testing.assert_allclose(jax.jit(chain.drift)(nodes), expected, rtol=2e-3)


@numerics.pytree_dataclass
class OnesOwn(Process):
    """A process of which no inverse is given."""

    scale: Any

    def alpha(self, t):
        return jnp.cos(0.5 * jnp.pi * t)

    def variance(self, t):
        return (self.scale * jnp.sin(0.5 * jnp.pi * t)) ** 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_process_without_a_closed_form_finds_the_time_of_a_log_snr(dtype):
    process = OnesOwn(1.0)
    log_snr = jnp.asarray([-jnp.inf, -20.0, -1.0, 0.0, 3.0, 25.0, jnp.inf], dtype)
    t = jax.jit(process.time_of_log_snr)(log_snr)
    assert t.dtype == dtype
    rtol = 1e-5 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(t, PROCESSES["cosine"].time_of_log_snr(log_snr), rtol, rtol)
    assert (t[0], t[-1]) == (1.0, 0.0)


def test_the_time_of_a_log_snr_has_the_slope_of_the_inverse():
    def time(scale, log_snr):
        return OnesOwn(scale).time_of_log_snr(log_snr)

    t, (by_scale, by_log_snr) = jax.jit(jax.value_and_grad(time, argnums=(0, 1)))(1.0, 0.7)
    slope = 1.0 / jax.jit(jax.grad(OnesOwn(1.0).log_snr))(t)
    np.testing.assert_allclose(by_log_snr, slope, rtol=1e-9)
    np.testing.assert_allclose(by_scale, 2.0 * slope, rtol=1e-9)


@each_process
def test_alpha_falls_and_log_snr_falls_strictly(name):
    values = evaluate(name)
    assert (np.diff(values["alpha"]) <= 0).all()
    with np.errstate(invalid="raise"):  # an infinite end is no neighbour of another
        assert (np.diff(values["log_snr"]) < 0).all()


@each_process
def test_time_of_log_snr_inverts_log_snr(name):
    values = evaluate(name)
    t_max = PROCESSES[name].t_max
    # rounding of a log and an exp
    np.testing.assert_allclose(values["back"], values["t"], atol=1e-12 * t_max)


@pytest.mark.parametrize("name", NO_SIGNAL_AT_END)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_end_without_signal_is_exact(name, dtype):
    values = evaluate(name, "grid", dtype)
    assert values["alpha"][-1] == 0.0
    assert values["log_snr"][-1] == -np.inf
    assert values["sigma"][-1] == 1.0


def difference(name, method):
    """Return the central difference of a method at the middle times."""
    rise = evaluate(name, "after")[method] - evaluate(name, "before")[method]
    return rise / (2 * STEP * PROCESSES[name].t_max)


@each_process
def test_derivatives_are_those_of_finite_differences(name):
    values = evaluate(name, "middle")
    for value, derivative in (("alpha", "alpha_dot"), ("sigma", "sigma_dot")):
        np.testing.assert_allclose(
            values[derivative], difference(name, value), rtol=1e-6, atol=1e-8
        )


@each_process
def test_the_sde_has_the_marginal_variance(name):
    """d variance / dt = 2 drift variance + g^2: what Ito's formula asks of f and g."""
    values = evaluate(name, "middle")
    expected = difference(name, "variance") - 2 * values["drift"] * values["variance"]
    np.testing.assert_allclose(values["diffusion_sq"], expected, rtol=1e-5)
    assert (values["diffusion_sq"] > 0).all()


def test_vp_has_its_published_drift_and_diffusion():
    values = evaluate("vp")
    beta = 0.1 + values["t"] * 19.9
    np.testing.assert_allclose(values["drift"], -beta / 2, rtol=1e-12)
    np.testing.assert_allclose(values["diffusion_sq"], beta, rtol=1e-9)


def test_sub_vp_has_its_published_diffusion():
    values = evaluate("sub_vp")
    t = values["t"]
    beta, integral = 0.1 + t * 19.9, 0.1 * t + 19.9 * t**2 / 2
    expected = beta * (1 - np.exp(-2 * integral))
    np.testing.assert_allclose(values["diffusion_sq"][20:], expected[20:], rtol=1e-9)


def test_ve_has_its_published_diffusion():
    values = evaluate("ve")
    sigma = 0.01 * 5000.0 ** values["t"]
    np.testing.assert_allclose(values["drift"], 0.0)
    np.testing.assert_allclose(values["diffusion_sq"], 2 * sigma**2 * np.log(5000.0), rtol=1e-12)


def test_flow_has_its_published_drift_and_diffusion():
    values = {key: value[:1981] for key, value in evaluate("flow").items()}  # t up to 0.99
    t = values["t"]
    np.testing.assert_allclose(values["drift"], -1 / (1 - t), rtol=1e-12)
    np.testing.assert_allclose(values["diffusion_sq"], 2 * t / (1 - t), rtol=1e-12)


def test_shifted_cosine_shifts_log_snr():
    plain, shifted = evaluate("cosine"), evaluate("cosine_shifted")
    inside = slice(20, 1981)
    shift = shifted["log_snr"][inside] - plain["log_snr"][inside]
    np.testing.assert_allclose(shift, -2.0, rtol=1e-11)
    total = shifted["alpha"] ** 2 + shifted["variance"]
    np.testing.assert_allclose(total, 1.0, rtol=1e-14)


@pytest.mark.parametrize("name", ["ddpm", "zero_snr"])
def test_chain_nodes_are_the_cumulative_products(name):
    process = PROCESSES[name]
    kept = np.concatenate([[1.0], np.cumprod(1.0 - np.asarray(process.betas))])
    nodes = np.arange(process.num_steps + 1) / process.num_steps
    alpha, variance = jax.jit(lambda process, t: (process.alpha(t), process.variance(t)))(
        process, nodes
    )
    np.testing.assert_allclose(alpha**2, kept, rtol=1e-11)
    np.testing.assert_allclose(variance, 1 - kept, rtol=1e-11, atol=1e-15)


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
    if name in ("edm", "edm_until", "flow"):
        return t
    process = PROCESSES[name]
    position = t * process.num_steps
    index = min(int(mp.floor(position)), process.num_steps - 1)
    logs = _log_steps_in_high_precision(name)
    here = mpmath.fsum(logs[:index]) + (position - index) * logs[index]
    return mp.sqrt(-mp.expm1(here))


@functools.cache
def _log_steps_in_high_precision(name):
    """Logs of 1 - beta, the last step to zero signal left out."""
    betas = np.asarray(PROCESSES[name].betas).tolist()
    return [mpmath.mp.log1p(-mpmath.mpf(beta)) for beta in betas if beta < 1.0]


@each_process
def test_sigma_keeps_its_precision_in_float32(name):
    process = PROCESSES[name]
    float32 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), process)
    last = 0.98 if name == "zero_snr" else 1.0
    t = np.geomspace(1e-6, last * process.t_max, 25).astype(np.float32)
    t = np.minimum(t, np.float32(process.t_max))
    with mpmath.workdps(50):
        exact = [float(_sigma_in_high_precision(name, value)) for value in t]
    sigma = jax.jit(lambda process, t: process.sigma(t))(float32, t)
    assert sigma.dtype == jnp.float32
    np.testing.assert_allclose(sigma, exact, rtol=1e-5)


@each_process
def test_prior_has_the_variance_of_t_max(name):
    process = PROCESSES[name]
    draws = process.prior_sample(jax.random.key(0), (100_000, 1))
    ratio = float(np.var(draws) / evaluate(name)["variance"][-1])
    stderr = np.sqrt(2 / 100_000)
    print(f"variance ratio {ratio:.4f} +- {stderr:.4f}")
    assert abs(ratio - 1) < 4 * stderr
    few = process.prior_sample(jax.random.key(0), (3, 1))
    np.testing.assert_array_equal(few, draws[:3])


def test_noise_of_an_earlier_time_has_the_variance_of_that_time():
    edm = PROCESSES["edm"]
    late, early = (edm.prior_sample(jax.random.key(0), (5, 2), t=t) for t in (None, 20.0))
    np.testing.assert_allclose(early, late * 20.0 / 80.0, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p: p.prior_sample(jax.random.key(0), (2, 1), t=1.5), "`t` must lie in"),
        (lambda p: p.prior_sample(jax.random.key(0), (2, 1), t=-0.5), "`t` must lie in"),
        (lambda p: p.prior_sample(jax.random.key(0), ()), "`shape`"),
        (lambda p: p.prior_sample(jax.random.key(0), 8), "`shape` must be a tuple"),
        (lambda p: p.prior_sample(jax.random.key(0), (2.5, 1)), r"`shape\[0\]`"),
        (lambda p: p.prior_sample(0, (2, 1)), "`key` must be a typed key"),
        (lambda p: p.prior_sample(jax.random.key(0), (2, 1), dtype=int), "`dtype`"),
        (lambda p: processes.ddpm(2.5), "`num_steps` must be a whole number"),
        (lambda p: processes.from_betas(["a"]), "`betas` must hold real numbers"),
    ],
)
def test_what_no_noise_or_chain_is_made_of_is_refused(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call(PROCESSES["vp"])


def test_processes_of_different_kinds_are_different_pytrees():
    """Otherwise a jitted function of a process may run what was compiled for another kind."""
    structures = {type(p): jax.tree.structure(p) for p in PROCESSES.values()}
    for one, other in itertools.combinations(structures, 2):
        assert structures[one] != structures[other], (one, other)


def test_a_process_that_ends_early_is_the_process_and_its_end_may_be_traced():
    cosine, t = WHOLE["cosine"], jnp.linspace(0.1, 0.9, 5)

    @jax.jit
    def values(process, t):
        return [getattr(process, method)(t) for method in VALUES + DERIVATIVES], process.t_max

    (whole, _), (ended, end) = values(cosine, t), values(processes.until(cosine, 0.9), t)
    for found, expected in zip(ended, whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert end == 0.9
    for wrong in (0.0, -1.0, 1.1, np.nan):
        with pytest.raises(ValueError, match="`t_max` must lie in"):
            processes.until(cosine, wrong)
    with pytest.raises(TypeError, match="`process` must be a process"):
        processes.until(processes.cosine, 0.5)
    assert jax.jit(lambda end: processes.until(cosine, end).t_max)(0.3) == 0.3


def test_hyper_parameters_are_traced_and_trainable():
    traces = []

    @jax.jit
    def sigma(process, t):
        traces.append(1)
        return process.sigma(t)

    assert sigma(processes.vp(0.1, 20.0), 0.5) != sigma(processes.vp(0.1, 10.0), 0.5)
    assert len(traces) == 1
    slope = jax.jit(jax.grad(lambda beta_max: processes.vp(0.1, beta_max).sigma(0.0)))(20.0)
    assert slope == 0.0
    grads = jax.jit(jax.grad(lambda b: processes.from_betas(b).alpha(1.0)))(np.full(10, 0.1))
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
