"""What lies in a run's folder, on a disk or in a store: names, sizes and ages; nothing is read.

A disk is asked each time. A store is asked once, for a list of all that is there: requests cost.
"""

import pathlib
import shutil
import stat
import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from jaxdiff import files
from jaxdiff.training import checksums
from jaxdiff.training import run as runs
from jaxdiff.training.metrics_log import PARTS


class Place(Protocol):
    """A folder. Names are those of what is below it, with slashes; "" is the folder itself."""

    @property
    def folder(self) -> files.Path:
        """Its path."""

    def was_trained(self) -> bool:
        """Tell whether it has what a run that was begun has: a log or checkpoints."""

    def has_record(self) -> bool:
        """Tell whether it may have what says which run it is."""

    def inner(self) -> "list[Place]":
        """List the folders right below it in which something was trained."""

    def entries(self, name: str) -> list[str]:
        """List the names of what is right below a folder in it; nothing where there is none."""

    def size(self, name: str = "") -> int:
        """Return how many bytes all files of a folder have; links are nothing."""

    def age(self, name: str) -> float | None:
        """Return for how many seconds a file was not written, None where that is not known."""

    def age_of(self, step: int) -> float | None:
        """Return the seconds since a checkpoint was sealed, None where that is not known."""

    def logs(self) -> list[str]:
        """List the files of the log, in the order of their steps."""

    def free(self) -> int | None:
        """Return how many bytes may still be written there, None where that is not known."""


def place_of(folder: files.Path) -> Place:
    """Return the place that a path names."""
    if files.is_stored(folder):
        return Stored(folder, folder.sizes())
    return OnDisk(pathlib.Path(folder))


class OnDisk:
    """A folder on a disk."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Name it."""
        self.folder = folder

    def was_trained(self) -> bool:
        """See `Place`."""
        return (self.folder / runs.METRICS).exists() or (self.folder / runs.CHECKPOINTS).is_dir()

    def has_record(self) -> bool:
        """See `Place`."""
        return True

    def inner(self) -> list[Place]:
        """See `Place`."""
        found = (OnDisk(path) for path in sorted(_entries(self.folder)) if path.is_dir())
        return [place for place in found if place.was_trained()]

    def entries(self, name: str) -> list[str]:
        """See `Place`."""
        return sorted(path.name for path in _entries(self.folder / name))

    def size(self, name: str = "") -> int:
        """See `Place`."""
        return _size(self.folder / name)

    def age(self, name: str) -> float | None:
        """See `Place`."""
        changed = _stat(self.folder / name).changed
        return None if changed is None else max(0.0, time.time() - changed)

    def age_of(self, step: int) -> float | None:
        """See `Place`."""
        return self.age(f"{runs.CHECKPOINTS}/{step}")

    def logs(self) -> list[str]:
        """See `Place`."""
        return [runs.METRICS]

    def free(self) -> int | None:
        """See `Place`."""
        try:
            return shutil.disk_usage(self.folder).free
        except OSError:
            return None


class Stored:
    """A folder in a store, as it was listed."""

    def __init__(self, folder: files.Path, sizes: Mapping[str, int]) -> None:
        """Keep what was listed.

        Args:
            folder: its path.
            sizes: of each object, by its name from there.
        """
        self.folder = folder
        self._sizes = dict(sizes)

    def was_trained(self) -> bool:
        """See `Place`."""
        return any(
            name == runs.METRICS or name.startswith((f"{runs.CHECKPOINTS}/", f"{PARTS}/"))
            for name in self._sizes
        )

    def has_record(self) -> bool:
        """See `Place`."""
        return runs.CONFIG in self._sizes

    def inner(self) -> list[Place]:
        """See `Place`."""
        names = [name for name in self.entries("") if self._below(name)]
        found = (Stored(self.folder / name, self._below(name)) for name in names)
        return [place for place in found if place.was_trained()]

    def entries(self, name: str) -> list[str]:
        """See `Place`."""
        return sorted({each.partition("/")[0] for each in self._below(name)})

    def size(self, name: str = "") -> int:
        """See `Place`."""
        return sum(self._below(name).values())

    def age(self, name: str) -> float | None:
        """See `Place`; by this host's clock."""
        place = self.folder / name
        if name not in self._sizes or not files.is_stored(place):
            return None
        try:
            return max(0.0, time.time() - place.modified())
        except FileNotFoundError:  # deleted meanwhile
            return None

    def age_of(self, step: int) -> float | None:
        """See `Place`."""
        return self.age(f"{runs.CHECKPOINTS}/{step}/{checksums.SEAL}")

    def logs(self) -> list[str]:
        """See `Place`."""
        merged = [runs.METRICS] if runs.METRICS in self._sizes else []
        return merged + [f"{PARTS}/{name}" for name in self.entries(PARTS)]

    def free(self) -> None:
        """See `Place`: a store does not say."""

    def _below(self, name: str) -> dict[str, int]:
        start = f"{name}/" if name else ""
        found = {each: size for each, size in self._sizes.items() if each.startswith(start)}
        return {each[len(start) :]: size for each, size in found.items()}


def _size(folder: pathlib.Path) -> int:
    found = ((path, _stat(path)) for path in _entries(folder))
    return sum(_size(path) if seen.is_folder else seen.bytes for path, seen in found)


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


class _Seen(NamedTuple):
    """What is known of a file: when it changed, its size, whether it is a folder."""

    changed: float | None = None
    bytes: int = 0
    is_folder: bool = False


def _stat(path: pathlib.Path) -> _Seen:
    """Look at a file, and not at what a link leads to; the only question of this kind."""
    try:
        found = path.lstat()
    except OSError:
        return _Seen()
    is_file = stat.S_ISREG(found.st_mode)
    return _Seen(found.st_mtime, found.st_size * is_file, stat.S_ISDIR(found.st_mode))
