"""A tree of arrays written by orbax, in the background and quietly."""

import contextlib
from pathlib import Path
from typing import Any

from jaxdiff.training.quiet import quiet_orbax


class TreeWriter:
    """Writes one tree after the other; what goes wrong is raised, and nothing of it printed."""

    def __init__(self) -> None:
        """Start nothing before the first tree."""
        self._writer: Any = None
        self._quiet = contextlib.ExitStack()  # from the beginning of a tree to its end

    def write(self, folder: Path, tree: Any) -> None:
        """Begin to write a tree to a folder that does not exist; processes meet here."""
        import orbax.checkpoint as ocp  # here, because it costs 0.6 s

        self._quiet.enter_context(quiet_orbax())
        if self._writer is None:
            # Folders made on the spot: what the disk refuses is then raised, not waited for.
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            # Floats hardly shrink, and compressing them takes the time of some updates.
            handler = ocp.PyTreeCheckpointHandler(use_compression=False)
            self._writer = ocp.AsyncCheckpointer(handler, async_options=options)
        self._writer.save(folder, args=ocp.args.PyTreeSave(tree))

    def wait(self) -> None:
        """Wait until the tree is written, and raise what went wrong."""
        with self._quiet:
            if self._writer is not None:
                self._writer.wait_until_finished()

    def close(self) -> None:
        """Release the threads; those of a tree that failed end first."""
        with self._quiet:
            if self._writer is not None:
                with contextlib.suppress(Exception):  # raised before, by `wait`
                    self._writer.close()
                self._writer = None
