"""Saving and restoring a run: orbax writes, checksums decide what may be read back.

A run keeps its checkpoints side by side, one folder a step::

    checkpoints/500/state/       the state tree, an ordinary orbax checkpoint
    checkpoints/500/config.json  the resolved config of the run
    checkpoints/500/metrics.json what was measured of it, by name
    checkpoints/500/checkpoint.json  which step it is, its files, which leaves are random keys
    checkpoints/500/SHA256SUMS   one line a file (`sha256sum -c SHA256SUMS` reads it too)

Orbax alone would read a flipped bit as data, so nothing is read back whose checksums do not hold,
or that was sealed as another step or, where the run's config is given, by another run.
How a folder stays whole whenever the process dies: `step_folders`, and in an object store, which
has no atomic rename: `step_objects`. One process at a time saves there; others may read meanwhile.

Leaves go to disk as plain arrays without their sharding (but for those spread over several
processes), so that any number of devices can read them back.
"""

import concurrent.futures.thread
import json
import math
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdiff import checks, files
from jaxdiff.training import folders, lock, step_folders
from jaxdiff.training.sound_steps import (
    METRICS,
    NOTHING,
    NOTHING_SOUND,
    STATE,
    Restored,
    SoundSteps,
    UnusableError,
)
from jaxdiff.training.state import stored
from jaxdiff.training.step_folders import CONFIG
from jaxdiff.training.stored_tree import CheckpointError, key_kinds, snapshot
from jaxdiff.training.tree_writer import TreeWriter

_FULL = "No space left on device"
_BUSY = "Another process saves there: let it end, or take another directory"


def to_stderr(message: str) -> None:
    """Write one line to stderr: the default `report`."""
    sys.stderr.write(f"{message}\n")


class Checkpoints:
    """The checkpoints of one run.

    Under `jax.distributed` every process makes the same calls on one shared directory; process 0
    verifies, commits and prunes.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        keep_best: str | None = None,
        config: Mapping[str, Any] | None = None,
        free: Collection[str] = (),
        report: Callable[[str], None] = to_stderr,
    ):
        """Name a directory; nothing is touched before the first save.

        Args:
            directory: holds one folder a step; made by the first save.
            keep_last: how many of the newest checkpoints stay.
            keep_every: multiples of this step stay for good.
            keep_best: the metric whose smallest value marks the one that stays too; NaN and
                infinite values never do.
            config: the run's; a checkpoint that was saved with another one is not of this run, and
                counts as corrupt. None takes any.
            free: fields of `config` that may differ.
            report: called with one line for each damaged or unfinished checkpoint met.

        Raises:
            TypeError: if `keep_last` or `keep_every` is no whole number.
            ValueError: if one is below 1, or `directory` is a URL or has a name that orbax could
                not read back.
            CheckpointError: if `directory` is a file.
        """
        checks.count("keep_last", keep_last)
        if keep_every is not None:
            checks.count("keep_every", keep_every)
        problem = folders.problem_of(directory)
        if problem is not None:
            raise ValueError(f"`directory` {problem}")
        self.directory: files.Path = files.to_path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"`directory` must be a folder; {self.directory} is a file.")
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._keep_best = keep_best
        self._report = report
        self._stored = SoundSteps(self.directory, config, free, report)
        self._kept = self._stored.kept
        self._writer = TreeWriter()
        self._end_saving: Callable[[], object] = lambda: None
        self._saving = False
        self._background: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """List the committed steps, oldest first, without verifying them.

        Raises:
            CheckpointError: if the directory cannot be read.
        """
        return self._stored.steps()

    def best(self, metric: str) -> int | None:
        """Return the committed step whose `metric` is smallest, None where none has it finite."""
        return self._stored.best(metric)

    def metrics(self, step: int) -> dict[str, Any]:
        """Return what was measured of a committed step; nothing where it does not say."""
        return self._stored.metrics(step)

    def claim(self) -> None:
        """Be the only process that saves here, until `close` or the end; the first save does it.

        Called earlier, it tells before anything is trained that nothing could be saved.

        Raises:
            CheckpointError: if another process saves here, or the directory cannot be written.
        """
        try:
            self._hold()
            if not files.is_stored(self.directory):
                os.rmdir(tempfile.mkdtemp(prefix=".", dir=self.directory))
        except OSError as error:
            reason = error.strerror
            if isinstance(error, BlockingIOError):
                reason = _BUSY
            raise CheckpointError(f"{self.directory} cannot be written: {reason}.") from error

    def save(
        self,
        step: int,
        state: Any,
        config: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copy the state to the host and write it in the background.

        The buffers of `state` may be donated as soon as this returns. It waits for the save before,
        so at most one is under way. A sound checkpoint of the same step is kept as it is, since
        (config, seed) determine the state; a damaged one is put aside as `<step>.corrupt`.

        Args:
            step: the number of updates done.
            state: any pytree of arrays whose dictionaries have string keys. What is `frozen` in a
                `TrainState` is not written: `restore` takes it from its target.
            config: the resolved config; anything JSON can hold.
            metrics: what was measured of this state, by name: numbers.

        Raises:
            ValueError: if `step` is negative or a key of `state` is not a string.
            TypeError: if `step` is no integer or JSON cannot hold `config`.
            CheckpointError: if this save cannot begin, another process saves in this directory, or
                the save before failed.
        """
        step = checks.count("step", step, 0)
        texts = {
            name: json.dumps(dict(values or {}), indent=2) + "\n"
            for name, values in ((CONFIG, config), (METRICS, _numbers(metrics)))
        }
        state = stored(state)
        keys = key_kinds(state)
        self.wait()
        try:
            held = jax.tree.map(snapshot, state)
            spread = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(held))
            self._check_spread(spread)
            if jax.process_index() == 0:
                self._hold()
                staged = self._kept.stage(step, spread)
                for name, text in texts.items():
                    (staged / name).write_text(text)
            if self._is_written_together(spread):  # orbax lets the processes meet: in no thread
                self._writer.write(self._kept.staged(step, spread) / STATE, held)
                held = None
        except Exception as error:
            raise self._failure(step, error) from _cause(error)
        _unfinished.add(self)
        if self._background is None:
            self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending = self._background.submit(self._commit, step, held, keys)

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: if it failed; earlier checkpoints are as they were.
        """
        pending, self._pending = self._pending, None
        _unfinished.discard(self)
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the save under way and release the threads; a later save starts them anew.

        Raises:
            CheckpointError: if the save failed.
        """
        try:
            self.wait()
        finally:
            if self._background is not None:
                self._background.shutdown()
                self._background = None
            self._writer.close()
            self._kept.close()
            self._end_saving()
            self._saving = False

    def sound_steps(self) -> list[int]:
        """List the steps whose checksums hold, oldest first, reporting those that do not."""
        self.wait()
        return [step for step in self.steps() if self._stored.is_sound(step)]

    def latest_sound(self) -> int | None:
        """Find the newest checkpoint whose checksums hold, reporting those that do not.

        Returns:
            Its step, or None if there is no checkpoint at all.

        Raises:
            CheckpointError: if there are checkpoints and every one is damaged.
        """
        self.wait()
        found = self._stored.newest() if jax.process_index() == 0 else NOTHING
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if found == NOTHING_SOUND:
            raise CheckpointError(
                f"Every checkpoint in {self.directory} is corrupt or incomplete. Nothing there was "
                "changed; bring back a sound one, or start anew with another directory."
            )
        return None if found == NOTHING else found

    def restore(self, target: Any = None, step: int | None = None) -> Restored | None:
        """Read a checkpoint back, bit for bit.

        Args:
            target: a tree of the structure, shapes and dtypes wanted, its leaves arrays or
                `jax.ShapeDtypeStruct`. Those with a `.sharding` come back as JAX arrays placed so,
                the others as NumPy arrays. What is `frozen` in a `TrainState` is not read but
                left as it is. None gives nested dicts and lists of NumPy arrays.
            step: which one; by default the newest sound one.

        Returns:
            The step, the state and the config; None if there is no checkpoint at all.

        Raises:
            CheckpointError: if no checkpoint is sound, or that of `step` is missing or damaged, or
                it does not fit `target`.
        """
        if step is not None:
            self.wait()
            self._stored.require_sound(step)
            return self._stored.read(step, target)
        while (step := self.latest_sound()) is not None:
            try:
                return self._stored.read(step, target)
            except UnusableError:  # there are others
                continue
        return None

    def _hold(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._saving:
            self._end_saving = weakref.finalize(self, lock.saving(self.directory))
            self._saving = True

    def _check_spread(self, spread: bool) -> None:
        """Refuse what orbax would write to the local disk of each process."""
        scheme = str(self.directory).partition("://")[0]
        if spread and files.is_stored(self.directory) and scheme != "gs":
            raise ValueError(
                f"orbax writes a state that is spread over processes to disks and gs:// only, not "
                f"to {scheme}://. Keep --fsdp within a process, or take another directory"
            )

    def _is_written_together(self, spread: bool) -> bool:
        """Tell whether all processes write: to a disk that they share, or each its part."""
        return jax.process_count() > 1 and (spread or not files.is_stored(self.directory))

    def _write(self, step: int, state: Any) -> None:
        self._writer.write(self._kept.staged(step, False) / STATE, state, alone=True)

    def _commit(self, step: int, state: Any, keys: Mapping[str, str]) -> None:
        """Write, seal, rename and prune; runs in the background thread."""
        try:
            if state is None:
                self._writer.wait()
            if jax.process_index() != 0:
                return
            if state is not None:
                self._write(step, state)
                self._writer.wait()
            message = self._kept.commit(step, keys, self._stored.find_damage)
            if message is not None:
                self._report(message)
            self._stored.replaced(step)
            best = None if self._keep_best is None else self.best(self._keep_best)
            step_folders.prune(
                self._kept,
                step,
                keep_last=self._keep_last,
                keep_every=self._keep_every,
                keep=() if best is None else (best,),
                spare=self._stored.damaged,
            )
        except Exception as error:
            raise self._failure(step, error) from _cause(error)

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        """Make room again and say what was lost and what is left."""
        self._writer.close()  # its threads may still write where we are to tidy up
        if jax.process_index() == 0 and not isinstance(error, BlockingIOError):
            self._kept.unstage(step)
        try:
            earlier = self._kept.steps()
            left = f"the last one there is step {earlier[-1]}" if earlier else "there is none yet"
        except OSError:  # a store that does not answer
            left = "what is there is as it was"
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:1500]
        if _cause(error) is None:
            reason = _FULL
        if isinstance(error, BlockingIOError):
            reason = _BUSY
        return CheckpointError(f"Could not save step {step} in {self.directory}; {left}. {reason}")


def _cause(error: Exception) -> Exception | None:
    """Return what explains a failure; a full disk needs no explanation."""
    return None if _FULL in str(error) else error


def _numbers(metrics: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Return metrics as JSON holds them; those that are not finite as null."""
    found: dict[str, float | None] = {}
    for name, value in dict(metrics or {}).items():
        checks.real(f"metrics[{name!r}]", value)
        if np.size(value) != 1:
            raise ValueError(f"`metrics[{name!r}]` must be one number; got {checks.shown(value)}.")
        number = np.asarray(value).item()
        found[name] = number if math.isfinite(number) else None
    return found


_unfinished: set[Checkpoints] = set()
"""Those whose last save nobody has waited for yet."""


def _finish() -> None:
    """Wait for the last saves of a program that ends without `close`; say which failed."""
    for checkpoints in list(_unfinished):
        try:
            checkpoints.close()
        except Exception as error:
            to_stderr(f"error: {error}")


# Before the interpreter stops the thread pools that orbax writes with, which `atexit` comes after.
threading._register_atexit(_finish)  # type: ignore[attr-defined]
