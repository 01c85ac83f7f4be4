"""Which of a run's checkpoints may be believed, and what they hold; beside a run that saves, too.

A run deletes old checkpoints as it saves new ones: one that was found sound may be gone before it
is read. That is no damage: there are newer ones.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdiff import files
from jaxdiff.training import lock, step_folders
from jaxdiff.training.state import frozen_of, with_frozen, without_frozen
from jaxdiff.training.step_folders import CONFIG, StepFolders, Steps
from jaxdiff.training.stored_tree import CheckpointError, named_leaves, read

STATE = "state"
METRICS = "metrics.json"
NOTHING, NOTHING_SOUND = -1, -2  # in place of a step, for processes that agree on one


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


class UnusableError(CheckpointError):
    """A checkpoint turned out, while it was read, to be one that is not to be used.

    It was deleted, the run having saved newer ones; or its state is of another step.
    """


class SoundSteps:
    """The checkpoints of a directory, judged before they are believed."""

    def __init__(
        self,
        directory: files.Path,
        config: Mapping[str, Any] | None,
        free: Collection[str],
        report: Callable[[str], None],
    ) -> None:
        """Name a directory; for the arguments see `Checkpoints`."""
        self.directory = directory
        self.kept = _kept_in(directory)
        self.damaged: set[int] = set()
        self._config, self._free, self._report = config, free, report
        self._reported: set[str] = set()
        self._copies: dict[int, str] = {}
        self._metrics: dict[int, dict[str, Any]] = {}

    def steps(self) -> list[int]:
        """List the committed steps, oldest first, without verifying them.

        Raises:
            CheckpointError: if the directory cannot be read.
        """
        try:
            return self.kept.steps()
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be read: {error.strerror}.") from error

    def best(self, metric: str) -> int | None:
        """Return the committed step whose `metric` is smallest, None where none has it finite."""
        found, steps = [], self.steps()
        self._metrics = {step: self._metrics[step] for step in steps if step in self._metrics}
        for step in steps:
            try:
                value = float(self.metrics(step)[metric])
            except (ValueError, LookupError, TypeError):  # saved without it, or damaged
                continue
            if math.isfinite(value):
                found.append((value, step))
        return min(found)[1] if found else None

    def metrics(self, step: int) -> dict[str, Any]:
        """Return what was measured of a step when it was saved; nothing where it does not say."""
        if step not in self._metrics:
            try:
                found = json.loads((self.directory / str(step) / METRICS).read_bytes())
            except (OSError, ValueError):
                return {}
            self._metrics[step] = found if isinstance(found, dict) else {}
        return self._metrics[step]

    def newest(self) -> int:
        """Find the newest sound step, reporting those that are not, or `NOTHING...`."""
        if not lock.is_saved_to(self.directory):  # else they are at work
            for path in self.kept.leftovers():
                self._report_once(f"{path} is incomplete: an unfinished save; it is not used.")
        while True:
            steps = self.steps()
            for step in reversed(steps):
                if self.is_sound(step):
                    return step
            if self.steps() == steps:  # else some were pruned, and there are newer ones
                return NOTHING_SOUND if steps else NOTHING

    def is_sound(self, step: int) -> bool:
        """Tell whether a step may be believed, reporting one that may not."""
        damage = self.find_damage(step)
        if damage is not None and (self.directory / str(step)).is_dir():  # else it was pruned
            self.damaged.add(step)
            self._report_once(f"{self.directory / str(step)} is {damage}; it is not used.")
        return damage is None

    def require_sound(self, step: int) -> None:
        """Refuse a step that is not there or may not be believed.

        Raises:
            CheckpointError: saying which it is.
        """
        steps = self.steps()
        damage = self.find_damage(step) if step in steps else None
        folder = self.directory / str(step)
        if step not in steps or not folder.is_dir():
            raise CheckpointError(
                f"`step` must be one of those in {self.directory}, {self.steps()}; got {step}."
            )
        if damage is not None:
            raise CheckpointError(f"{folder} is {damage}. Nothing there was changed.")

    def read(self, step: int, target: Any) -> Restored:
        """Read a sound step.

        Raises:
            UnusableError: if it is deleted meanwhile, or was one of an earlier version, which
                named its step in the state only, and that is another one.
            CheckpointError: if it does not fit `target`.
        """
        folder = self.directory / str(step)
        try:
            with self.kept.opened(step) as local:
                contents = step_folders.contents(local)
                state = read(local / STATE, without_frozen(target), contents.get("keys", {}))
                state = with_frozen(state, frozen_of(target))
                restored = Restored(step, state, json.loads((local / CONFIG).read_bytes()))
        except Exception as error:
            if folder.is_dir():
                raise
            raise UnusableError(f"{folder} was deleted while it was read.") from error
        if not folder.is_dir():  # what orbax did not find any more may be zeros
            raise UnusableError(f"{folder} was deleted while it was read.")
        if self._config is not None and "step" not in contents:
            found = np.asarray(named_leaves(state).get("step", step))
            if found.shape == () and found != step:
                self._copies[step] = f"corrupt (it is a copy of step {found})"
                raise UnusableError(f"{folder} is {self._copies[step]}.")
        return restored

    def replaced(self, step: int) -> None:
        """Forget what was found wrong with a step that is there anew."""
        self.damaged.discard(step)
        self._copies.pop(step, None)
        self._metrics.pop(step, None)

    def find_damage(self, step: int) -> str | None:
        """Tell what is wrong with a step, None where it is sound."""
        if step in self._copies:
            return self._copies[step]
        return self.kept.find_damage(step, self._config, self._free)

    def _report_once(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            self._report(message)


def _kept_in(directory: files.Path) -> Steps:
    if files.is_stored(directory):
        from jaxdiff.training.step_objects import StepObjects

        return StepObjects(directory)
    return StepFolders(directory)
