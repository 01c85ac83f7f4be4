"""Whether a command makes progress in a store: by a list of what is there, once in a while.

Requests cost, and may take minutes to fail: a thread makes them, which nobody waits for but for a
moment. A store that does not answer says nothing of the command: that is said once, and time in
which nothing is known is none without progress.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from experiments.supervise.naming import Furthest, counts, last_step
from jaxdiff import files
from jaxdiff.training.checksums import SEAL
from jaxdiff.training.metrics_log import PARTS
from jaxdiff.training.run import CHECKPOINTS, METRICS

T = TypeVar("T")

EVERY = 30.0
"""Seconds between lists."""
PATIENCE = 30.0
"""Seconds after which a store is said not to answer."""


class StoredPlace:
    """A folder or object in a store; see `watching.Watched`."""

    def __init__(self, top: files.Path, say: Callable[[str], None]) -> None:
        """Begin; what is there now is no progress.

        Args:
            top: which need not exist yet; the runs may also be in folders below.
            say: is told when the store does not answer, and when it does again.
        """
        self._top, self._say = top, say
        self._sizes: Mapping[str, int] | None = None
        self._furthest = Furthest()
        self._asked: _Asked[Mapping[str, int]] | None = None
        self._asked_at = time.monotonic()
        self._silent = False
        self.has_advanced()

    @property
    def step(self) -> int | None:
        """See `Watched`."""
        return self._furthest.step

    def has_changed(self) -> bool:
        """See `Watched`; what is known is up to `EVERY` seconds old."""
        now = time.monotonic()
        if self._asked is None and now - self._asked_at >= EVERY:
            self._asked, self._asked_at = _Asked(lambda: _listed(self._top)), now
        if self._asked is not None:
            if self._asked.is_over():
                asked, self._asked = self._asked, None
                sizes = self._answer(asked)
                if sizes is not None:
                    before, self._sizes = self._sizes, _that_count(sizes)
                    return self._sizes != before
            elif now - self._asked_at > PATIENCE:
                self._fail(f"no answer for {PATIENCE:.0f} s")
        return self._silent

    def has_advanced(self) -> bool:
        """See `Watched`; it asks anew, and waits for an answer up to `PATIENCE`."""
        asked = _Asked(lambda: _listed_and_read(self._top))
        self._asked, self._asked_at = None, time.monotonic()
        if not asked.is_over(PATIENCE):
            self._fail(f"no answer for {PATIENCE:.0f} s")
            return False
        answer = self._answer(asked)
        if answer is None:
            return False
        sizes, steps = answer
        self._sizes = _that_count(sizes)
        return self._furthest.is_passed(set(_that_show(sizes)), steps)

    def _answer(self, asked: "_Asked[T]") -> T | None:
        """Return what came, None where the store failed."""
        try:
            found = asked.answer()
        except Exception as error:
            self._fail(getattr(error, "strerror", None) or str(error) or type(error).__name__)
            return None
        if self._silent:
            self._silent = False
            self._say(f"{self._top} answers again.")
        return found

    def _fail(self, why: str) -> None:
        if not self._silent:
            self._silent = True
            self._say(
                f"{self._top} cannot be listed: {why}. Whether the command makes progress there is "
                "not known, and it is not ended for that."
            )


class _Asked(Generic[T]):
    """A question to a store, put by a thread that the end of the program does not wait for."""

    def __init__(self, question: Callable[[], T]) -> None:
        self._found: list[T] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._ask, args=(question,), daemon=True)
        self._thread.start()

    def is_over(self, seconds: float = 0.0) -> bool:
        """Tell whether the answer has come, waiting for it some seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def answer(self) -> T:
        """Return the answer that has come, or raise what came in its place."""
        if self._error is not None:
            raise self._error
        return self._found[0]

    def _ask(self, question: Callable[[], T]) -> None:
        try:
            self._found.append(question())
        except Exception as error:
            self._error = error


def _listed(top: files.Path) -> Mapping[str, int]:
    """Return the sizes of all objects by name; of an object itself by no name."""
    try:
        return files.sizes(top)
    except FileNotFoundError:
        return {}


def _listed_and_read(top: files.Path) -> tuple[Mapping[str, int], dict[str, int]]:
    """Return the sizes of all objects, and the last step that each run logged."""
    sizes = _listed(top)
    found = {run: _last_step(top, names) for run, names in _logs(sizes).items()}
    return sizes, {run: step for run, step in found.items() if step is not None}


def _logs(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return by run, there and in folders below, the files of its log, the newest first."""
    found: dict[str, list[str]] = {}
    for name in sorted(sizes, reverse=True):  # parts come before what was merged
        *folder, last = name.split("/")
        is_part = folder[-1:] == [PARTS] and last.endswith(".jsonl")
        run = folder[:-1] if is_part else folder
        if (is_part or last == METRICS) and len(run) <= 1:
            found.setdefault("/".join(run), []).append(name)
    return found


def _last_step(top: files.Path, names: Iterable[str]) -> int | None:
    for name in names:
        try:
            step = last_step((top / name).read_bytes())
        except FileNotFoundError:  # merged meanwhile
            continue
        if step is not None:
            return step
    return None


def _that_count(sizes: Mapping[str, int]) -> dict[str, int]:
    """Leave out what is hidden, such as a lease, which a command that hangs renews too."""
    return {name: size for name, size in sizes.items() if all(map(counts, name.split("/")))}


def _that_show(sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield what a run has for good: sealed checkpoints, and what is right in its folder."""
    for name, size in _that_count(sizes).items():
        parts = name.split("/")
        if not name:  # an object, not a folder
            yield f"{size} bytes"
        elif CHECKPOINTS in parts[:2]:
            if parts[-1] == SEAL:
                yield "/".join(parts[:-1])
        elif PARTS not in parts[:-1]:
            yield "/".join(parts[:2])
