"""Saving and restoring a run: orbax writes, checksums decide what may be read back.

A run keeps its checkpoints side by side, one folder a step::

    checkpoints/500/state/       the state tree, an ordinary orbax checkpoint
    checkpoints/500/config.json  the resolved config of the run
    checkpoints/500/metrics.json what was measured of it, by name
    checkpoints/500/SHA256SUMS   one line a file (`sha256sum -c SHA256SUMS` reads it too)

Orbax alone would read a flipped bit as data, so nothing is read back whose checksums do not hold.
How a folder stays whole whenever the process dies: `step_folders`. The directory must be on a file
system with an atomic rename, which object stores lack.

Leaves go to disk as plain arrays without their sharding (but for those spread over several
processes), so that any number of devices can read them back.
"""

import concurrent.futures
import contextlib
import json
import logging
import operator
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdiff.training import step_folders
from jaxdiff.training.checksums import find_damage
from jaxdiff.training.stored_tree import CheckpointError, named_leaves, read, snapshot

STATE = "state"
CONFIG = "config.json"
METRICS = "metrics.json"
_NOTHING, _NOTHING_SOUND = -1, -2  # in place of a step, when processes agree on one


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
        step: the number of updates done.
        state: the tree that was saved.
        config: the resolved config that was saved with it.
    """

    step: int
    state: Any
    config: dict[str, Any]


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
        report: Callable[[str], None] = to_stderr,
    ):
        """Name a directory; nothing is touched before the first save.

        Args:
            directory: holds one folder a step; made by the first save.
            keep_last: how many of the newest checkpoints stay.
            keep_every: multiples of this step stay for good.
            keep_best: the metric whose smallest value marks the one that stays too.
            report: called with one line for each damaged or unfinished checkpoint met.

        Raises:
            ValueError: if `keep_last` or `keep_every` is below 1, or `directory` is a URL.
            CheckpointError: if `directory` is a file.
        """
        if keep_last < 1:
            raise ValueError(f"`keep_last` must be at least 1; got {keep_last}.")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"`keep_every` must be at least 1 or None; got {keep_every}.")
        if "://" in os.fspath(directory):
            raise ValueError(
                f"`directory` must be on a file system with an atomic rename; got {directory}. "
                "Mount it, or copy checkpoints there afterwards."
            )
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"`directory` must be a folder; {self.directory} is a file.")
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._keep_best = keep_best
        self._report = report
        self._reported: set[str] = set()
        self._damaged: set[int] = set()
        self._writer: Any = None
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """List the committed steps, oldest first, without verifying them."""
        return step_folders.steps(self.directory)

    def best(self, metric: str) -> int | None:
        """Return the committed step whose `metric` is smallest, None where none has it."""
        found = []
        for step in self.steps():
            try:
                value = json.loads((self.directory / str(step) / METRICS).read_text())[metric]
            except (OSError, ValueError, KeyError):  # saved without it, or damaged
                continue
            found.append((float(value), step))
        return min(found)[1] if found else None

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
            state: any pytree of arrays whose dictionaries have string keys.
            config: the resolved config; anything JSON can hold.
            metrics: what was measured of this state, by name.

        Raises:
            ValueError: if `step` is negative or a key of `state` is not a string.
            TypeError: if `step` is no integer or JSON cannot hold `config`.
            CheckpointError: if this save cannot begin or the save before failed.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"`step` must not be negative; got {step}.")
        texts = {
            name: json.dumps(dict(values or {}), indent=2) + "\n"
            for name, values in ((CONFIG, config), (METRICS, metrics))
        }
        named_leaves(state)
        self.wait()
        staged = step_folders.staged(self.directory, step)
        try:
            if jax.process_index() == 0:
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir(parents=True)
                for name, text in texts.items():
                    (staged / name).write_text(text)
            held = jax.tree.map(snapshot, state)
            if jax.process_count() > 1:  # orbax lets the processes meet here: not in a thread
                self._write(step, held)
                held = None
        except Exception as error:
            raise self._failure(step, error) from error
        self._pending = self._background.submit(self._commit, step, held)

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: if it failed; earlier checkpoints are as they were.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the save under way and release the threads.

        Raises:
            CheckpointError: if the save failed.
        """
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def sound_steps(self) -> list[int]:
        """List the steps whose checksums hold, oldest first, reporting those that do not."""
        self.wait()
        return [step for step in self.steps() if self._is_sound(step)]

    def latest_sound(self) -> int | None:
        """Find the newest checkpoint whose checksums hold, reporting those that do not.

        Returns:
            Its step, or None if there is no checkpoint at all.

        Raises:
            CheckpointError: if there are checkpoints and every one is damaged.
        """
        self.wait()
        found = self._newest_sound(self.steps()) if jax.process_index() == 0 else _NOTHING
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if found == _NOTHING_SOUND:
            raise CheckpointError(
                f"Every checkpoint in {self.directory} is corrupt or incomplete. Nothing there was "
                "changed; bring back a sound one, or start anew with another directory."
            )
        return None if found == _NOTHING else found

    def restore(self, target: Any = None, step: int | None = None) -> Restored | None:
        """Read a checkpoint back, bit for bit.

        Args:
            target: a tree of the structure, shapes and dtypes wanted, its leaves arrays or
                `jax.ShapeDtypeStruct`. Those with a `.sharding` come back as JAX arrays placed so,
                the others as NumPy arrays. None gives nested dicts and lists of NumPy arrays.
            step: which one; by default the newest sound one.

        Returns:
            The step, the state and the config; None if there is no checkpoint at all.

        Raises:
            CheckpointError: if no checkpoint is sound, or that of `step` is missing or damaged, or
                it does not fit `target`.
        """
        if step is None:
            step = self.latest_sound()
            if step is None:
                return None
        else:
            self._require_sound(step)
        folder = self.directory / str(step)
        state = read(folder / STATE, target)
        return Restored(step, state, json.loads((folder / CONFIG).read_text()))

    def _write(self, step: int, state: Any) -> None:
        import orbax.checkpoint as ocp  # here, because it costs 0.6 s

        # What orbax logs of a failure, tracebacks of its threads, is in the error that we raise.
        logging.getLogger("absl").addFilter(_not_from_orbax)
        if self._writer is None:
            # Folders made on the spot: what the disk refuses is then raised, not waited for.
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            # Floats hardly shrink, and compressing them takes the time of some updates.
            handler = ocp.PyTreeCheckpointHandler(use_compression=False)
            self._writer = ocp.AsyncCheckpointer(handler, async_options=options)
        folder = step_folders.staged(self.directory, step) / STATE
        self._writer.save(folder, args=ocp.args.PyTreeSave(state))

    def _commit(self, step: int, state: Any) -> None:
        """Write, seal, rename and prune; runs in the background thread."""
        try:
            if state is not None:
                self._write(step, state)
            self._writer.wait_until_finished()
            if jax.process_index() != 0:
                return
            message = step_folders.commit(self.directory, step)
            if message is not None:
                self._report(message)
            self._damaged.discard(step)
            best = None if self._keep_best is None else self.best(self._keep_best)
            step_folders.prune(
                self.directory,
                step,
                keep_last=self._keep_last,
                keep_every=self._keep_every,
                keep=() if best is None else (best,),
                spare=self._damaged,
            )
        except Exception as error:
            raise self._failure(step, error) from error
        finally:
            logging.getLogger("absl").removeFilter(_not_from_orbax)

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        """Make room again and say what was lost and what is left."""
        if self._writer is not None:  # its threads may still write where we are to tidy up
            with contextlib.suppress(Exception):
                self._writer.close()
            self._writer = None
        if jax.process_index() == 0:
            shutil.rmtree(step_folders.staged(self.directory, step), ignore_errors=True)
        earlier = self.steps()
        left = f"the last one there is step {earlier[-1]}" if earlier else "there is none yet"
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        if "No space left on device" in str(error):
            reason = "No space left on device"
        return CheckpointError(f"Could not save step {step} in {self.directory}; {left}. {reason}")

    def _newest_sound(self, steps: list[int]) -> int:
        for path in step_folders.leftovers(self.directory):
            self._report_once(f"{path} is incomplete: an unfinished save; it is not used.")
        for step in reversed(steps):
            if self._is_sound(step):
                return step
        return _NOTHING_SOUND if steps else _NOTHING

    def _is_sound(self, step: int) -> bool:
        damage = find_damage(self.directory / str(step))
        if damage is not None:
            self._damaged.add(step)
            self._report_once(f"{self.directory / str(step)} is {damage}; it is not used.")
        return damage is None

    def _require_sound(self, step: int) -> None:
        self.wait()
        folder = self.directory / str(step)
        if step not in self.steps():
            raise CheckpointError(
                f"`step` must be one of those in {self.directory}, {self.steps()}; got {step}."
            )
        damage = find_damage(folder)
        if damage is not None:
            raise CheckpointError(f"{folder} is {damage}. Nothing there was changed.")

    def _report_once(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            self._report(message)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
