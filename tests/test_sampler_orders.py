"""Samplers against the exact flow of a mixture, and the orders at which they approach it.

In one dimension the probability flow moves quantiles: x_s = F_s^-1(F_t(x_t)), F the distribution
function of the diffused mixture. No solver stands between a sampler and that answer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NO_SIGNAL_AT_END, PROCESSES, chosen, few, known
from sampler_cases import ASKS_AT_OTHER_TIMES, DETERMINISTIC, DIVIDES_BY_ALPHA, KEY
from scipy.special import ndtr

from jaxdiff import Mixture, sample, samplers, timesteps
from jaxdiff.samplers import encode

MIXTURE = Mixture(np.array([0.3, 0.7]), np.array([[-1.0], [0.8]]), np.array([[[0.05]], [[0.1]]]))
QUANTILES = np.array([0.05, 0.2, 0.4, 0.7, 0.95])
SIZES = np.array([64, 128, 256])
ORDERS = {
    "ddim": 1,
    "euler": 1,
    "heun": 2,
    "edm": 2,
    **{f"dpm_solver_pp_{p}": p for p in (1, 2, 3)},
    **{f"unipc_{p}": p + 1 for p in (1, 2, 3)},
    **{f"deis_{p}": p for p in (2, 3, 4)},
}
PROCESS_NAMES = ("vp", "edm", "flow", "cosine")
# From alpha = 0 the first step is infinite in log-SNR and of first order, an error of order
# (alpha / sigma)^2 at its end; only a corrector takes it away.
AS_OTHERS = ("dpm_solver_pp_1", "unipc_1", "deis_2")  # DDIM, and orders of families that are here
LIMITED = ("dpm_solver_pp_3", "deis_3", "deis_4")


@functools.cache
def quantiles(name, t):
    """The points of QUANTILES at time t (5, 1), by bisection of the distribution function."""
    alpha, variance = (float(f(t)) for f in (PROCESSES[name].alpha, PROCESSES[name].variance))
    means = alpha * np.asarray(MIXTURE.means)[:, 0]
    stds = np.sqrt(alpha**2 * np.asarray(MIXTURE.covariances)[:, 0, 0] + variance)
    low, high = np.full(QUANTILES.shape, -400.0), np.full(QUANTILES.shape, 400.0)
    for _ in range(80):
        middle = 0.5 * (low + high)
        below = ndtr((middle[:, None] - means) / stds) @ np.asarray(MIXTURE.weights) < QUANTILES
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low[:, None]


@functools.cache
def program_of(sampler, encodes):
    """Return largest errors for a stack of grids, compiled once for all processes."""

    @jax.jit
    def errors(process, grids, first, last):
        made = DETERMINISTIC[sampler](process, MIXTURE.denoiser(process))

        def error(ts):
            end = encode(made, first, ts) if encodes else sample(KEY, made, first, ts)
            return jnp.abs(end - last).max()

        return jax.lax.map(error, grids)

    return errors


def errors_of(sampler, name, grids, encodes=False):
    """Return the largest error of a sampler along each of some grids between the same times."""
    if sampler in ASKS_AT_OTHER_TIMES:
        process = chosen(name, PROCESS_NAMES)
    else:
        process = known(name, grids, length=512)
    first, last = quantiles(name, grids[0, 0]), quantiles(name, grids[0, -1])
    return program_of(sampler, encodes)(process, grids, first, last)


def padded_grids(sampler, name):
    """Return grids of SIZES steps between t_max and log-SNR 2, steps of no length behind them."""
    process = PROCESSES[name]
    t_end = process.time_of_log_snr(jnp.asarray(2.0))
    late = name in NO_SIGNAL_AT_END and sampler in DIVIDES_BY_ALPHA
    t_start = process.time_of_log_snr(jnp.asarray(-8.0)) if late else None
    grids = [timesteps.log_snr(process, n, t_end, t_start) for n in SIZES]
    return np.stack([np.pad(ts, (0, SIZES[-1] + 1 - len(ts)), mode="edge") for ts in grids])


def order_of(errors):
    order = np.log2(errors[-2] / errors[-1])
    print(f"order {order:.3f}, errors {errors}")
    return order


@pytest.mark.parametrize("name", PROCESS_NAMES)
@pytest.mark.parametrize("sampler", few(ORDERS, set(ORDERS) - set(AS_OTHERS)))
def test_samplers_reach_their_order(sampler, name):
    if sampler in LIMITED and name in NO_SIGNAL_AT_END:
        return
    order = order_of(errors_of(sampler, name, padded_grids(sampler, name)))
    assert order > ORDERS[sampler] - 0.2


@pytest.mark.parametrize("sampler", LIMITED)
def test_third_order_is_limited_by_an_infinite_first_step(sampler):
    """What the docstrings say: equal steps of t from alpha = 0 give order 2."""
    flow = PROCESSES["flow"]
    grids = [timesteps.uniform(flow, n, t_end=0.2) for n in SIZES]
    grids = np.stack([np.pad(ts, (0, SIZES[-1] + 1 - len(ts)), mode="edge") for ts in grids])
    assert order_of(errors_of(sampler, "flow", grids)) > 1.8


@pytest.mark.parametrize("name", ["vp", "flow"])
@pytest.mark.parametrize("sampler", few(ORDERS, ["ddim", "heun", "unipc_3"]))
def test_encoding_reaches_the_order_up_to_2_that_its_start_allows(sampler, name):
    grids = padded_grids("edm", name)[:, ::-1]  # leads with steps of no length, not t_max
    order = order_of(errors_of(sampler, name, grids, encodes=True))
    assert order > min(ORDERS[sampler], 2) - 0.2


@jax.jit
def adaptive_errors(process, ts, first, last):
    """Return what `adaptive` is off, there and back."""
    made = samplers.adaptive(process, MIXTURE.denoiser(process), 1e-9, 1e-9)
    there, back = sample(KEY, made, first, ts), encode(made, last, ts[::-1])
    return jnp.abs(there - last).max(), jnp.abs(back - first).max()


@pytest.mark.parametrize("name", few(["vp", "flow"], ["flow"]))
def test_adaptive_is_as_exact_as_its_tolerance(name):
    def errors(*ts):
        ends = [quantiles(name, t) for t in ts]
        return adaptive_errors(PROCESSES[name], np.array(ts), *ends)

    inside = errors(1.0, 0.1)
    print("errors", *inside)
    assert max(inside) < 1e-7
    to_data = errors(1.0, 0.0)
    print("errors to sigma = 0", *to_data)
    assert max(to_data) < 3e-5  # the noise that is left, squared, by the slopes of the flow


@pytest.mark.parametrize("sampler", ["heun", "unipc_3"])
def test_encoding_from_no_noise_is_finite_and_nearly_exact(sampler):
    """On three grids, for the program of the test of order."""
    ts = timesteps.quadratic(PROCESSES["vp"], SIZES[-1], t_start=0.999)[::-1]
    grids = np.repeat(np.asarray(ts)[None], 3, axis=0)
    error = float(errors_of(sampler, "vp", grids, encodes=True)[0])
    print(f"error {error:.1e}")
    assert error < (0.05 if ORDERS[sampler] == 1 else 5e-3)
