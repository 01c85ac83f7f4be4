"""The probability flow by an adaptive solver, each row with its own steps."""

import jax
import jax.numpy as jnp

from jaxdiff import probability_flow
from jaxdiff.probability_flow import check_tolerances
from jaxdiff.processes import Process
from jaxdiff.samplers.protocol import Sampler, follow_flow, solver, taken
from jaxdiff.typing import Array, Denoiser, Key

NOISE_LEFT = 1e-3
"""The noise level sigma / alpha from which a step to sigma = 0 goes on with constant x0_hat."""


def adaptive(
    process: Process,
    denoise: Denoiser,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
) -> Sampler:
    """Make an adaptive solver (Tsit5) of the probability-flow ODE.

    A step of the grid is solved to the tolerance whatever its length, so a grid of two times,
    [t_max, 0], is enough; more times are places to look at the way. Each row is solved by itself,
    with its own steps, so rows do not change each other; the denoiser sees a leading batch axis
    of 1 under vmap, and is evaluated as often as the hardest row asks. A step to sigma = 0 stops
    at sigma / alpha = :data:`NOISE_LEFT` and returns x0_hat, an error of order NOISE_LEFT^2; one
    from sigma = 0 starts there.

    Args:
        process: the forward process.
        denoise: the denoiser; its conditioning is one for all rows.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        max_steps: of the solver between two times of the grid; more is an error.

    Raises:
        TypeError: if `max_steps` is no whole number or a tolerance no real one.
        ValueError: if a known tolerance or `max_steps` is not positive.

    Source: Tsitouras 2011, by diffrax; the variables are those of `jaxdiff.probability_flow`.
    """
    rtol, atol, max_steps = check_tolerances(rtol, atol, max_steps)
    denoise = taken(process, denoise)
    field = jax.jit(probability_flow.vector_field(process, denoise))  # traced once

    def step(key: Key, x_t: Array, t: Array, s: Array) -> Array:
        import diffrax  # here, so that only those who use it pay for it

        ends = jnp.stack([t, s])
        least = process.time_of_log_snr(-2.0 * jnp.log(jnp.asarray(NOISE_LEFT, x_t.dtype)))
        start, stop = jnp.where(process.sigma(ends) > 0, ends, least)
        theta_start, theta_stop = probability_flow.angle(process, jnp.stack([start, stop]))
        x_start = follow_flow(process, x_t, x_t, t, start)  # scales x where sigma_t is 0

        def solve(row: Array) -> Array:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda theta, y, args: field(jnp.asarray(theta), y[None])[0]),
                diffrax.Tsit5(),
                theta_start,
                theta_stop,
                dt0=None,
                y0=row,
                stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
                max_steps=max_steps,
            )
            return solution.ys[-1]

        def denoised(row: Array) -> Array:
            return probability_flow.x0_hat(theta_stop, row, field(theta_stop, row[None])[0])

        y = jax.vmap(solve)(x_start / probability_flow.radius(process, start))
        return jax.lax.cond(
            process.sigma(s) > 0,
            lambda: probability_flow.radius(process, stop) * y,
            lambda: jax.vmap(denoised)(y),
        )

    return solver(process, denoise, step, deterministic=True)
