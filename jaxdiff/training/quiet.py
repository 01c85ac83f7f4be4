"""What orbax and its threads print of a failure that is in the error we raise: left out."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_counting = threading.Lock()
_count = 0


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Leave out orbax's log while the block runs, in any thread; and from then on its orphans."""
    global _count
    with _counting:
        _count += 1
        logging.getLogger("absl").addFilter(_not_from_orbax)
        before = sys.unraisablehook
        if not isinstance(before, _WithoutOrphans):
            sys.unraisablehook = _WithoutOrphans(before)
    try:
        yield
    finally:
        with _counting:
            _count -= 1
            if not _count:
                logging.getLogger("absl").removeFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


class _WithoutOrphans:
    """Leaves out what ends after the first of its kind failed and orbax left their event loop."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._before(unraisable)
