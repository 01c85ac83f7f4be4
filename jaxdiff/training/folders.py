"""What may be the folder of a run, judged before anything is read or written there."""

import os
import pathlib

from jaxdiff import files

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints."""
UNREADABLE = "[]*?\\"
"""Characters that orbax takes for patterns when it reads a path: written, and never found again."""
UNREADABLE_IN_STORES = UNREADABLE + "#"
"""Those, and the one by which tools of stores tell versions of an object."""


class RunError(ValueError):
    """A run directory cannot be used as asked; the message says what would do."""


def of_run(run_dir: str | os.PathLike[str], option: str = "--run-dir") -> files.Path:
    """Return the folder of a run, which may not exist yet; touch nothing.

    Args:
        run_dir: a path, or a URL in an object store.
        option: how a refusal calls it.

    Raises:
        RunError: if it is empty, a URL of no store or of one that nothing installed reads, runs
            through a file, or has a name that checkpoints cannot be read back from.
    """
    problem = problem_of(run_dir)
    if problem is not None:
        raise RunError(f"{option} {problem}")
    directory = files.to_path(run_dir)
    if files.is_stored(directory):
        return _in_store(directory, option)
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
) -> files.Path:
    """Return the folder of a run that is to be read.

    Args:
        run_dir: a path, or a URL in an object store.
        option: how a refusal calls it.
        remedy: what would make it exist, for the refusal.

    Raises:
        RunError: as :func:`of_run`, or if it does not exist.
    """
    directory = of_run(run_dir, option)
    if not _is_dir(directory, option):
        raise RunError(f"{option} {directory} does not exist.{remedy}")
    return directory


def problem_of(folder: str | os.PathLike[str]) -> str | None:
    """Say why checkpoints in a folder of this name could not be read back, None where they can."""
    text = os.fspath(folder)
    if not text:
        return "must name a folder; got an empty name."
    if "://" in text:
        return _problem_in_store(text)
    full = str(pathlib.Path(text).absolute())
    try:
        full.encode()
    except UnicodeEncodeError:
        return f"must be text in UTF-8; got {text!r}. Rename it."
    if any(part.endswith(":") for part in pathlib.Path(text).parts):
        return f"must not have a part that ends in a colon, as URLs have; got {text}. Rename it."
    found = "".join(sorted({letter for letter in full if letter in UNREADABLE}))
    if found:
        return (
            f"must have none of {' '.join(UNREADABLE)} in its full path, or its checkpoints cannot "
            f"be read back; {full} has {' '.join(found)}. Rename that, or go through a link."
        )
    return None


def _is_dir(directory: files.Path, option: str) -> bool:
    try:
        return directory.is_dir()
    except OSError as error:
        if not files.is_stored(directory):
            raise
        raise RunError(f"{option} {directory} cannot be used: {error.strerror}.") from error


def _in_store(directory: files.Path, option: str) -> files.Path:
    """Return a folder in a store, unless an object has its name.

    Raises:
        RunError: if one has, or the store does not say.
    """
    try:
        taken = directory.is_file()
    except OSError as error:
        raise RunError(f"{option} {directory} cannot be used: {error.strerror}.") from error
    if taken:
        raise RunError(
            f"{option} must be a folder; {directory} is an object. Take another {option}."
        )
    return directory


def _problem_in_store(url: str) -> str | None:
    try:
        url.encode()
        path = files.to_path(url)
    except UnicodeEncodeError:
        return f"must be text in UTF-8; got {url!r}. Rename it."
    except (ValueError, ImportError) as error:
        return f"cannot be used: {error}"
    _, *within = os.fspath(path).partition("://")[2].split("/")
    if not within:
        return f"must be a folder in the bucket; got {path}. Name one: {path}/run."
    if ".." in within:
        return f"must not have a part that is '..', which no store knows; got {path}. Rename it."
    found = sorted({each for each in "/".join(within) if _is_unreadable(each)})
    if found:
        return (
            f"must have none of {' '.join(UNREADABLE_IN_STORES)} and no control characters, or its "
            f"checkpoints cannot be read back; {path} has {' '.join(map(repr, found))}. Rename it."
        )
    return None


def _is_unreadable(letter: str) -> bool:
    return letter in UNREADABLE_IN_STORES or not letter.isprintable()
