"""The flow of a trained model: where its likelihood begins and ends, and what if it does not end.

Every check that can be made before training is made here too: a likelihood that cannot be taken is
refused before the first step.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from experiments.common.command import Refusal
from jaxdiff import predictions, processes, timesteps
from jaxdiff.processes import Process
from jaxdiff.typing import Array


class Unsolved(Exception):
    """The solver of a likelihood gave up; the message says what would help."""


def until_start(process: Process, prediction: str) -> Process:
    """Return the process as far as the samples of a network start: its likelihood ends there."""
    start = timesteps.start(process, prediction in predictions.SIGNAL_NEEDED)
    return process if start is process.t_max else processes.until(process, start)


def data_end(process: Process, log_snr: Any) -> Array:
    """Return the time at which the flow of a likelihood begins, 0 where there is no such noise."""
    return jnp.maximum(process.time_of_log_snr(log_snr), 0.0)


def check_ends(process: Process, prediction: str, log_snr_low: float, log_snr_high: float) -> None:
    """Refuse bounds of log-SNR between which no model can be trained or judged.

    Raises:
        Refusal: if they are not in order, or the cleanest times are noisier than the noise that
            samples start from.
    """
    if not log_snr_low < log_snr_high:
        raise Refusal(
            f"--log-snr-low must be below --log-snr-high; got {log_snr_low} and {log_snr_high}."
        )
    ended = until_start(process, prediction)
    lowest = float(ended.log_snr(jnp.asarray(ended.t_max, float)))
    if not lowest < log_snr_high:
        raise Refusal(
            f"--log-snr-high must be above {lowest:.3g}, the log-SNR that samples start from; "
            f"got {log_snr_high}."
        )


@contextlib.contextmanager
def solving() -> Iterator[None]:
    """Turn a solver's end without a solution into `Unsolved`; its screens of text are not shown.

    Raises:
        Unsolved: in place of the solver's error; other errors are as they are.
    """
    log = logging.getLogger("jax._src.callback")  # which logs what is raised below, at length
    before, log.disabled = log.disabled, True
    try:
        yield
    except RuntimeError as error:
        if "solver steps" not in str(error):
            raise
        raise Unsolved(
            "the solver of its flow took the most steps that it may and had not ended. The "
            "network's output is too rough for the tolerance: train longer, or give `evaluate` a "
            "larger --eval-tolerance"
        ) from error
    finally:
        log.disabled = before
