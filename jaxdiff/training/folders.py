"""What may be the folder of a run, judged before anything is read or written there."""

import os
from pathlib import Path

UNREADABLE = "[]*?\\"
"""Characters that orbax takes for patterns when it reads a path: written, and never found again."""


class RunError(ValueError):
    """A run directory cannot be used as asked; the message says what would do."""


def of_run(run_dir: str | os.PathLike[str], option: str = "--run-dir") -> Path:
    """Return the folder of a run, which may not exist yet; touch nothing.

    Args:
        run_dir: a path.
        option: how a refusal calls it.

    Raises:
        RunError: if it is empty, a URL, runs through a file, or has a name that checkpoints cannot
            be read back from.
    """
    problem = problem_of(run_dir)
    if problem is not None:
        raise RunError(f"{option} {problem}")
    directory = Path(run_dir)
    for folder in (directory, *directory.parents):
        try:
            if folder.is_dir():
                return directory
            if os.path.lexists(folder):
                what = "a link to nothing" if folder.is_symlink() else "a file"
                raise RunError(
                    f"{option} must be a folder; {folder} is {what}. Take another {option}."
                )
        except OSError as error:
            raise RunError(
                f"{option} {directory} cannot be used: {error.strerror}. Take another."
            ) from error
    return directory


def existing_run(
    run_dir: str | os.PathLike[str], option: str = "--run-dir", remedy: str = ""
) -> Path:
    """Return the folder of a run that is to be read.

    Args:
        run_dir: a path.
        option: how a refusal calls it.
        remedy: what would make it exist, for the refusal.

    Raises:
        RunError: as :func:`of_run`, or if it does not exist.
    """
    directory = of_run(run_dir, option)
    if not directory.is_dir():
        raise RunError(f"{option} {directory} does not exist.{remedy}")
    return directory


def problem_of(folder: str | os.PathLike[str]) -> str | None:
    """Say why checkpoints in a folder of this name could not be read back, None where they can."""
    text = os.fspath(folder)
    if not text:
        return "must name a folder; got an empty name."
    if "://" in text:
        return (
            "must be on a file system with an atomic rename; "
            f"got {text}. Mount it, or copy the run there afterwards."
        )
    full = str(Path(text).absolute())
    try:
        full.encode()
    except UnicodeEncodeError:
        return f"must be text in UTF-8; got {text!r}. Rename it."
    if any(part.endswith(":") for part in Path(text).parts):
        return f"must not have a part that ends in a colon, as URLs have; got {text}. Rename it."
    found = "".join(sorted({letter for letter in full if letter in UNREADABLE}))
    if found:
        return (
            f"must have none of {' '.join(UNREADABLE)} in its full path, or its checkpoints cannot "
            f"be read back; {full} has {' '.join(found)}. Rename that, or go through a link."
        )
    return None
