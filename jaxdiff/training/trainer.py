"""A run, from a folder to a trained state: locked, restored, placed, compiled, logged, recorded.

::

    directory/config.json      what the run is, where a record is given
    directory/checkpoints/     states, sealed by checksums; the newest sound one is where it goes on
    directory/metrics.jsonl    one object a logged step; in a store by parts, see `metrics_parts`
    directory/nonfinite.json   what repeats the step whose loss or gradient was not finite

A run that was stopped, killed or moved to other devices ends as the one that was not: batches and
noise of a step are functions of it and of what is given here alone.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import checks, files, rows
from jaxdiff.devices import distributed
from jaxdiff.training import judging, lock, loop, parallel, throughput
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.parallel import Mode
from jaxdiff.training.run import Record
from jaxdiff.training.state import TrainState, frozen_of, with_frozen, without_frozen
from jaxdiff.training.telling import Cadence, NotFinite, Telling
from jaxdiff.training.throughput import Work
from jaxdiff.training.update import Transferable, Update
from jaxdiff.typing import Batch, Key, PyTree

NONFINITE = "nonfinite.json"
PROFILE = "profile"
TENSORBOARD = "tensorboard"


class Keep(NamedTuple):
    """Which checkpoints stay: see `checkpoint.Checkpoints`.

    Attributes:
        last: how many of the newest.
        every: multiples of this step.
        best: the metric whose smallest mean marks one more.
    """

    last: int = 3
    every: int | None = None
    best: str | None = None


class Report(NamedTuple):
    """What a run says of itself while it is at work, beside `metrics.jsonl`.

    Attributes:
        progress: show a progress bar if stderr is a terminal.
        tensorboard: log for TensorBoard too.
        profile_steps: steps of a profiler trace, after the first call.
        repeat: number of a batch, from 0 -> what else it takes to repeat its step, for
            `nonfinite.json`.
        begun: called once, by process 0, where steps are left, before the first of them.
    """

    progress: bool = False
    tensorboard: bool = False
    profile_steps: int = 0
    repeat: Callable[[int], Mapping[str, Any]] = lambda step: {}
    begun: Callable[[], object] = lambda: None


CADENCE, KEEP, REPORT = Cadence(), Keep(), Report()


def fit(
    directory: str | os.PathLike[str],
    make_state: Callable[[], TrainState],
    update: Update,
    batches_from: Callable[[int], Iterable[Batch]],
    *,
    key: Key,
    num_steps: int,
    cadence: Cadence = CADENCE,
    mode: Mode | None = None,
    frozen: PyTree = (),
    record: Record | Mapping[str, Any] | None = None,
    keep: Keep = KEEP,
    report: Report = REPORT,
) -> TrainState:
    """Train what is left of a run, and return its state after `num_steps` updates in all.

    The same call goes on where the run stopped, and does nothing where all steps are done. Under
    `jax.distributed` every process makes it.

    Args:
        directory: of the run, a path or a URL in an object store; made if missing. One process at
            a time writes there.
        make_state: makes the state before the first update, such as
            ``lambda: update.init(params)``; traced, so that a state that is split is made where it
            belongs. Large parameters it should make itself: see `nn.deferred`.
        update: from `make_update` or `networks.alternate`, which are told of the mode's axis and
            parts; or a plain function ``(state, key, batch) -> (state, metrics)``.
        batches_from: step -> the batches from that step on, those of this process: a function of
            the step alone, or a run that resumes is another one. Each is read once.
        key: the run's, the same for every step.
        num_steps: how many updates the run has in all; a larger number extends it.
        cadence: steps between logged ones, and between checkpoints.
        mode: where and how updates run, by default on one device; it may change between starts.
        frozen: arrays for `TrainState.frozen`, where `make_state` gives none; placed as the mode
            says. No checkpoint holds them: give them at each start.
        record: what the run is, as JSON holds it: written as `config.json`, and in each checkpoint;
            a folder whose record differs is refused. None writes and judges nothing.
        keep: which checkpoints stay.
        report: what is said.

    Returns:
        The state, placed as the mode says.

    Raises:
        TypeError: if a number is no whole number, or `key` no typed key; or as the mode and the
            update raise it.
        ValueError: if a number is below 1; or as the mode and the update raise it: for batches
            that the devices cannot share, say. Of several processes, if they were not given the
            same.
        RunError: if the folder cannot be used, another process writes there, or it holds another
            run.
        CheckpointError: if no checkpoint there is sound, none fits the state, or a save fails.
        Stopped: on SIGINT or SIGTERM, after saving.
        DataEnded: if the batches end before the run does, after saving.
        NotFinite: if a loss or gradient is NaN or infinite, after writing `nonfinite.json`.
    """
    checks.count("num_steps", num_steps)
    cadence = Cadence(*(checks.count(f"cadence.{k}", v) for k, v in cadence._asdict().items()))
    key, mode = rows.one_key(key), parallel.mode_of_one_device() if mode is None else mode
    record = runs.as_record(record)
    _agree(record, key, num_steps, cadence)
    with lock.writing(directory) as folder:
        if record is not None:
            runs.reconcile(folder, record.config, free=record.free, defaults=record.defaults)
        with open_checkpoints(folder, record, keep) as checkpoints:
            state = begin(checkpoints, make_state, mode, frozen)
            start = int(state.step)
            if start >= num_steps:
                return state
            batches = iter(batches_from(start))
            first = next(batches, None)
            if first is None:
                raise loop.DataEnded(start, num_steps)
            steps, work = mode.steps(update), work_of(update, state, key, first, mode)
            with _saying(folder, start, record, work, key, report) as telling:
                return loop.fit(
                    state,
                    steps,
                    parallel.everywhere(key, mode.whole),
                    itertools.chain([first], batches),
                    num_steps=num_steps,
                    checkpoints=checkpoints,
                    config={} if record is None else record.config,
                    cadence=cadence,
                    telling=telling,
                )


def open_checkpoints(
    directory: str | os.PathLike[str],
    record: Record | Mapping[str, Any] | None = None,
    keep: Keep = KEEP,
) -> Checkpoints:
    """Name the checkpoints of a run; touches nothing.

    Args:
        directory: of the run.
        record: the run's; None takes what its folder says.
        keep: which are kept.

    Raises:
        RunError: if the folder's record cannot be read.
        TypeError: as `Checkpoints`.
        ValueError: likewise.
        CheckpointError: likewise.
    """
    record = runs.as_record(record) or runs.recorded(files.to_path(directory))
    return Checkpoints(
        files.to_path(directory) / runs.CHECKPOINTS,
        keep_last=keep.last,
        keep_every=keep.every,
        keep_best=keep.best,
        config=None if record is None else record.config,
        free=() if record is None else record.free,
    )


def begin(
    checkpoints: Checkpoints, make_state: Callable[[], TrainState], mode: Mode, frozen: PyTree = ()
) -> TrainState:
    """Return the state that a run goes on from: its newest sound checkpoint's, or its first.

    Args:
        checkpoints: of the run.
        make_state: as in :func:`fit`.
        mode: where the state lies.
        frozen: as in :func:`fit`.

    Raises:
        CheckpointError: if no checkpoint is sound, or none fits.
        ValueError: if both `make_state` and `frozen` give what is frozen.
    """
    shapes = jax.eval_shape(make_state)
    of_state = frozen_of(shapes)
    if jax.tree.leaves(frozen):
        if jax.tree.leaves(of_state):
            raise ValueError("`frozen` and the state of `make_state` both hold frozen arrays.")
        frozen = jax.tree.map(jnp.asarray, frozen)
        frozen = jax.device_put(frozen, mode.shardings(frozen))
    elif jax.tree.leaves(of_state):
        frozen = jax.jit(lambda: frozen_of(make_state()), out_shardings=mode.shardings(of_state))()
    shapes = without_frozen(shapes)
    places = mode.shardings(shapes)
    restored = checkpoints.restore(
        target=jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            places,
        )
    )
    if restored is None:
        state = jax.jit(lambda: without_frozen(make_state()), out_shardings=places)()
    else:
        state = jax.tree.map(jnp.copy, restored.state)  # the loop may donate copies
        del restored
    return with_frozen(state, frozen)


def work_of(update: Update, state: TrainState, key: Key, batch: Batch, mode: Mode) -> Work:
    """Say what a step is: the examples and operations of the whole batch, and the devices' peak.

    Args:
        update: of the run.
        state: the run's, or its shapes.
        key: the run's.
        batch: this process's rows of one.
        mode: how it runs.

    Returns:
        The work; without operations for a plain function of shards, which makes sense
        where its axis is mapped alone.

    Raises:
        TypeError: as the update.
        ValueError: likewise.
    """

    def whole(leaf: Any) -> jax.ShapeDtypeStruct:
        of_all = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        count = 1 if of_all else jax.process_count()
        dtype = jax.dtypes.canonicalize_dtype(
            leaf.dtype
        )  # of NumPy's arrays the one they will have
        return jax.ShapeDtypeStruct((np.shape(leaf)[0] * count, *np.shape(leaf)[1:]), dtype)

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    batch, state = jax.tree.map(whole, batch), jax.tree.map(shape, state)
    flops = None
    if isinstance(update, Transferable):
        flops = throughput.count_flops(update.over(None).in_parts(1), state, key, batch)
    elif mode.axis_name is None:
        flops = throughput.count_flops(update, state, key, batch)
    examples = judging.num_rows(batch)
    peak = throughput.peak_flops(jax.devices()[0])
    return Work(examples, flops, None if peak is None else peak * mode.num_shards)


def _agree(record: Record | None, key: Key, num_steps: int, cadence: Cadence) -> None:
    """Check that all processes were given the same; what is free in a config is each one's own."""
    config, free = ({}, ()) if record is None else (record.config, record.free)
    counted = {name: value for name, value in config.items() if name not in free}
    distributed.agree(
        config=json.dumps(counted, sort_keys=True),
        key=json.dumps(jax.random.key_data(key).tolist()),
        num_steps=str(num_steps),
        cadence=str(cadence),
    )


@contextlib.contextmanager
def _saying(
    folder: files.Path, start: int, record: Record | None, work: Work, key: Key, report: Report
) -> Iterator[Telling]:
    """Open the log, write the record, and write down what repeats a step that is not finite.

    Of several processes process 0 alone writes and shows.
    """

    def repeat(step: int) -> dict[str, Any]:
        drawn = jax.random.key_data(jax.random.fold_in(key, step - 1)).tolist()
        return {**report.repeat(step - 1), "key_data": drawn}

    if not distributed.is_main():
        yield Telling(runs.NoLog(), work, repeat=repeat)
        return
    # First what may be found wrong: until then the record says what it said.
    board = folder / TENSORBOARD if report.tensorboard else None
    open_log = runs.MetricsParts if files.is_stored(folder) else runs.MetricsLog
    log = open_log(folder / runs.METRICS, after=start, tensorboard=board)
    profile = (folder / PROFILE, report.profile_steps) if report.profile_steps else None
    with contextlib.closing(log):
        if record is not None:
            runs.write_record(folder, record.config, free=record.free, also=record.also)
        report.begun()
        try:
            yield Telling(log, work, report.progress, profile, repeat)
        except NotFinite as error:
            files.write_text(folder / NONFINITE, json.dumps(error.details, indent=2) + "\n")
            raise
