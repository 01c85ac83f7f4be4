"""DPM-Solver++: multistep exponential integrators of the probability flow and the reverse SDE."""

import jax.numpy as jnp

from jaxdiff import checks, forward, numerics
from jaxdiff.processes import Process
from jaxdiff.samplers.multistep import (
    State,
    extrapolate,
    midpoint_change,
    multistep_solver,
    predictor_nodes,
)
from jaxdiff.samplers.protocol import Sampler, follow_flow, taken
from jaxdiff.typing import Array, Denoiser, Key


def dpm_solver_pp(process: Process, denoise: Denoiser, order: int = 2) -> Sampler:
    """Make the multistep DPM-Solver++: one evaluation a step.

    The order of a step rises 1, 2, 3 as outputs gather; the step to sigma = 0 returns x0_hat.
    Order 1 is DDIM. Order 2 is the midpoint form, 2M. Order 3 integrates the quadratic through
    the last three outputs exactly: the published 3M has half of the second-difference term that
    this needs, and measures order 2. Order 3 is reached on grids from t_max, where x0_hat hardly
    changes yet; from an intermediate time the first-order start limits it to 2.

    Args:
        process: the forward process.
        denoise: the denoiser.
        order: 1, 2 or 3.

    Raises:
        ValueError: if `order` is another.

    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2 and appendix B.
    """
    checks.choice("order", order, (1, 2, 3))
    denoise = taken(process, denoise)

    def step(key: Key, state: State, t: Array, s: Array) -> State:
        x0_hat = denoise(state.x, t)
        x_s = follow_flow(process, state.x, x0_hat, t, s)
        history = state.history.apart_from(t, s)
        x_s += process.alpha(s) * extrapolate(process, history, x0_hat, t, s, order)
        return State(x_s, history.push(x0_hat, t))

    return multistep_solver(process, denoise, step, order - 1, deterministic=True)


def dpm_solver_pp_sde(process: Process, denoise: Denoiser) -> Sampler:
    """Make SDE-DPM-Solver++(2M), a multistep solver of the reverse SDE: one evaluation a step.

    A step draws from q(x_s | x_t, x0_hat), as `ancestral` does, with x0_hat extrapolated to the
    middle of the step from the last two outputs. The first step is of order 1; the one to
    sigma = 0 returns x0_hat.

    Args:
        process: the forward process.
        denoise: the denoiser.

    Source: Lu et al. 2022 (arXiv:2211.01095), section 5 and appendix D.
    """
    denoise = taken(process, denoise)

    def step(key: Key, state: State, t: Array, s: Array) -> State:
        x0_hat = denoise(state.x, t)
        history = state.history.apart_from(t, s)
        nodes, usable, h = predictor_nodes(process, history, t, s)
        values = [x0_hat, history.outputs[0]]
        middle = x0_hat + jnp.where(usable[0], midpoint_change(values, nodes, h), 0.0)
        mean, std = forward.posterior(process, state.x, middle, t, s)
        return State(mean + std * numerics.normal(key, mean), history.push(x0_hat, t))

    return multistep_solver(process, denoise, step, 1)
