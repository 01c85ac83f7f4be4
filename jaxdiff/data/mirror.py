"""A prepared data set of a bucket, copied once to the local disk of a host.

    data.mirror("gs://bucket/data/my_set", "/mnt/disk/data/my_set")
    images = data.load_images("my_set", "train", data_dir="/mnt/disk/data")

Every host needs every file: the order is drawn over the whole set, so within an epoch a process
reads of all of them. Each is copied whole or not at all, several at once, and those by which
readers know that a set is complete come last: a set half copied is not prepared. The same call goes
on where one was killed, and does nothing where all is there. A copy is compared with the size, and
with the MD5 or CRC32C, that the store tells; Google's tells one, Amazon's no such.

It reads whatever fsspec reads: gs://, s3://, or a folder, such as that of a mount.
"""

import base64
import concurrent.futures
import contextlib
import errno
import hashlib
import importlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from jaxdiff import checks, files
from jaxdiff.data.errors import NotPreparedError, UnreadableError
from jaxdiff.extras import needed_by

NUM_WORKERS = 8
CHUNK_BYTES = 2**24
ATTEMPTS = 3
LOCK = ".mirror.lock"
LAST = ("dataset_info.json", "index.json")
"""What says that a set, or a store of arrays, is there."""


class Mirrored(NamedTuple):
    """What `mirror` found and did."""

    num_files: int
    num_bytes: int
    copied_files: int
    copied_bytes: int
    seconds: float


def mirror(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    verify: bool = False,
    num_workers: int = NUM_WORKERS,
    progress: Callable[[int, int], object] | None = None,
) -> Mirrored:
    """Copy the files of a folder, most often of a bucket, to a local one, unless they are there.

    To be called once on every host, before training. Of several processes of a host that call it
    one copies and the others wait, where the file system has locks. What else is in `destination`
    stays.

    Args:
        source: gs://bucket/folder, s3://bucket/folder or a path: of a TFDS set, of a
            `data.stored` or of images.
        destination: a local folder, made where missing.
        verify: also read what is there already and compare it with the checksums of the store,
            where it tells any; otherwise sizes are compared alone. What differs is copied anew.
        num_workers: how many files are copied at once.
        progress: called with (done, total) bytes: once with what was there, then after each file,
            by one thread at a time.

    Returns:
        The number of files and bytes, how many of each were copied, and the seconds it took.

    Raises:
        ImportError: if what reads such a store is not installed, naming the extra.
        NotPreparedError: a FileNotFoundError and ValueError, if there is no file in `source`.
        OSError: if `destination` cannot be written, or its disk has no room for all.
        UnreadableError: a ValueError naming the file, if one cannot be read or is not what the
            store says; what was copied before stays, and counts.
        ValueError: if `destination` is not local.
    """
    num_workers = checks.count("num_workers", num_workers)
    start, given = time.monotonic(), os.path.expanduser(os.fspath(destination))
    if "://" in given:
        raise ValueError(f"`destination` must be a local directory; got {given}.")
    place = Path(os.path.abspath(given))
    store, found = _listed(os.path.expanduser(os.fspath(source)))
    place.mkdir(parents=True, exist_ok=True)
    with _alone(place):
        missing = [each for each in found if not _is_there(place, each, verify)]
        total, left = (sum(each.size for each in some) for some in (found, missing))
        _check_room(place, left)
        if progress is not None:
            progress(total - left, total)
        told, done = threading.Lock(), total - left

        def copy(each: _File) -> None:
            nonlocal done
            _copy(store, each, place)
            with told:
                done += each.size
                if progress is not None:
                    progress(done, total)

        for last in (False, True):
            some = [each for each in missing if (_basename(each) in LAST) == last]
            _in_threads(copy, some, num_workers)
    seconds = time.monotonic() - start
    return Mirrored(len(found), total, len(missing), left, seconds)


def local(name: str, folder: str | os.PathLike[str], example: str = "SET") -> str:
    """Return the absolute path of a local folder; refuse a bucket.

    Args:
        name: of the argument.
        folder: what it is.
        example: how the message names what lies in it.

    Raises:
        NotPreparedError: a FileNotFoundError and ValueError, if it is no local one, saying how to
            make it one.
    """
    given = os.path.expanduser(os.fspath(folder))
    if "://" in given:
        raise NotPreparedError(
            f"`{name}` must be a local directory; got {given}. Records are read in random order, "
            "from a disk: copy the set to that of each host,\n"
            f"    python -m experiments.mirror --source {given.rstrip('/')}/{example} "
            f"--destination DIR/{example}\n"
            f"and give DIR as `{name}` or $JAXDIFF_DATA_DIR; or mount the bucket and give the "
            "folder of the mount."
        )
    return os.path.abspath(given)


class _Store(Protocol):
    """What is used of an fsspec file system."""

    def open(self, path: str, mode: str, **options: Any) -> Any:
        """Open a file."""

    def find(self, path: str, **options: Any) -> Mapping[str, Mapping[str, Any]]:
        """Return what is known of the files below a folder, by their paths."""


class _File(NamedTuple):
    path: str
    """In the store."""
    name: str
    """Within the folder, with slashes."""
    size: int
    checksums: dict[str, bytes]
    """Digests that the store tells, by "md5" or "crc32c"."""


def _listed(source: str) -> tuple[_Store, list[_File]]:
    """Return what reads a store, and the files of a folder of it, the largest first.

    Raises:
        ImportError: if that is not installed.
        NotPreparedError: if there is none.
        UnreadableError: if they cannot be listed, or one would lie outside of the folder.
    """
    with needed_by("jaxdiff.data.mirror", "stores"):
        store, folder = importlib.import_module("fsspec.core").url_to_fs(source)
    try:
        listing = store.find(folder, detail=True)
    except Exception as error:  # every store has its own
        raise UnreadableError(f"`source` {source} cannot be listed: {_reason(error)}.") from error
    found, above = [], folder.rstrip("/") + "/"
    for path, said in listing.items():
        if said.get("type") != "file" or path.endswith("/") or not path.startswith(above):
            continue  # a file itself, or what stands for a folder
        name = path.removeprefix(above)
        if ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise UnreadableError(f"`source` {source} holds {name}, which leads out of it.")
        if not _basename_of(name).startswith("."):
            found.append(_File(path, name, int(said["size"]), _checksums(said)))
    if not found:
        raise NotPreparedError(f"`source` must be a folder of files; {source} has none.")
    return store, sorted(found, key=lambda each: (-each.size, each.name))


def _checksums(said: Mapping[str, Any]) -> dict[str, bytes]:
    """Return what Google's store tells. The tags of Amazon's are MD5s of some objects only."""
    names = {"md5": "md5Hash", "crc32c": "crc32c"}
    return {k: base64.b64decode(said[name]) for k, name in names.items() if said.get(name)}


class _Digest:
    """The checksum of bytes that come, of a kind that the store tells and can be computed here."""

    def __init__(self, checksums: Mapping[str, bytes]) -> None:
        self.expected = b""
        self._sum: Any = None
        if "crc32c" in checksums:  # computed 10 times as fast as the other
            with contextlib.suppress(ImportError):
                self._sum = importlib.import_module("google_crc32c").Checksum()
                self.expected = checksums["crc32c"]
        if self._sum is None and "md5" in checksums:  # objects composed of parts have none
            self._sum = hashlib.md5(usedforsecurity=False)
            self.expected = checksums["md5"]

    @property
    def is_told(self) -> bool:
        """Tell whether there is one."""
        return self._sum is not None

    def update(self, chunk: bytes) -> None:
        """Take the next bytes."""
        if self.is_told:
            self._sum.update(chunk)

    def is_right(self) -> bool:
        """Tell whether they are what the store says, as far as it does."""
        return not self.is_told or self._sum.digest() == self.expected


def _is_there(place: Path, each: _File, verify: bool) -> bool:
    path = place / each.name
    if not path.is_file() or path.stat().st_size != each.size:
        return False
    digest = _Digest(each.checksums)
    if verify and digest.is_told:
        with path.open("rb") as file:
            for chunk in _chunks(file):
                digest.update(chunk)
        return digest.is_right()
    return True


def _copy(store: _Store, each: _File, place: Path) -> None:
    """Copy a file, whole or not at all.

    Raises:
        OSError: if it cannot be written here.
        UnreadableError: if it cannot be read there, or is not what the store says.
    """
    path = place / each.name
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with files.whole(path) as written:
                _fetch(store, each, written)
            return
        except UnreadableError:
            if attempt == ATTEMPTS:
                raise
            time.sleep(attempt)


def _fetch(store: _Store, each: _File, written: Any) -> None:
    digest, size = _Digest(each.checksums), 0
    for chunk in _read(store, each):
        digest.update(chunk)
        size += len(chunk)
        written.write(chunk)
    if size != each.size:
        reason = f"it gave {size} bytes, where {each.size} are listed"
    elif not digest.is_right():
        reason = "what it gave does not match its checksum"
    else:
        return
    raise UnreadableError(f"{each.path} is not what the store says: {reason}. Run the same again.")


def _read(store: _Store, each: _File) -> Iterator[bytes]:
    """Yield the bytes of a file of the store; its errors, unlike those of writing, name it."""
    try:
        # Every read is one request of what it asks for.
        with store.open(each.path, "rb", block_size=CHUNK_BYTES, cache_type="none") as file:
            yield from _chunks(file)
    except Exception as error:  # every store has its own
        raise UnreadableError(f"{each.path} cannot be read: {_reason(error)}.") from error


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _check_room(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if needed > free:
        said = f"the copy needs {needed / 1e9:.1f} GB, there are {free / 1e9:.1f} GB"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {said}", str(place))


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Wait until no other process copies to a folder, and let none until the block ends."""
    descriptor = os.open(place / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while files.hold(descriptor) is False:
            time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def _in_threads(copy: Callable[[_File], None], some: list[_File], num_workers: int) -> None:
    """Copy files; of the first that fails raise the error, and begin no other."""
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(copy, each) for each in some]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _basename(each: _File) -> str:
    return _basename_of(each.name)


def _basename_of(name: str) -> str:
    return PurePosixPath(name).name


def _reason(error: Exception) -> str:
    """Return one line of what an error says."""
    lines = str(error).strip().splitlines()
    said = lines[0].rstrip(". ") if lines else ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
