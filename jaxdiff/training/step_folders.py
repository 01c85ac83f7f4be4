"""The folders of a run's checkpoints, one a step, and the renames that keep each of them whole.

::

    500/         committed: sealed by `checksums`
    510.tmp/     being written, or being deleted
    490.corrupt/ found damaged, put aside when step 490 was saved anew

    500/checkpoint.json  which step it is, its files, and which of its leaves are keys

A folder is written under its `.tmp` name, sealed, and then renamed; deletion goes the other way:
renamed first, then emptied. So a folder with a plain number is whole whenever the process dies.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from jaxdiff.training import checksums
from jaxdiff.training.checksums import flush, seal

CONFIG = "config.json"
CONTENTS = "checkpoint.json"
_COMMITTED = re.compile(r"0|[1-9][0-9]*")
_STAGED = re.compile(r"[0-9]+\.tmp")
_LEFT_OVER = re.compile(r"[0-9]+\..*tmp.*")  # orbax's own temporary names as well


def steps(directory: Path) -> list[int]:
    """List the committed steps, oldest first, without verifying them."""
    if not directory.is_dir():
        return []
    folders = (path for path in directory.iterdir() if path.is_dir())
    return sorted(int(path.name) for path in folders if _COMMITTED.fullmatch(path.name))


def leftovers(directory: Path) -> list[Path]:
    """List what an unfinished save or deletion left behind."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _LEFT_OVER.fullmatch(path.name))


def staged(directory: Path, step: int) -> Path:
    """Name the folder in which a step is written."""
    return directory / f"{step}.tmp"


def clear(path: Path) -> None:
    """Delete what is in the place of a staged folder; a link or a file goes itself."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def contents(folder: Path) -> dict[str, Any]:
    """Return what a sound checkpoint says of itself; nothing where it is of an earlier version."""
    path = folder / CONTENTS
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


def find_damage(
    directory: Path,
    step: int,
    config: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
) -> str | None:
    """Tell what is wrong with a step's folder: altered, of another step, or of another run.

    Args:
        directory: holds one folder a step.
        step: the one to look at.
        config: that of the run, None where any will do. Fields that are in one of two configs only
            came with a version, and do not tell runs apart.
        free: fields that may differ.

    Returns:
        None if it is sound; otherwise "corrupt (...)" or "incomplete (...)", saying why.
    """
    folder = directory / str(step)
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


def commit(
    directory: Path,
    step: int,
    keys: Mapping[str, str],
    damage_of: Callable[[int], str | None],
) -> str | None:
    """Seal a staged folder and give it its plain name.

    A sound folder of that name stays, and the staged one is left to `prune`; a damaged one is
    put aside. Killed between these two renames, the run has its earlier checkpoints.

    Args:
        directory: holds one folder a step.
        step: the one that was staged.
        keys: the leaves that are random keys, and of which kind.
        damage_of: step -> what is wrong with a folder of that step, None where it is sound.

    Returns:
        What was found in the place, for the user; None if it was free.
    """
    folder, message = directory / str(step), None
    made = staged(directory, step)
    about = {"step": step, "files": checksums.names(made), "keys": dict(keys)}
    (made / CONTENTS).write_text(json.dumps(about, indent=1) + "\n")
    seal(made)
    if folder.exists():
        damage = damage_of(step)
        if damage is None:
            return f"{folder} already holds a sound checkpoint; it is kept."
        aside, count = directory / f"{step}.corrupt", 1
        while aside.exists():
            count += 1
            aside = directory / f"{step}.corrupt-{count}"
        folder.rename(aside)
        message = f"{folder} is {damage}; moved to {aside}."
    made.rename(folder)
    flush(directory)
    return message


def prune(
    directory: Path,
    newest: int,
    *,
    keep_last: int,
    keep_every: int | None,
    keep: Collection[int] = (),
    spare: Collection[int] = (),
) -> None:
    """Delete old checkpoints and what unfinished saves left.

    Args:
        directory: holds one folder a step; nothing is being staged in it.
        newest: the step just committed. Later ones belong to a run that was rewound: they stay.
        keep_last: how many steps up to `newest` stay.
        keep_every: multiples of this step stay.
        keep: steps that stay, whatever their age.
        spare: damaged steps: neither counted nor deleted.
    """
    candidates = [step for step in steps(directory) if step <= newest and step not in spare]
    for step in candidates[:-keep_last]:
        if step not in keep and (keep_every is None or step % keep_every):
            clear(staged(directory, step))
            (directory / str(step)).rename(staged(directory, step))
    for path in directory.iterdir():
        if _STAGED.fullmatch(path.name):
            clear(path)
