"""A tree of arrays written by orbax, in the background and quietly."""

import contextlib
import os
from typing import Any

import jax

from jaxdiff import files
from jaxdiff.training.quiet import quiet_orbax


class TreeWriter:
    """Writes one tree after the other; what goes wrong is raised, and nothing of it printed."""

    def __init__(self) -> None:
        """Start nothing before the first tree."""
        self._writer: Any = None
        self._alone: bool | None = None
        self._quiet = contextlib.ExitStack()  # from the beginning of a tree to its end

    def write(self, folder: files.Path, tree: Any, *, alone: bool = False) -> None:
        """Begin to write a tree to a folder that does not exist.

        Args:
            folder: on a disk, or of gs://.
            tree: what orbax takes.
            alone: this process holds all of it, and writes it; else all processes meet here.
        """
        import orbax.checkpoint as ocp  # here, because it costs 0.6 s

        if alone != self._alone:
            self.close()
            self._alone = alone
        self._quiet.enter_context(quiet_orbax())
        if self._writer is None:
            # Folders made on the spot: what the disk refuses is then raised, not waited for.
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            meeting = ocp.options.MultiprocessingOptions()
            if alone and jax.process_count() > 1:
                own = jax.process_index()
                meeting = ocp.options.MultiprocessingOptions(
                    primary_host=own, active_processes={own}, barrier_sync_key_prefix="alone"
                )
            # Floats hardly shrink, and compressing them takes the time of some updates.
            handler = ocp.PyTreeCheckpointHandler(
                use_compression=False, multiprocessing_options=meeting
            )
            self._writer = ocp.AsyncCheckpointer(
                handler, async_options=options, multiprocessing_options=meeting
            )
        self._writer.save(os.fspath(folder), args=ocp.args.PyTreeSave(tree))

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
