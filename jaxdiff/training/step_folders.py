"""The folders of a run's checkpoints, one a step, and the renames that keep each of them whole.

::

    500/         committed: sealed by `checksums`
    510.tmp/     being written, or being deleted
    490.corrupt/ found damaged, put aside when step 490 was saved anew

    500/checkpoint.json  which step it is, its files, and which of its leaves are keys

A folder is written under its `.tmp` name, sealed, and then renamed; deletion goes the other way:
renamed first, then emptied. So a folder with a plain number is whole whenever the process dies.
In an object store, which renames nothing, the seal itself commits: `step_objects`.
"""

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxdiff import files
from jaxdiff.training import checksums
from jaxdiff.training.checksums import flush, seal

CONFIG = "config.json"
CONTENTS = "checkpoint.json"
COMMITTED = re.compile(r"0|[1-9][0-9]*")
_STAGED = re.compile(r"[0-9]+\.tmp")
_LEFT_OVER = re.compile(r"[0-9]+\..*tmp.*")  # orbax's own temporary names as well


class Steps(Protocol):
    """The checkpoints of a directory, one a step, each of them whole or not there."""

    def steps(self) -> list[int]:
        """List the committed steps, oldest first, without verifying them."""

    def leftovers(self) -> list[files.Path]:
        """List what an unfinished save or deletion left behind."""

    def stage(self, step: int, spread: bool) -> files.Path:
        """Make and return the folder in which a step is written; nothing is left there.

        Args:
            step: which.
            spread: whether several processes write parts of it there.
        """

    def staged(self, step: int, spread: bool) -> files.Path:
        """Name that folder; where it is spread, in any process."""

    def unstage(self, step: int) -> None:
        """Delete what was written of a step that is not to be."""

    def opened(self, step: int) -> contextlib.AbstractContextManager[Path]:
        """Give a local folder that holds a step, while the block runs."""

    def find_damage(
        self, step: int, config: Mapping[str, Any] | None, free: Collection[str]
    ) -> str | None:
        """Tell what is wrong with a step, as :func:`damage_of` does."""

    def commit(
        self,
        step: int,
        keys: Mapping[str, str],
        damage_of: Callable[[int], str | None],
    ) -> str | None:
        """Seal a staged step, and let it be there from one instant to the next.

        A sound one of that number stays, and the staged one goes; a damaged one is put aside.
        Killed meanwhile, the run has its earlier checkpoints.

        Args:
            step: the one that was staged.
            keys: the leaves that are random keys, and of which kind.
            damage_of: step -> what is wrong with the one there is, None where it is sound.

        Returns:
            What was found in the place, for the user; None if it was free.
        """

    def retire(self, step: int) -> None:
        """Let a step that is superseded be a leftover, from one instant to the next."""

    def clear(self) -> None:
        """Delete what unfinished saves and deletions left; nothing is being staged."""

    def close(self) -> None:
        """Let go of what is held on the local disk of a step that was verified and not read."""


class StepFolders:
    """The steps of a directory on a disk."""

    def __init__(self, directory: Path) -> None:
        """Name the directory, which holds one folder a step."""
        self.directory = directory

    def steps(self) -> list[int]:
        """See `Steps`."""
        if not self.directory.is_dir():
            return []
        folders = (path for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(path.name) for path in folders if COMMITTED.fullmatch(path.name))

    def leftovers(self) -> list[files.Path]:
        """See `Steps`."""
        if not self.directory.is_dir():
            return []
        found = (path for path in self.directory.iterdir() if _LEFT_OVER.fullmatch(path.name))
        return [*sorted(found)]

    def stage(self, step: int, spread: bool) -> Path:
        """See `Steps`."""
        staged = self.staged(step)
        files.remove_tree(staged)
        staged.mkdir(parents=True)
        return staged

    def staged(self, step: int, spread: bool = False) -> Path:
        """See `Steps`."""
        return self.directory / f"{step}.tmp"

    def unstage(self, step: int) -> None:
        """See `Steps`."""
        files.remove_tree(self.staged(step))

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[Path]:
        """See `Steps`."""
        yield self.directory / str(step)

    def find_damage(
        self, step: int, config: Mapping[str, Any] | None, free: Collection[str]
    ) -> str | None:
        """See `Steps`."""
        return damage_of(self.directory / str(step), step, config, free)

    def commit(
        self, step: int, keys: Mapping[str, str], damage_of: Callable[[int], str | None]
    ) -> str | None:
        """See `Steps`."""
        folder, message = self.directory / str(step), None
        made = self.staged(step)
        describe(made, step, keys)
        seal(made)
        if folder.exists():
            damage = damage_of(step)
            if damage is None:
                return f"{folder} already holds a sound checkpoint; it is kept."
            aside = free_name(folder)
            folder.rename(aside)
            message = f"{folder} is {damage}; moved to {aside}."
        made.rename(folder)
        flush(self.directory)
        return message

    def retire(self, step: int) -> None:
        """See `Steps`."""
        self.unstage(step)
        (self.directory / str(step)).rename(self.staged(step))

    def clear(self) -> None:
        """See `Steps`."""
        for path in self.directory.iterdir():
            if _STAGED.fullmatch(path.name):
                files.remove_tree(path)

    def close(self) -> None:
        """See `Steps`: nothing is held."""


def prune(
    kept: Steps,
    newest: int,
    *,
    keep_last: int,
    keep_every: int | None,
    keep: Collection[int] = (),
    spare: Collection[int] = (),
) -> None:
    """Delete old checkpoints and what unfinished saves left.

    Args:
        kept: the checkpoints; nothing is being staged.
        newest: the step just committed. Later ones belong to a run that was rewound: they stay.
        keep_last: how many steps up to `newest` stay.
        keep_every: multiples of this step stay.
        keep: steps that stay, whatever their age.
        spare: damaged steps: neither counted nor deleted.
    """
    candidates = [step for step in kept.steps() if step <= newest and step not in spare]
    for step in candidates[:-keep_last]:
        if step not in keep and (keep_every is None or step % keep_every):
            kept.retire(step)
    kept.clear()


def describe(made: Path, step: int, keys: Mapping[str, str]) -> None:
    """Write into a staged folder which step it is, what files it has and which leaves are keys."""
    about = {"step": step, "files": checksums.names(made), "keys": dict(keys)}
    (made / CONTENTS).write_text(json.dumps(about, indent=1) + "\n")


def free_name(folder: Any) -> Any:
    """Return where a damaged step is put aside: beside it, under a name that is free."""
    aside, count = folder.with_name(f"{folder.name}.corrupt"), 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"{folder.name}.corrupt-{count}")
    return aside


def contents(folder: Path) -> dict[str, Any]:
    """Return what a sound checkpoint says of itself; nothing where it is of an earlier version."""
    path = folder / CONTENTS
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


def damage_of(
    folder: Path,
    step: int,
    config: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
) -> str | None:
    """Tell what is wrong with a step's folder: altered, of another step, or of another run.

    Args:
        folder: a local one.
        step: which it should be.
        config: that of the run, None where any will do. Fields that are in one of two configs only
            came with a version, and do not tell runs apart.
        free: fields that may differ.

    Returns:
        None if it is sound; otherwise "corrupt (...)" or "incomplete (...)", saying why.
    """
    damage = checksums.find_damage(folder, CONTENTS)
    if damage is not None:
        return damage
    try:
        sealed_step = contents(folder).get("step", step)
        sealed = json.loads((folder / CONFIG).read_bytes()) if config is not None else {}
    except (OSError, ValueError, TypeError) as error:
        return f"corrupt ({error})"
    if sealed_step != step:
        return f"corrupt (it is a copy of step {sealed_step})"
    asked = json.loads(json.dumps(dict(config or {})))
    differing = ", ".join(
        f"{name} {sealed[name]}, here {asked[name]}"
        for name in sorted(asked.keys() & sealed.keys() - set(free))
        if asked[name] != sealed[name]
    )
    return f"corrupt (it is another run's: {differing})" if differing else None
