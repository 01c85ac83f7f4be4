"""The training loop: flat, resumable, stoppable."""

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.devices import distributed
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.program import Steps
from jaxdiff.training.signals import catch_signals
from jaxdiff.training.telling import MAX_SKIPPED as MAX_SKIPPED
from jaxdiff.training.telling import Cadence, Skips, Telling, Told
from jaxdiff.training.telling import NotFinite as NotFinite
from jaxdiff.training.update import TrainState
from jaxdiff.typing import Batch, Key

STOPPED_EXIT_CODE = 75
"""What a command stopped by a signal exits with after saving: run it again to go on."""


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
    steps: Steps,
    key: Key,
    batches: Iterator[Batch],
    *,
    num_steps: int,
    checkpoints: Checkpoints,
    config: Mapping[str, Any],
    cadence: Cadence,
    telling: Telling,
) -> TrainState:
    """Train up to `num_steps` updates in all, logging and saving on the way.

    Of several processes all call this alike. A signal that one of them receives stops all, after
    the next logged step; one that comes during a call of several updates is seen after it.

    Args:
        state: where to start; its buffers may be donated.
        steps: how they are carried out. Where they skip what is not finite the run goes on, unless
            `MAX_SKIPPED` in a row are not.
        key: the run's key, the same for every step.
        batches: from the batch of step `state.step` on.
        num_steps: how many updates the run has in all.
        checkpoints: where to save.
        config: the resolved config, saved in each checkpoint.
        cadence: when to log and save.
        telling: what is said, and where.

    Returns:
        The state after `num_steps` updates.

    Raises:
        Stopped: on SIGINT or SIGTERM, after saving.
        DataEnded: if the batches end before that, after saving.
        NotFinite: if a step has a loss or gradient that is not finite. Every step is looked at,
            but not before the next one that is logged or saved.
        CheckpointError: if a save fails; if none could succeed, before the first step.
    """
    if distributed.is_main():
        checkpoints.claim()
    step = start = int(state.step)
    lengths = call_lengths(step, num_steps, cadence.save, steps.per_call)
    told = Told(
        telling,
        cadence,
        start=start,
        num_steps=num_steps,
        skip=steps.skip_nonfinite,
        skips=Skips.recorded(checkpoints.metrics(start)),
    )
    with contextlib.closing(told), catch_signals() as stopped_by:
        for length, batch in feed(batches, lengths, steps.place):
            call = steps.one if length == 1 or steps.several is None else steps.several
            state, metrics = call(state, key, batch)
            step += length
            told.add(step, length, metrics)
            last = step == num_steps
            logged = last or step // cadence.log > (step - length) // cadence.log
            saved = last or step % cadence.save == 0
            signal_name = _of_all(stopped_by(), asked=logged or saved)
            if not (logged or saved or signal_name is not None):
                continue
            told.read(step, length, logged=logged, last=last)
            if saved or signal_name is not None:
                told.keep()
                checkpoints.save(step, state, config, told.means())
            if signal_name is not None:
                checkpoints.wait()
                raise Stopped(step, signal_name)
        if start < step < num_steps:
            told.read(step, 1, logged=True, last=True)
            if step % cadence.save:
                told.keep()
                checkpoints.save(step, state, config, told.means())
    checkpoints.wait()
    if step < num_steps:
        raise DataEnded(step, num_steps)
    return state


def _of_all(signal_name: str | None, *, asked: bool) -> str | None:
    """Return the signal that stops the run: of several processes all stop at the same step.

    Args:
        signal_name: the one received here, None where there was none.
        asked: whether all processes ask each other after this step.
    """
    if jax.process_count() == 1:
        return signal_name
    together = asked and distributed.any_of(signal_name is not None)
    return (signal_name or "another process") if together else None
