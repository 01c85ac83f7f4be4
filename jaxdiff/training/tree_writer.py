"""A tree of arrays written by orbax, in the background and quietly."""

import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class TreeWriter:
    """Writes one tree after the other; what goes wrong is raised, and nothing of it printed."""

    def __init__(self) -> None:
        """Start nothing before the first tree."""
        self._writer: Any = None

    def write(self, folder: Path, tree: Any) -> None:
        """Begin to write a tree to a folder that does not exist; processes meet here."""
        import orbax.checkpoint as ocp  # here, because it costs 0.6 s

        _quiet()
        if self._writer is None:
            # Folders made on the spot: what the disk refuses is then raised, not waited for.
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            # Floats hardly shrink, and compressing them takes the time of some updates.
            handler = ocp.PyTreeCheckpointHandler(use_compression=False)
            self._writer = ocp.AsyncCheckpointer(handler, async_options=options)
        self._writer.save(folder, args=ocp.args.PyTreeSave(tree))

    def wait(self) -> None:
        """Wait until the tree is written, and raise what went wrong."""
        if self._writer is not None:
            self._writer.wait_until_finished()
        logging.getLogger("absl").removeFilter(_not_from_orbax)

    def close(self) -> None:
        """Release the threads; those of a tree that failed end first."""
        if self._writer is not None:
            with contextlib.suppress(Exception):  # raised before, by `wait`
                self._writer.close()
            self._writer = None
        logging.getLogger("absl").removeFilter(_not_from_orbax)


def _quiet() -> None:
    """Print none of what orbax and its threads say of a failure: it is in the error we raise."""
    logging.getLogger("absl").addFilter(_not_from_orbax)
    before = sys.unraisablehook
    if not isinstance(before, _WithoutOrphans):
        sys.unraisablehook = _WithoutOrphans(before)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


class _WithoutOrphans:
    """Leaves out writes that end after the first of them failed and orbax left their event loop."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._before(unraisable)
