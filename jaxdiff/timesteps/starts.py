"""Where a method may start, and the refusal of grids that start elsewhere."""

from typing import Any

import jax.numpy as jnp

from jaxdiff import checks, numerics, predictions
from jaxdiff.processes import Process

SIGNAL_START = -8.0
"""The log-SNR at which :func:`start` lets what needs signal begin: sigma/alpha = 55."""


def start(process: Process, needs_signal: Any) -> Any:
    """Return where a method starts: t_max, or the latest time with signal for what needs it.

    Samples start there, and the flow of a likelihood ends there.

    Args:
        process: its hyper-parameters may be traced.
        needs_signal: whether the method, or the denoiser, cannot be asked where alpha is 0, as
            `Sampler.needs_signal`, `Model.needs_signal` and those of denoisers say it.

    Returns:
        t_max; where alpha(t_max) = 0 and signal is needed, the time at which log-SNR is
        :data:`SIGNAL_START`.

    Raises:
        TypeError: if `process` is no process.
    """
    checks.process(process)
    if not needs_signal:
        return process.t_max
    alpha = numerics.known_value(process.alpha, process.t_max)
    if alpha is not None and alpha > 0.0:
        return process.t_max
    low = process.time_of_log_snr(jnp.asarray(SIGNAL_START, float))
    if alpha is not None:
        return low
    t_max = jnp.asarray(process.t_max, float)
    return jnp.where(process.alpha(t_max) > 0.0, t_max, low)


def check_start(process: Process, t_start: Any, needs_signal: str | None = None) -> None:
    """Refuse a known start past t_max, or at alpha = 0 for what needs signal.

    Args:
        process: whose time it is.
        t_start: the first time of a grid.
        needs_signal: who divides by alpha there, for the message; None if nobody does.

    Raises:
        ValueError: if it is either.
    """
    known, t_max = numerics.concrete(t_start), numerics.concrete(process.t_max)
    if known is None or t_max is None:
        return
    if known > t_max * (1 + 1e-6):
        raise ValueError(f"`ts` must lie in [0, t_max] = [0, {t_max:g}]; got {known:g}.")
    if needs_signal is not None:
        predictions.require_signal(process, t_start, needs_signal)
