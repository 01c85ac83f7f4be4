"""The probability flow by an adaptive solver, each row with its own steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff import checks, denoisers, probability_flow
from jaxdiff.probability_flow import check_tolerances
from jaxdiff.processes import Process
from jaxdiff.samplers.protocol import Sampler, follow_flow, solver
from jaxdiff.typing import Array, Key, PyTree

NOISE_LEFT = 1e-3
"""The noise level sigma / alpha from which a step to sigma = 0 goes on with constant x0_hat."""
CALLS_A_STEP = 6
"""Evaluations of a step of Tsit5, accepted or not: the first of its seven stages is known."""


class State(NamedTuple):
    """x (B, ...) and the evaluations that each row has asked for, (B,)."""

    x: Array
    calls: Array


def adaptive(
    process: Process,
    denoise: Any,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
    *,
    cond: PyTree = None,
) -> Sampler:
    """Make an adaptive solver (Tsit5) of the probability-flow ODE.

    A step of the grid is solved to the tolerance whatever its length, so a grid of two times,
    [t_max, 0], is enough; more times are places to look at the way. Each row is solved by itself,
    with its own steps, so rows do not change each other; the denoiser sees a leading batch axis
    of 1 under vmap, and is evaluated as often as the hardest row asks: ``info(state)["calls"]``
    is how often each did, but for what a rejected first step asks again at its start. A step to
    sigma = 0 stops at sigma / alpha = :data:`NOISE_LEFT` and returns x0_hat, an error of order
    NOISE_LEFT^2; one from sigma = 0 starts there.

    Args:
        process: the forward process.
        denoise: the denoiser, its conditioning one for all rows; or, with `cond`, one of
            (x_t, t, cond), such as `Model.denoiser` makes.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        max_steps: of the solver between two times of the grid; more is an error.
        cond: pytree of (B, ...) leaves, a row's own conditioning each.

    Raises:
        TypeError: if `denoise` is no function that takes what it is given, `max_steps` no whole
            number or a tolerance no real one.
        ValueError: if a known tolerance or `max_steps` is not positive; when sampling, if `cond`
            has not the rows of x_T.
        RuntimeError: when sampling, if `max_steps` do not do for a row.

    Source: Tsitouras 2011, by diffrax; the variables are those of `jaxdiff.probability_flow`.
    """
    rtol, atol, max_steps = check_tolerances(rtol, atol, max_steps)
    checks.process(process)
    if cond is None:
        judged = checks.judged("denoise", denoise, checks.DENOISER)
    else:
        judged = checks.judged("denoise", denoise, checks.CONDITIONAL_DENOISER, takes=3)

    @jax.jit  # traced once
    def field(theta: Array, y: Array, given: PyTree) -> Array:
        denoise = denoisers.conditioned(judged, jax.tree.map(lambda leaf: leaf[None], given))
        return probability_flow.vector_field(process, denoise)(theta, y[None])[0]

    def init(x: Array) -> State:
        checks.conditioning(cond, x.shape[0])
        return State(x, jnp.zeros(x.shape[0], jnp.int32))

    def step(key: Key, state: State, t: Array, s: Array) -> State:
        import diffrax  # here, so that only those who use it pay for it

        x_t = state.x
        ends = jnp.stack([t, s])
        least = process.time_of_log_snr(-2.0 * jnp.log(jnp.asarray(NOISE_LEFT, x_t.dtype)))
        start, stop = jnp.where(process.sigma(ends) > 0, ends, least)
        theta_start, theta_stop = probability_flow.angle(process, jnp.stack([start, stop]))
        x_start = follow_flow(process, x_t, x_t, t, start)  # scales x where sigma_t is 0

        def solve(row: Array, given: PyTree) -> tuple[Array, Array, Array]:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda theta, y, args: field(jnp.asarray(theta), y, given)),
                diffrax.Tsit5(),
                theta_start,
                theta_stop,
                dt0=None,
                y0=row,
                stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
                max_steps=max_steps,
                throw=False,
            )
            solved = solution.result == diffrax.RESULTS.successful
            return solution.ys[-1], solution.stats["num_steps"], solved

        def denoised(row: Array, given: PyTree) -> Array:
            return probability_flow.x0_hat(theta_stop, row, field(theta_stop, row, given))

        y_start = x_start / probability_flow.radius(process, start)
        y, num_steps, solved = jax.vmap(solve)(y_start, cond)
        y = probability_flow.require_solved(y, solved, max_steps)
        noisy = process.sigma(s) > 0
        x_s = jax.lax.cond(
            noisy,
            lambda: probability_flow.radius(process, stop) * y,
            lambda: jax.vmap(denoised)(y, cond),
        )
        calls = 1 + CALLS_A_STEP * num_steps + jnp.where(noisy, 0, 1)
        return State(x_s, state.calls + calls)

    return solver(
        process,
        judged,
        step,
        init=init,
        value=lambda state: state.x,
        replace=lambda state, x: state._replace(x=x),
        deterministic=True,
        calls=None,
        info=lambda state: {"calls": state.calls},
    )
