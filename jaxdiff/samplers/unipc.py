"""UniPC: a multistep predictor and a corrector that costs no evaluation of its own."""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff import checks
from jaxdiff.processes import Process
from jaxdiff.samplers.multistep import (
    History,
    extrapolate,
    half_log_snr,
    interpolant_change,
    usable_nodes,
)
from jaxdiff.samplers.protocol import Sampler, follow_flow, solver, taken
from jaxdiff.typing import Array, Denoiser, Key

NEAR = 0.05
"""The part of a step, in log-SNR, within which an earlier output gives no slope.

Outputs are of points before they are corrected, so a slope through two of them holds how far two
predictions were off, over their distance. Where that is small, errors would grow from step to step.
"""


class State(NamedTuple):
    """Where the predictor went, and what the corrector needs to go there again.

    Attributes:
        x: (B, ...), the predictor's output.
        start: (B, ...), where its step began.
        history: of outputs, the newest at the start of that step.
        corrects: whether x is still what the predictor made of `start`, ().
    """

    x: Array
    start: Array
    history: History
    corrects: Array


def unipc(process: Process, denoise: Denoiser, order: int = 3) -> Sampler:
    """Make UniPC (bh2, data prediction): order p + 1 by one evaluation a step.

    The evaluation at a predicted point first corrects that point, then serves the next
    prediction; so N steps cost N evaluations, there is none after the last step, and the sample is
    the last predictor's output. With B_2(h) = e^-h - 1 and a_1 = 1/2 for UniP-2 and UniC-1, UniP-2
    is DPM-Solver++(2M) and the others integrate the interpolant exactly. Orders rise 1, 2, 3 as
    outputs gather; the step to sigma = 0 returns x0_hat.

    Args:
        process: the forward process.
        denoise: the denoiser.
        order: p in 1, 2, 3, that of the predictor.

    Raises:
        ValueError: if `order` is another.

    Source: Zhao et al. 2023 (arXiv:2302.04867), algorithms 5 and 6 and section 3.4.
    """
    checks.choice("order", order, (1, 2, 3))
    denoise = taken(process, denoise)

    def init(x: Array) -> State:
        return State(x, x, History.empty(x, order), jnp.asarray(False))

    def correct(state: State, x0_hat: Array, t: Array) -> Array:
        """Take the step that led to t again, with the output that is known there now."""
        outputs, times, _ = state.history
        before = half_log_snr(process, times[0])
        length = half_log_snr(process, t) - before
        x_t = follow_flow(process, state.start, outputs[0], times[0], t)
        # the first order also has a limit where the step came from alpha = 0: weight 1/2
        weight = -jnp.expm1(-jnp.where(length > -jnp.inf, length, 0.0))
        change = 0.5 * weight * (x0_hat - outputs[0])
        if order > 1:
            finite = jnp.isfinite(length)
            h = jnp.where(finite, length, 1.0)
            positions = half_log_snr(process, times) - before
            nodes, usable = usable_nodes(state.history, positions, 1, h, NEAR)
            values = [outputs[0], x0_hat, *outputs[1:]]
            terms = interpolant_change(values, [jnp.zeros_like(h), h, *nodes], h)
            total = terms[0]
            for term, good in zip(terms[1:], usable, strict=True):
                total = total + jnp.where(good, term, 0.0)
            change = jnp.where(finite & usable[0], total, change)
        return x_t + process.alpha(t) * change

    def step(key: Key, state: State, t: Array, s: Array) -> State:
        x0_hat = denoise(state.x, t)
        x_t = jnp.where(state.corrects, correct(state, x0_hat, t), state.x)
        x_s = follow_flow(process, x_t, x0_hat, t, s)
        history = state.history.apart_from(t, s, NEAR, partial(half_log_snr, process))
        x_s += process.alpha(s) * extrapolate(process, history, x0_hat, t, s, order, NEAR)
        return State(x_s, x_t, history.push(x0_hat, t), jnp.asarray(True))

    return solver(
        process,
        denoise,
        step,
        init=init,
        value=lambda state: state.x,
        replace=lambda state, x: state._replace(x=x, corrects=jnp.asarray(False)),
        deterministic=True,
    )
