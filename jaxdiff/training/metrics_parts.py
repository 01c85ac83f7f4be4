"""The log of a run in an object store, where nothing can be appended to: written by parts.

::

    metrics.jsonl               the lines that were merged
    metrics/0000000020.jsonl    the lines since, from step 20 on; the next part begins after `LINES`

The newest part is written anew, whole, with the lines that it has so far: `SECONDS` after the last
time, when it is full, and before each checkpoint is saved, so that a kill loses only lines that the
newest checkpoint lets come again. When the log is opened or closed its parts are merged: written
into `metrics.jsonl` first, then deleted. A step that is there already counts once, so a kill
between the two does no harm. `metrics_log.read_metrics` reads both.
"""

import concurrent.futures
import contextlib
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from jaxdiff import files
from jaxdiff.training.folders import RunError
from jaxdiff.training.metrics_log import parts_of, read_metrics, set_damaged_aside

LINES = 1000
"""How many lines a part holds."""
SECONDS = 30.0
"""After how long a line is sent at the latest, where another is written."""


class MetricsParts:
    """`metrics.jsonl` in a store: sent by a thread of its own, in order, part by part."""

    def __init__(
        self, path: files.Path, *, after: int, tensorboard: files.Path | None = None
    ) -> None:
        """Open the log, forgetting what lies beyond step `after`; see `MetricsLog`.

        Args:
            path: of the JSON lines.
            after: the last step to keep.
            tensorboard: a folder for TensorBoard's event files, if they are wanted: one a
                checkpoint, sent when it is whole.

        Raises:
            RunError: if it cannot be read or written.
        """
        self._path = path
        kept = [line for line in read_metrics(path) if line["step"] <= after]
        with self._saying(" Make way, or take another --run-dir."):
            set_damaged_aside(path)
            self._merge(kept)
        self._part, self._lines, self._sent = path, list[str](), 0
        self._since = time.monotonic()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "metrics")
        self._pending: list[concurrent.futures.Future[Any]] = []
        self._failed = False
        self._board = None if tensorboard is None else _Board(tensorboard, after)

    def write(self, values: Mapping[str, Any]) -> None:
        """Take one object, to be sent when it is due.

        Raises:
            RunError: if the store did not take what came before.
        """
        self._check(done=True)
        if not self._lines or len(self._lines) >= LINES:
            self._part = parts_of(self._path) / f"{int(values['step']):010d}.jsonl"
            self._lines, self._sent = [], 0
        self._lines.append(json.dumps(dict(values)) + "\n")
        if self._board is not None:
            self._board.add(values)
        due = time.monotonic() - self._since >= SECONDS and not self._pending
        if due or len(self._lines) == LINES:
            self._send()

    def flush(self) -> None:
        """Send all lines, and wait until they are in the store; event files are sent meanwhile.

        Raises:
            RunError: if the store did not take them.
        """
        self._send()
        self._check()
        if self._board is not None:
            for file, data in self._board.taken():
                self._pending.append(self._thread.submit(file.write_bytes, data))

    def close(self) -> None:
        """Send what is left, and merge the parts.

        Raises:
            RunError: if the store did not take what was left, and that was not said before.
        """
        try:
            if not self._failed:
                self.flush()
                self._check()
                with contextlib.suppress(OSError, RunError):  # the parts are read as well
                    self._merge(read_metrics(self._path))
        finally:
            self._thread.shutdown()

    def _send(self) -> None:
        if len(self._lines) > self._sent:
            text, self._sent = "".join(self._lines), len(self._lines)
            self._pending.append(self._thread.submit(files.write_text, self._part, text))
        self._since = time.monotonic()

    def _check(self, *, done: bool = False) -> None:
        """Wait for what is on its way, or look only at what has come to an end."""
        with self._saying(" Saved checkpoints are as they were."):
            while self._pending and (self._pending[0].done() or not done):
                self._pending.pop(0).result()

    def _merge(self, lines: list[dict[str, Any]]) -> None:
        files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        files.remove_tree(parts_of(self._path))

    @contextlib.contextmanager
    def _saying(self, remedy: str) -> Any:
        try:
            yield
        except RunError:  # the lease of the run was lost
            self._failed = True
            raise
        except OSError as error:
            self._failed = True
            raise RunError(
                f"{self._path} cannot be written: {error.strerror or error}.{remedy}"
            ) from error


class _Board:
    """TensorBoard's event files, each made on the local disk and begun anew when it is taken."""

    def __init__(self, folder: files.Path, after: int) -> None:
        from tensorboardX import SummaryWriter

        self._folder, self._after, self._count = folder, after, 0
        self._held: list[tuple[float, Mapping[str, Any]]] = []
        self._writer = SummaryWriter

    def add(self, values: Mapping[str, Any]) -> None:
        """Take one object."""
        self._held.append((time.time(), dict(values)))

    def taken(self) -> list[tuple[Any, bytes]]:
        """Return where event files belong and what they hold, of all since the last time."""
        if not self._held:
            return []
        with files.scratch() as folder:
            suffix = f".{self._count:06d}.{secrets.token_hex(4)}"
            purge = None if self._count else self._after + 1
            board = self._writer(str(folder), purge_step=purge, filename_suffix=suffix)
            for at, values in self._held:
                for name, value in values.items():
                    if name != "step":
                        board.add_scalar(name, value, values["step"], walltime=at)
            board.close()
            made = [(self._folder / each.name, each.read_bytes()) for each in folder.iterdir()]
        self._held, self._count = [], self._count + 1
        return made
