"""The training loop: flat, resumable, stoppable."""

import collections
import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.training import distributed
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.signals import catch_signals
from jaxdiff.training.throughput import NO_WORK, Work
from jaxdiff.training.update import TrainState
from jaxdiff.typing import Array, Batch, Key

Step: TypeAlias = Callable[[TrainState, Key, Batch], tuple[TrainState, dict[str, Array]]]


class Log(Protocol):
    """Where logged steps go."""

    def write(self, values: Mapping[str, Any], /) -> None:
        """Write one object, which holds `step`."""


STOPPED_EXIT_CODE = 75
"""What a command stopped by a signal exits with after saving: run it again to go on."""
MAX_SKIPPED = 100
"""How many steps in a row may be skipped because they are not finite."""


class Stopped(Exception):
    """Training was asked to stop by SIGINT or SIGTERM, and saved."""

    def __init__(self, step: int, signal_name: str) -> None:
        super().__init__(f"Stopped by {signal_name} after step {step}, which is saved.")


class DataEnded(ValueError):
    """The batches ended before the run did; what was trained is saved."""

    def __init__(self, step: int, num_steps: int) -> None:
        super().__init__(
            f"`batches` must hold one for each of `num_steps` {num_steps}; they ended after step "
            f"{step}, which is saved. Repeat the data, or ask for fewer steps."
        )


class NotFinite(ArithmeticError):
    """The loss or its gradient became NaN or infinite.

    Attributes:
        details: the step, its values and what it takes to repeat it, as JSON holds it.
    """

    def __init__(
        self,
        step: int,
        values: Mapping[str, float],
        details: Mapping[str, Any] | None = None,
        *,
        skipped: int = 0,
    ) -> None:
        shown = ", ".join(f"{name}={value}" for name, value in values.items())
        kept = f"The {skipped} steps before it were skipped too" if skipped else "It was not saved"
        super().__init__(
            f"Step {step} is not finite: {shown}. {kept}; a lower --learning-rate may help."
        )
        self.details = {"step": step, "values": {k: str(v) for k, v in values.items()}}
        self.details |= details or {}


def call_lengths(
    start: int, num_steps: int, checkpoint_every: int, steps_per_call: int
) -> Iterator[int]:
    """Yield how many updates each call makes: `steps_per_call`, but one where a save comes first.

    Two programs are then all that is compiled, and saves come at the same steps for any length.
    """
    step = start
    while step < num_steps:
        boundary = min(num_steps, (step // checkpoint_every + 1) * checkpoint_every)
        length = steps_per_call if boundary - step >= steps_per_call else 1
        yield length
        step += length


def feed(
    batches: Iterator[Batch], lengths: Iterator[int], place: Callable[..., Batch], ahead: int = 2
) -> Iterator[tuple[int, Batch]]:
    """Yield the batch of each call where it is wanted, its transfer begun `ahead` calls early.

    Args:
        batches: one a step; where they end, what is left of a call of several is yielded singly.
        lengths: how many steps each call makes; those of several get batches (n, B, ...).
        place: (batch, scanned) -> the batch on its devices; it need not wait for the transfer.
        ahead: how many calls.
    """

    def stack(*leaves: Any) -> Any:
        return (jnp.stack if isinstance(leaves[0], jax.Array) else np.stack)(leaves)

    queue: collections.deque[tuple[int, Batch]] = collections.deque()
    for length in lengths:
        taken = list(itertools.islice(batches, length))
        if len(taken) == length > 1:
            queue.append((length, place(jax.tree.map(stack, *taken), True)))
        else:
            queue.extend((1, place(batch, False)) for batch in taken)
        while len(queue) > ahead:
            yield queue.popleft()
        if len(taken) < length:
            break
    yield from queue


def fit(
    state: TrainState,
    step_fn: Step,
    key: Key,
    batches: Iterator[Batch],
    *,
    num_steps: int,
    checkpoints: Checkpoints,
    config: Mapping[str, Any],
    log: Log,
    log_every: int,
    checkpoint_every: int,
    scan_fn: Step | None = None,
    steps_per_call: int = 1,
    place: Callable[..., Batch] = lambda batch, scanned: batch,
    work: Work = NO_WORK,
    skip_nonfinite: bool = False,
    repeat: Callable[[int], Mapping[str, Any]] = lambda step: {},
    profile: tuple[Path, int] | None = None,
    progress: bool = False,
) -> TrainState:
    """Train up to `num_steps` updates in all, logging and saving on the way.

    Of several processes all call this alike. A signal that one of them receives stops all, after
    the next logged step.

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
        scan_fn: the compiled update of several batches in one call; for `steps_per_call` > 1.
        steps_per_call: updates a call. Between calls only are signals seen.
        place: (batch, scanned) -> the batch on its devices.
        work: what a step is, for rates.
        skip_nonfinite: go on where a step is not finite, which the update has skipped then; by
            default stop. A run of `MAX_SKIPPED` such steps stops it all the same.
        repeat: step -> what it takes to repeat it, for the report of one that is not finite.
        profile: a folder for a profiler trace, and of how many steps after the first call.
        progress: show a progress bar if stderr is a terminal.

    Returns:
        The state after `num_steps` updates.

    Raises:
        Stopped: on SIGINT or SIGTERM, after saving.
        DataEnded: if the batches end before that, after saving.
        NotFinite: if a step has a loss or gradient that is not finite. Every step is looked at,
            but not before the next one that is logged or saved.
        CheckpointError: if a save fails.
    """
    from tqdm import tqdm

    step = start = int(state.step)
    bar = tqdm(
        total=num_steps,
        initial=step,
        unit="step",
        disable=not (progress and sys.stderr.isatty()),
    )
    calls = feed(batches, call_lengths(step, num_steps, checkpoint_every, steps_per_call), place)
    unread = _Unread(skip_nonfinite, repeat)
    since_save: list[dict[str, float]] = []
    tracing = _Tracing(profile)
    clock: tuple[float, int] | None = None  # started after the call that compiled
    with catch_signals() as stopped_by, contextlib.closing(bar), contextlib.closing(tracing):
        for length, batch in calls:
            call = step_fn if length == 1 or scan_fn is None else scan_fn
            state, metrics = call(state, key, batch)
            unread.add(step, length, metrics)
            step += length
            bar.update(length)
            if clock is None:
                jax.block_until_ready(metrics)
                clock = time.perf_counter(), step
            tracing.after(step - start, metrics)
            last = step == num_steps
            logged = last or step // log_every > (step - length) // log_every
            saved = last or step % checkpoint_every == 0
            signal_name = stopped_by()
            if jax.process_count() > 1:  # all must stop at the same step
                together = (logged or saved) and distributed.any_of(signal_name is not None)
                signal_name = (signal_name or "another process") if together else None
            if not (logged or saved or signal_name is not None):
                continue
            values = unread.read()
            if logged:
                now = time.perf_counter()
                rates = work.rates((step - clock[1]) / (now - clock[0])) if step > clock[1] else {}
                clock = now, step
                for number in values:
                    due = number % log_every == 0 or number == num_steps
                    if due and _is_finite(values[number]):  # others are said on stderr
                        newest = rates if number > step - length else {}
                        log.write({"step": number, **values[number], **newest})
                bar.set_postfix(loss=f"{values[step]['loss']:.4f}")
            since_save += values.values()
            if saved or signal_name is not None:
                checkpoints.save(step, state, config, _means(since_save))
                since_save = []
            if signal_name is not None:
                checkpoints.wait()
                raise Stopped(step, signal_name)
        if step < num_steps and step > start:
            values = unread.read()
            for number in values:
                if _is_finite(values[number]) and (number % log_every == 0 or number == step):
                    log.write({"step": number, **values[number]})
            since_save += values.values()
            if step % checkpoint_every:
                checkpoints.save(step, state, config, _means(since_save))
    checkpoints.wait()
    if step < num_steps:
        raise DataEnded(step, num_steps)
    return state


def _is_finite(values: Mapping[str, float]) -> bool:
    """Judge a step by what `make_update` skips it for."""
    return all(math.isfinite(values.get(name, 0.0)) for name in ("loss", "grad_norm"))


def _means(values: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the steps that have it finite."""
    finite = [each for each in values if _is_finite(each)]
    names = finite[-1] if finite else {}
    return {name: sum(each[name] for each in finite) / len(finite) for name in names}


class _Unread:
    """The metrics of the steps since the last ones read, still on their devices."""

    def __init__(self, skip: bool, repeat: Callable[[int], Mapping[str, Any]]) -> None:
        self._skip, self._repeat = skip, repeat
        self._skipped = 0
        self._held: list[tuple[int, int, dict[str, Array]]] = []

    def add(self, step: int, length: int, metrics: dict[str, Array]) -> None:
        """Take the metrics of the `length` steps after `step`."""
        self._held.append((step, length, metrics))

    def read(self) -> dict[int, dict[str, float]]:
        """Return the values of each step by its number.

        Raises:
            NotFinite: if one is not finite, unless such are skipped; at the `MAX_SKIPPED`th in a
                row all the same.
        """
        found = {}
        for first, length, metrics in jax.device_get(self._held):
            columns = {name: np.reshape(value, -1) for name, value in metrics.items()}
            for i in range(length):
                found[first + i + 1] = {name: float(v[i]) for name, v in columns.items()}
        self._held = []
        for step, values in found.items():
            if _is_finite(values):
                self._skipped = 0
                continue
            self._skipped += 1
            problem = NotFinite(step, values, self._repeat(step), skipped=self._skipped - 1)
            if not self._skip or self._skipped >= MAX_SKIPPED:
                raise problem
            if distributed.is_main():
                sys.stderr.write(f"Step {step} is not finite and was skipped: {values}.\n")
        return found


class _Tracing:
    """A profiler trace of some steps after the first call."""

    def __init__(self, profile: tuple[Path, int] | None) -> None:
        self._profile, self._on, self._until = profile, False, 0

    def after(self, steps: int, metrics: Any) -> None:
        """Begin or end the trace, `steps` having been made and `metrics` being the last's."""
        if self._profile is None:
            return
        folder, count = self._profile
        if not self._on:
            jax.profiler.start_trace(folder)
            self._on, self._until = True, steps + count
        elif steps >= self._until:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """End the trace."""
        if self._on:
            jax.profiler.stop_trace()
        self._profile, self._on = None, False
