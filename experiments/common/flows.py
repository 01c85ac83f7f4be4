"""The flow of a trained model: where its likelihood begins and ends, and what if it does not end.

Every check that can be made before training is made here too: a likelihood that cannot be taken is
refused before the first step.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.command import Refusal
from jaxdiff import likelihood, predictions, processes, timesteps
from jaxdiff.processes import Process
from jaxdiff.training import distributed, parallel
from jaxdiff.typing import Array, PyTree

LONGER = "train longer, or give `evaluate` a larger --eval-tolerance"
"""What helps a network of a run whose likelihood is not found."""


class Unsolved(Exception):
    """The solver of a likelihood gave up; the message says what would help."""


def until_start(process: Process, prediction: str) -> Process:
    """Return the process as far as the samples of a network start: its likelihood ends there."""
    start = timesteps.start(process, prediction in predictions.SIGNAL_NEEDED)
    return process if start is process.t_max else processes.until(process, start)


def data_end(process: Process, log_snr: Any) -> Array:
    """Return the time at which the flow of a likelihood begins, 0 where there is no such noise."""
    return jnp.maximum(process.time_of_log_snr(log_snr), 0.0)


def cleanest(process: Process) -> Array:
    """Return the cleanest time that a published network of such a process was trained at.

    It is that of the first step of a chain; else that of the noise that
    `likelihood.default_t_min` leaves.
    """
    if isinstance(process, processes.Chain):
        return jnp.asarray(1.0 / process.num_steps, float)
    return likelihood.default_t_min(process)


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


def solve_by_row(
    of_rows: Callable[..., Array],
    at_once: int,
    *,
    devices: Sequence[jax.Device] | None = None,
    remedy: str = LONGER,
) -> Callable[..., np.ndarray]:
    """Spread rows that a solver takes one by one over processes and devices.

    Args:
        of_rows: ``(shared, *rows) -> (B,)``, as `parallel.map_rows` takes it.
        at_once: how many rows it is given; more are taken in several calls.
        devices: by default all of this process.
        remedy: what helps where the solver does not come to an end.

    Returns:
        ``solve(shared, *rows) -> (N,)``, of pytrees of arrays (N, ...). It raises `Unsolved`, in
        every process, where the solver does not come to an end.
    """
    spread = parallel.map_rows(of_rows, devices=devices)

    def solve(shared: PyTree, *rows: PyTree) -> np.ndarray:
        num_rows = len(jax.tree.leaves(rows)[0])
        mine = distributed.rows_of(num_rows)
        parts = [np.zeros(0, np.float32)]
        unsolved: Unsolved | None = None
        try:
            for chosen in chunks(mine, at_once):
                given = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], rows)
                with solving(remedy):
                    parts.append(spread(shared, *given))
        except Unsolved as error:
            unsolved = error
        if distributed.any_of(unsolved is not None):
            raise unsolved or Unsolved("a solver of another process did not end")
        return distributed.join_rows(np.concatenate(parts)[: len(mine)], num_rows)

    return solve


def chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut indices into parts of one size, so that one program does; the last repeats its last."""
    if len(indices) <= size:
        return [indices] * (len(indices) > 0)
    padded = np.append(indices, np.repeat(indices[-1:], -len(indices) % size))
    return list(padded.reshape(-1, size))


@contextlib.contextmanager
def solving(remedy: str = LONGER) -> Iterator[None]:
    """Turn a solver's end without a solution into `Unsolved`; its screens of text are not shown.

    Args:
        remedy: what helps.

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
            f"network's output is too rough for the tolerance: {remedy}"
        ) from error
    finally:
        log.disabled = before
