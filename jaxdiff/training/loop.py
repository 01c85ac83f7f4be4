"""The training loop: flat, resumable, stoppable."""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax

from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.run import MetricsLog
from jaxdiff.training.update import TrainState
from jaxdiff.typing import Array, Batch, Key

STOPPED_EXIT_CODE = 75
"""What a command stopped by a signal exits with after saving: run it again to go on."""


class Stopped(Exception):
    """Training was asked to stop by SIGINT or SIGTERM, and saved."""

    def __init__(self, step: int, signal_name: str) -> None:
        super().__init__(f"Stopped by {signal_name} after step {step}, which is saved.")


class NotFinite(ArithmeticError):
    """The loss or its gradient became NaN or infinite."""

    def __init__(self, step: int, values: Mapping[str, float]) -> None:
        shown = ", ".join(f"{name}={value}" for name, value in values.items())
        super().__init__(
            f"Step {step} is not finite: {shown}. Nothing of it was saved; "
            "a lower --learning-rate may help."
        )


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], str | None]]:
    """Turn SIGINT and SIGTERM into a question: the name of the one received, or None.

    A second signal acts as it did before. Only the main thread can catch signals; in another one
    none is ever received.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[str] = []
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        for caught, handler in before.items():
            signal.signal(caught, handler)

    for caught in (signal.SIGINT, signal.SIGTERM):
        before[caught] = signal.signal(caught, handle)
    try:
        yield lambda: received[0] if received else None
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def fit(
    state: TrainState,
    step_fn: Callable[[TrainState, Key, Batch], tuple[TrainState, dict[str, Array]]],
    key: Key,
    batches: Iterator[Batch],
    *,
    num_steps: int,
    checkpoints: Checkpoints,
    config: Mapping[str, Any],
    log: MetricsLog,
    log_every: int,
    checkpoint_every: int,
    progress: bool = False,
) -> TrainState:
    """Train up to `num_steps` updates in all, logging and saving on the way.

    Args:
        state: where to start; its buffers may be donated by `step_fn`.
        step_fn: the compiled update.
        key: the run's key, the same for every step.
        batches: from the batch of step `state.step` on.
        num_steps: how many updates the run has in all.
        checkpoints: where to save.
        config: the resolved config, saved in each checkpoint.
        log: where to log.
        log_every: steps between logged steps; the last is always logged.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        progress: show a progress bar if stderr is a terminal.

    Returns:
        The state after `num_steps` updates.

    Raises:
        Stopped: on SIGINT or SIGTERM, after saving.
        NotFinite: if a logged or saved step has a loss or gradient that is not finite.
        CheckpointError: if a save fails.
    """
    from tqdm import tqdm

    step = int(state.step)
    bar = tqdm(
        total=num_steps,
        initial=step,
        unit="step",
        disable=not (progress and sys.stderr.isatty()),
    )
    since, timed_from = None, step
    with catch_signals() as stopped_by, contextlib.closing(bar):
        while step < num_steps:
            batch = next(batches)
            state, metrics = step_fn(state, key, batch)
            step += 1
            bar.update()
            num_rows = len(jax.tree.leaves(batch)[0])
            if since is None:  # the clock starts after the step that compiled
                jax.block_until_ready(metrics)
                since, timed_from = time.perf_counter(), step
            signal_name = stopped_by()
            last = step == num_steps
            saving = last or signal_name is not None or step % checkpoint_every == 0
            if not (saving or step % log_every == 0):
                continue
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not all(math.isfinite(value) for value in values.values()):
                raise NotFinite(step, values)
            if last or step % log_every == 0:
                now = time.perf_counter()
                if step > timed_from:
                    values["steps_per_second"] = (step - timed_from) / (now - since)
                    values["examples_per_second"] = num_rows * values["steps_per_second"]
                log.write({"step": step, **values})
                bar.set_postfix(loss=f"{values['loss']:.4f}")
                since, timed_from = now, step
            if saving:
                checkpoints.save(step, state, config)
            if signal_name is not None:
                checkpoints.wait()
                raise Stopped(step, signal_name)
    checkpoints.wait()
    return state
