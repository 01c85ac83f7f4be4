"""One writer at a time in a run directory, by a lock that the kernel releases when it dies.

The hidden file `.lock` is there, and locked, as long as a process writes the run. It says who: a
refusal can then tell what to wait for. A file that a kill left is locked by nobody and stops
nobody. Readers need no lock.

Checkpoints, which are also saved without a run directory, are guarded alike by a lock on their
folder itself, which leaves no trace and tells readers that what is unfinished there is at work.
"""

import contextlib
import datetime
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxdiff import files
from jaxdiff.training.folders import RunError, of_run

LOCK = ".lock"

_held: dict[Path, tuple[int, int]] = {}
"""By what is locked: the descriptor, and how often this process holds it."""


@contextlib.contextmanager
def writing(run_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """Be the only process that writes a run directory, while the block runs.

    The process may hold it several times over. Of several processes of one run only process 0
    locks. On a file system without locks a line on stderr says that nothing is guarded.

    Args:
        run_dir: made if missing, and removed again where nothing was written in it.

    Yields:
        The folder.

    Raises:
        RunError: if another process writes there, saying which; or the folder cannot be one.
    """
    directory = of_run(run_dir)
    if jax.distributed.is_initialized() and jax.process_index() != 0:
        yield directory
        return
    made: list[Path] = []
    try:
        made = _make(directory)
        key = directory.resolve() / LOCK
        descriptor, count = _held.get(key) or (_acquire(directory), 0)
        _held[key] = descriptor, count + 1
    except OSError as error:
        _remove(made)
        raise RunError(
            f"--run-dir {directory} cannot be written: {error.strerror or error}. Take another."
        ) from error
    try:
        yield directory
    finally:
        if _release(key):
            with contextlib.suppress(OSError):
                key.unlink()
            os.close(descriptor)
        _remove(made)


def saving(directory: Path) -> Callable[[], None]:
    """Be the only process that saves checkpoints in a folder, until what this returns is called.

    The process may hold it several times over.

    Args:
        directory: exists.

    Raises:
        BlockingIOError: if another process saves there.
        OSError: if the folder cannot be opened.
    """
    key = directory.resolve()
    descriptor, count = _held.get(key, (-1, 0))
    if not count:
        descriptor = os.open(key, os.O_RDONLY)
        if _hold_soon(descriptor) is False:
            os.close(descriptor)
            raise BlockingIOError(errno.EAGAIN, "another process saves there", str(directory))
    _held[key] = descriptor, count + 1

    def end() -> None:
        if _release(key):
            os.close(descriptor)

    return end


def is_saved_to(directory: Path) -> bool | None:
    """Tell whether a process saves checkpoints in a folder; None where that cannot be known."""
    key = directory.resolve()
    if key in _held:
        return True
    try:
        descriptor = os.open(key, os.O_RDONLY)
    except OSError:
        return None
    try:
        held = files.hold(descriptor)
        return None if held is None else not held
    finally:
        os.close(descriptor)


def _release(key: Path) -> bool:
    """Count one holder less; tell whether it was the last. A fork never was one."""
    if key not in _held:
        return False
    descriptor, count = _held.pop(key)
    if count > 1:
        _held[key] = descriptor, count - 1
    return count == 1


def _hold_soon(descriptor: int) -> bool | None:
    """Lock a file as `files.hold` does; others may hold it for an instant, to see whether it is."""
    for _ in range(10):
        held = files.hold(descriptor)
        if held is not False:
            return held
        time.sleep(0.02)
    return False


def _acquire(directory: Path) -> int:
    path = directory / LOCK
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        held = _hold_soon(descriptor)
        if held is False:
            holder = _read(descriptor)
            os.close(descriptor)
            raise RunError(
                f"--run-dir {directory} is being written by {holder}. Wait until it ends, stop it, "
                "or take another --run-dir."
            )
        if held is None:
            sys.stderr.write(f"{directory} cannot be locked: see to it that one process writes.\n")
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False)):
                _write(descriptor)
                return descriptor
        os.close(descriptor)  # the one before released it, and its file, in this instant


def _write(descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # on a full disk it is held all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)


def _read(descriptor: int) -> str:
    try:
        holder: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        return "process {pid} on {host}, since {since}".format(**holder)
    except (OSError, ValueError, KeyError, TypeError):  # it has not said yet, or could not
        return "another process"


def _make(directory: Path) -> list[Path]:
    """Make a folder and those above it; return those that were not there, the deepest first."""
    missing = []
    for folder in (directory, *directory.parents):
        if folder.exists():
            break
        missing.append(folder)
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _remove(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # one that holds something stays
        for folder in folders:
            folder.rmdir()


def _release_in_fork() -> None:
    """Let a fork hold nothing: it may outlive the process that locked."""
    for descriptor, _ in _held.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_fork)
