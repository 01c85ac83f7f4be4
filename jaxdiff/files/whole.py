"""Files that are written whole or not at all, whenever the process dies or the disk is full.

On a disk a file is written beside its place under a hidden name that nobody can foresee, opened so
that nothing already there is followed or overwritten, flushed to the disk, and only then renamed.
What a kill leaves is locked by nobody, which is how the next writer of the same file knows that it
may be deleted. In a store an object is whole of itself: it is made on the local disk, then sent.
"""

import contextlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxdiff.files import paths

try:
    import fcntl
except ImportError:  # not a Unix: files are whole there too, only leftovers stay
    fcntl = None  # type: ignore[assignment]

_STAGED = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file, to be written in the block, that takes its name when the block ends well.

    Args:
        path: the file, in a folder that exists, or an object's URL; replaced if it is there.

    Yields:
        A file that can be sought in; `figure.savefig(file, format="png")` and
        `np.save(file, array)` write to it.

    Raises:
        OSError: if it cannot be written, naming `path`; what was there before is then as it was.
    """
    place = paths.to_path(path)
    if paths.is_stored(place):
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            place.put(Path(file.name))
        return
    path = Path(place)
    staged: Path | None = None
    try:
        descriptor, staged = _open_staged(path)
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(staged, path)
            staged = None
        flush(path.parent)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(staged):  # else of another file
            reason = error.strerror or str(error)
            raise type(error)(error.errno, reason, str(path)) from error
        raise
    finally:
        if staged is not None:
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8) whole or not at all.

    Raises:
        OSError: if it cannot be written, naming `path`.
    """
    with whole(path) as file:
        file.write(text.encode())


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write an `.npz` file whole or not at all; the same arrays are the same bytes.

    Unlike `np.savez` it takes arrays of any name, and never a pickle.

    Args:
        path: the file.
        arrays: anything `np.asarray` takes but objects, by name.

    Raises:
        ValueError: if an array is one of objects.
        OSError: if it cannot be written, naming `path`.
    """
    import zipfile

    with whole(path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, value in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(value), allow_pickle=False)


def is_leftover(path: Path) -> bool:
    """Tell whether a name is one under which `whole` writes: not there, as far as readers go."""
    return _STAGED.fullmatch(path.name) is not None


def flush(path: Path) -> None:
    """Flush a file or a folder to the disk, so that it outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hold(descriptor: int, *, shared: bool = False) -> bool | None:
    """Lock an open file for as long as this process has it open; the kernel releases it.

    Args:
        descriptor: of the file.
        shared: with others who share it, as readers do.

    Returns:
        True if it is held now, False if another process holds it, None where files cannot be
        locked.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _open_staged(path: Path) -> tuple[int, Path]:
    _sweep(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    while True:
        staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            descriptor = os.open(staged, flags | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        hold(descriptor)
        if os.fstat(descriptor).st_nlink:  # not swept by another before it was locked
            return descriptor, staged
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Delete what killed writers of this file left; those alive hold theirs."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if not (name.startswith(f".{path.name}.") and _STAGED.fullmatch(name)):
                continue
            with contextlib.suppress(OSError):
                left = path.with_name(name)
                if not stat.S_ISREG(os.lstat(left).st_mode):
                    continue
                descriptor = os.open(left, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    if hold(descriptor):
                        os.unlink(left)
                finally:
                    os.close(descriptor)
