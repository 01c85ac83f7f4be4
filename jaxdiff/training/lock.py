"""One writer at a time in a run directory, by a lock that the kernel releases when it dies.

The hidden file `.lock` is there, and locked, as long as a process writes the run. It says who: a
refusal can then tell what to wait for. A file that a kill left is locked by nobody and stops
nobody. Readers need no lock.

Checkpoints, which are also saved without a run directory, are guarded alike by a lock on their
folder itself, which leaves no trace and tells readers that what is unfinished there is at work.

In an object store, which has no locks, it is a lease: see `lease`. That of a run covers the
checkpoints right below it. A lease can be lost while the process lives; :func:`require_held` tells,
and from then on nothing in the folder is written by this process.
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
from jaxdiff.training import lease
from jaxdiff.training.folders import CHECKPOINTS, RunError, of_run

LOCK = lease.LOCK

_BUSY = "another process saves there"

_held: dict[files.Path, tuple[int | lease.Lease, int]] = {}
"""By what is locked: the descriptor or lease, and how often this process holds it."""


@contextlib.contextmanager
def writing(run_dir: str | os.PathLike[str], *, take_over: bool = False) -> Iterator[files.Path]:
    """Be the only process that writes a run directory, while the block runs.

    The process may hold it several times over. Of several processes of one run only process 0
    locks. On a file system without locks a line on stderr says that nothing is guarded.

    Args:
        run_dir: made if missing, and removed again where nothing was written in it.
        take_over: end another process's lease of a folder in a store; that process stops before it
            writes again. A lock on a disk is the kernel's, and lasts as long as its process.

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
    key = directory.resolve() / LOCK
    try:
        if files.is_stored(directory):
            held, count = _held.get(key) or (_lease(directory, take_over), 0)
            if isinstance(held, lease.Lease):
                held.check()
        else:
            made = _make(directory)
            held, count = _held.get(key) or (_acquire(directory, take_over), 0)
        _held[key] = held, count + 1
    except OSError as error:
        _remove(made)
        raise RunError(
            f"--run-dir {directory} cannot be written: {error.strerror or error}. Take another."
        ) from error
    try:
        yield directory
    finally:
        _end(key)
        _remove(made)


def writer(directory: files.Path) -> str | None:
    """Say which process writes a run directory; None where none does, or that cannot be known.

    A reader may ask at any time: it shares the lock for an instant, which who is to write waits
    for, and other readers share too. In a store it reads the lease, and writes nothing.
    """
    if files.is_stored(directory):
        with contextlib.suppress(OSError):
            seen = lease.look(directory)
            return str(seen.holder) if seen is not None and seen.held else None
        return None
    key = directory.resolve() / LOCK
    held, _ = _held.get(key, (None, 0))
    if isinstance(held, int):
        return _read(held)
    try:
        descriptor = os.open(key, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        return _read(descriptor) if files.hold(descriptor, shared=True) is False else None
    finally:
        os.close(descriptor)


def saving(directory: files.Path) -> Callable[[], None]:
    """Be the only process that saves checkpoints in a folder, until what this returns is called.

    The process may hold it several times over. In a store the lease of the run above it is held
    until then too, if this process has it; otherwise the folder has one of its own.

    Args:
        directory: exists.

    Raises:
        BlockingIOError: if another process saves there.
        OSError: if the folder cannot be opened.
    """
    if files.is_stored(directory):
        return _saving_to_store(directory)
    key = directory.resolve()
    descriptor, count = _held.get(key, (-1, 0))
    if not count:
        descriptor = os.open(key, os.O_RDONLY)
        if _hold_soon(descriptor) is False:
            os.close(descriptor)
            raise BlockingIOError(errno.EAGAIN, _BUSY, str(directory))
    _held[key] = descriptor, count + 1
    return lambda: _end(key)


def is_saved_to(directory: files.Path) -> bool | None:
    """Tell whether a process saves checkpoints in a folder; None where that cannot be known.

    In a store whoever writes the run above it counts, and this host's clock may have to tell.
    """
    if files.is_stored(directory):
        if _leases_of(directory):
            return True
        found = [lease.is_held(folder) for folder in (directory, directory.parent)]
        return True if True in found else None if None in found else False
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


def require_held(directory: files.Path) -> None:
    """Refuse to commit what was written in a folder of a store, if its lease was lost meanwhile.

    It looks at the store, and makes the lease last for its full time from now: what is then written
    at once is written by its only holder. On a disk, where a lock lasts as long as its process,
    and where this process never acquired a lease, there is nothing to lose.

    Args:
        directory: that of a run, or of its checkpoints.

    Raises:
        RunError: if it is lost, saying how.
        OSError: if the store does not answer.
    """
    for held in _leases_of(directory):
        held.renew()


def _lease(directory: files.Path, take_over: bool) -> lease.Lease:
    """Acquire the lease of a run, unless its checkpoints are saved to without one of it."""
    checkpoints = directory / CHECKPOINTS
    if checkpoints / LOCK in _held:
        return lease.acquire(directory, take_over=take_over)
    return _acquire_beside(directory, checkpoints, take_over=take_over)


def _acquire_beside(
    directory: files.Path, other: files.Path, *, take_over: bool = False
) -> lease.Lease:
    """Acquire the lease of a folder, while nobody holds that of another."""
    held = lease.acquire(directory, take_over=take_over)
    try:
        if take_over and lease.is_held(other):
            lease.acquire(other, take_over=True).release()
        lease.refuse_held(other)
    except (RunError, OSError):
        held.release()
        raise
    return held


def _leases_of(directory: files.Path) -> list[lease.Lease]:
    """Return what this process holds of a folder of checkpoints in a store, or of a run."""
    folders = (directory, directory.parent) if files.is_stored(directory) else ()
    found = (_held.get(folder / LOCK, (None, 0))[0] for folder in folders)
    return [held for held in found if isinstance(held, lease.Lease)]


def _saving_to_store(directory: files.Path) -> Callable[[], None]:
    keys = directory.parent / LOCK, directory / LOCK
    key = next((key for key in keys if key in _held), directory / LOCK)
    try:
        held, count = _held.get(key) or (_acquire_beside(directory, directory.parent), 0)
    except RunError as error:
        raise BlockingIOError(errno.EAGAIN, _BUSY, str(directory)) from error
    _held[key] = held, count + 1
    return lambda: _end(key)


def _end(key: files.Path) -> None:
    """Count one holder less, and release what nobody holds any more. A fork never held it."""
    if key not in _held:
        return
    held, count = _held.pop(key)
    if count > 1:
        _held[key] = held, count - 1
    elif isinstance(held, lease.Lease):
        held.release()
    else:
        if key.name == LOCK:
            with contextlib.suppress(OSError):
                key.unlink()
        os.close(held)


def _hold_soon(descriptor: int) -> bool | None:
    """Lock a file as `files.hold` does; others may hold it for an instant, to see whether it is."""
    for _ in range(10):
        held = files.hold(descriptor)
        if held is not False:
            return held
        time.sleep(0.02)
    return False


def _acquire(directory: Path, take_over: bool) -> int:
    path = directory / LOCK
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        held = _hold_soon(descriptor)
        if held is False:
            holder = _read(descriptor)
            os.close(descriptor)
            kept = " Nobody can take over a lock of the kernel's." if take_over else ""
            raise RunError(
                f"--run-dir {directory} is being written by {holder}. Wait until it ends, stop it, "
                f"or take another --run-dir.{kept}"
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
    for key, (held, _) in list(_held.items()):
        if isinstance(held, lease.Lease):
            held.leave_to_parent()
        else:
            with contextlib.suppress(OSError):
                os.close(held)
            del _held[key]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_fork)
