"""Paths in an object store, by `etils.epath` and fsspec: asked again where an answer fails to come.

A store has no folders, no renames and nothing that can be appended to; an object is there whole or
not at all. Its servers answer 429 and 503 when they are busy, and lines are cut: what may pass is
tried again, ever later, and then given up with a :class:`StoreError` that names the object. What
was listed is never remembered, because others write there too.
"""

import errno
import io
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec
from etils import epath

from jaxdiff.files.paths import guards

T = TypeVar("T")

DELAYS = (0.5, 2.0, 8.0)
"""Seconds before what failed is tried again, beside what gcsfs and s3fs try themselves."""
PATIENCE = 120.0
"""Seconds that one request to Google's store may take."""

_AT_ONCE = 50 * 2**20
"""Bytes up to which gcsfs sends a file at once."""

_REFUSALS: dict[type[OSError], int] = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
}
"""Answers, not failures: asking again would not change them."""
_OURS = (TypeError, AttributeError, NameError, LookupError, ImportError, AssertionError)
_WITHOUT_RIGHTS = ("DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError")

_OPTIONS: dict[str, dict[str, Any]] = {
    "gcs": {"use_listings_cache": False, "requests_timeout": PATIENCE},
    "s3": {"use_listings_cache": False},
    "abfs": {"use_listings_cache": False},
}
for _protocol, _values in _OPTIONS.items():  # where epath's and orbax's own requests find them too
    for _name, _value in _values.items():
        fsspec.config.conf.setdefault(_protocol, {}).setdefault(_name, _value)


class StoreError(OSError):
    """A store did not do as asked, tried several times; `filename` is the object."""


_StoredPath: Any = type(epath.Path("gs://bucket"))


class StorePath(_StoredPath):
    """A path in an object store, with the methods of `pathlib.Path` that make sense there.

    Each raises FileNotFoundError for an object that is not there, PermissionError where the store
    refuses, and StoreError where it does not answer.
    """

    @classmethod
    def of(cls, url: str) -> "StorePath":
        """Return the path of a URL, once what reads its store is found to be installed.

        Raises:
            ValueError: if `etils.epath` does not know its kind.
            ImportError: if what reads such a store is not installed.
        """
        path = cls(url)
        scheme = url.partition("://")[0]
        if "://" not in os.fspath(path) or not path.bucket:
            raise ValueError(f"a URL must be like gs://BUCKET/run or s3://BUCKET/run; got {url}.")
        fsspec.get_filesystem_class(scheme)
        return path

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return os.fspath(self).partition("://")[2].partition("/")[0]

    @property
    def _store(self) -> Any:
        return fsspec.filesystem(os.fspath(self).partition("://")[0])

    @property
    def _is_googles(self) -> bool:
        return os.fspath(self).startswith("gs://")

    @property
    def _key(self) -> str:
        return os.fspath(self)

    def exists(self) -> bool:
        """Tell whether it is an object, or objects lie below it."""
        return self._ask(lambda: bool(self._store.exists(self._key)))

    def is_dir(self) -> bool:
        """Tell whether objects lie below it."""
        return self._kind() == "directory"

    def is_file(self) -> bool:
        """Tell whether it is an object."""
        return self._kind() == "file"

    def is_symlink(self) -> bool:
        """Tell that it is no link: a store has none."""
        return False

    def iterdir(self) -> Iterator["StorePath"]:
        """Yield what lies directly below it."""
        found = self._ask(lambda: self._store.ls(self._key, detail=False))
        for name in sorted({each.rstrip("/").rpartition("/")[2] for each in found}):
            if name and name != self.name:
                yield self / name

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each object below it, by its name from here, sorted."""
        found = self._ask(lambda: self._store.find(self._key, detail=True))
        start = len(self._key.partition("://")[2]) + 1
        return {name[start:]: int(about["size"]) for name, about in sorted(found.items())}

    def modified(self) -> float:
        """Return when the object was written, in seconds since 1970, by the store's clock."""
        return self._ask(lambda: float(self._store.modified(self._key).timestamp()))

    def read_bytes(self) -> bytes:
        """Return what the object holds."""
        return self._ask(lambda: bytes(self._store.cat_file(self._key)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return what the object holds, as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        """Write the object: readers see the old one until all of the new one is there."""
        # gcsfs sends little at once, between lines of its own: a bare line feed and "--==0==". Data
        # that holds those, or ends in a carriage return, is cut by the server. In chunks it is not.
        by_chunks = self._is_googles and (data.endswith(b"\r") or b"--==0==" in data)
        options = {"chunksize": len(data)} if by_chunks else {}
        self._ask(lambda: self._store.pipe_file(self._key, data, **options), changes=True)
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        """Write the object, as text."""
        return self.write_bytes(text.encode(encoding))

    def create(self, data: bytes) -> bool:
        """Write the object unless there is one; tell whether it was written.

        One request, which the store decides (`ifGenerationMatch`, `If-None-Match`). An emulator
        may ignore the condition, and a request whose answer was lost may have been heard: read it
        back to know whose it is.
        """
        try:
            self._ask(lambda: self._store.pipe_file(self._key, data, mode="create"), changes=True)
        except FileExistsError:
            return False
        return True

    def put(self, file: pathlib.Path) -> None:
        """Write the object from a local file."""
        if self._is_googles and file.stat().st_size <= _AT_ONCE:
            self.write_bytes(file.read_bytes())
        else:
            self._ask(lambda: self._store.put_file(os.fspath(file), self._key), changes=True)

    def get(self, file: pathlib.Path) -> None:
        """Write a local file from the object."""
        self._ask(lambda: self._store.get_file(self._key, os.fspath(file)))

    def open(self, mode: str = "r", **_: Any) -> Any:
        """Open the object to be read from the beginning to the end.

        Raises:
            ValueError: if `mode` is not "r" or "rb".
        """
        if mode == "rb":
            return io.BytesIO(self.read_bytes())
        if mode == "r":
            return io.StringIO(self.read_text())
        raise ValueError(f"`mode` must be 'r' or 'rb': an object is written whole; got {mode!r}.")

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Do nothing: what is below a folder makes it."""

    def rmdir(self) -> None:
        """Do nothing: a folder goes with what is below it."""

    def absolute(self) -> "StorePath":
        """Return it as it is."""
        return self

    def resolve(self, strict: bool = False) -> "StorePath":
        """Return it as it is."""
        return self

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            self._ask(lambda: self._store.rm_file(self._key), changes=True)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        """Delete the object, and all below it.

        Raises:
            FileNotFoundError: if there is nothing, unless `missing_ok`.
        """
        found = list(self.sizes())
        if not (found or missing_ok):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._key)
        for name in found:
            (self / name).unlink(missing_ok=True) if name else self.unlink(missing_ok=True)

    def rename(self, target: Any) -> Any:
        """Refuse: a store would copy, which a kill leaves half done.

        Raises:
            io.UnsupportedOperation: an OSError, always.
        """
        raise io.UnsupportedOperation(f"{self} cannot be renamed in one step: it is in a store.")

    replace = rename

    def _kind(self) -> str | None:
        """Return whether it is a "file" or a "directory"; fsspec's own questions hide failures."""
        try:
            return str(self._ask(lambda: self._store.info(self._key))["type"])
        except FileNotFoundError:
            return None

    def _ask(self, request: Callable[[], T], *, changes: bool = False) -> T:
        for delay in (*DELAYS, None):
            if changes:
                self._permit()
            try:
                return request()
            except _OURS:
                raise
            except tuple(_REFUSALS) as error:
                kind = next(each for each in _REFUSALS if isinstance(error, each))
                raise kind(_REFUSALS[kind], os.strerror(_REFUSALS[kind]), self._key) from error
            except Exception as error:
                what = _first_line(error)
                if type(error).__name__ in _WITHOUT_RIGHTS or "Forbidden" in what:
                    raise PermissionError(errno.EACCES, f"refused ({what})", self._key) from error
                if delay is None:
                    said = f"the store did not do as asked, tried {len(DELAYS) + 1} times ({what})"
                    raise StoreError(errno.EIO, said, self._key) from error
                time.sleep(delay)
        raise AssertionError  # the last delay is None

    def _permit(self) -> None:
        for folder, check in list(guards.items()):
            if self._key.startswith(f"{folder}/"):
                check(self._key)


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
