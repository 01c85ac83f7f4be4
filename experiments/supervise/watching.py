"""Whether a command makes progress, as the files tell that it writes.

What tells that a run is alive is any change in its folder; what tells that it came further is a
later step in a `metrics.jsonl`, or a file that was not there before: a run that starts again and
crashes at the same step writes the same lines anew.

All access to files on a disk is here, that to stores in `listing`.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from experiments.supervise.listing import StoredPlace
from experiments.supervise.naming import Furthest, counts, last_step
from jaxdiff import files
from jaxdiff.training.run import CHECKPOINTS, METRICS


class Watched(Protocol):
    """A folder of runs, or another folder or file."""

    @property
    def step(self) -> int | None:
        """The furthest step that was logged, None where none was."""

    def has_changed(self) -> bool:
        """Tell whether anything changed since this was last asked, or that cannot be known now."""

    def has_advanced(self) -> bool:
        """Tell whether something is further than ever before when this was asked."""


class Watch:
    """All places that a command writes."""

    def __init__(
        self, places: Sequence[files.Path], say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Begin; what is there now is no progress.

        Args:
            places: which need not exist yet; the runs may also be in folders below.
            say: is told of a store that does not answer.
        """
        self.places = tuple(places)
        self._watched: list[Watched] = [
            StoredPlace(top, say) if files.is_stored(top) else LocalPlace(Path(top))
            for top in places
        ]

    @property
    def step(self) -> int | None:
        """The furthest step that was logged, None where none was."""
        return max((each.step for each in self._watched if each.step is not None), default=None)

    def has_changed(self) -> bool:
        """See `Watched`."""
        changed = [each.has_changed() for each in self._watched]  # each is to be asked
        return any(changed)

    def has_advanced(self) -> bool:
        """See `Watched`."""
        advanced = [each.has_advanced() for each in self._watched]
        return any(advanced)


class LocalPlace:
    """A folder or file on a disk."""

    def __init__(self, top: Path) -> None:
        """Begin; what is there now is no progress."""
        self._top = top
        self._furthest = Furthest()
        self._marks: dict[str, tuple[int, int]] = {}
        self.has_changed()
        self.has_advanced()

    @property
    def step(self) -> int | None:
        """See `Watched`."""
        return self._furthest.step

    def has_changed(self) -> bool:
        """See `Watched`."""
        before, self._marks = self._marks, {}
        self._mark(self._top)
        for entry in _entries(self._top):
            self._mark(entry)
        for folder in _runs(self._top):
            self._mark(folder / METRICS)
            for entry in _entries(folder / CHECKPOINTS):
                self._mark(entry)
        return self._marks != before

    def has_advanced(self) -> bool:
        """See `Watched`."""
        names, steps = set[str](), dict[str, int]()
        stamp = _stamp(self._top)
        if stamp is not None and not _is_folder(self._top):
            names.add(f"{stamp}")
        for folder in _runs(self._top):
            names.update(map(str, _entries(folder)))
            names.update(map(str, _entries(folder / CHECKPOINTS)))
            step = _last_step(folder / METRICS)
            if step is not None:
                steps[str(folder)] = step
        return self._furthest.is_passed(names, steps)

    def _mark(self, path: Path) -> None:
        stamp = _stamp(path)
        if stamp is not None:
            self._marks[str(path)] = stamp


def _runs(top: Path) -> Iterator[Path]:
    """Yield a folder and those in it."""
    yield top
    yield from (entry for entry in _entries(top) if entry.name != CHECKPOINTS and _is_folder(entry))


def _entries(folder: Path) -> list[Path]:
    """List a folder, without what is hidden or of no account; nothing where there is none."""
    try:
        found = list(folder.iterdir())
    except OSError:
        return []
    return [path for path in found if counts(path.name)]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a file system that is away for a moment
        return False


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes with a file: the only question of this kind."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _last_step(path: Path) -> int | None:
    try:
        return last_step(path.read_bytes())
    except OSError:
        return None
