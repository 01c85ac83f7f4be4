"""What a run logs: `metrics.jsonl`, one object a logged step, and TensorBoard's files beside it.

In an object store, where nothing can be appended to, it is written by parts: see `metrics_parts`.
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from jaxdiff import files
from jaxdiff.training.folders import RunError

METRICS = "metrics.jsonl"
PARTS = "metrics"
"""The folder of its parts, in a store."""


class MetricsLog:
    """`metrics.jsonl`: one object a logged step, flushed as written; TensorBoard beside it."""

    def __init__(
        self, path: files.Path, *, after: int, tensorboard: files.Path | None = None
    ) -> None:
        """Open the log for appending, forgetting what lies beyond step `after`.

        A run that was killed has logged steps that its newest checkpoint does not hold; they come
        again.

        Args:
            path: of the JSON lines.
            after: the last step to keep.
            tensorboard: a folder for TensorBoard's event files, if they are wanted.

        Raises:
            RunError: if it cannot be read or written.
        """
        kept = [line for line in read_metrics(path) if line["step"] <= after]
        try:
            set_damaged_aside(path)
            files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a")
        except OSError as error:
            raise RunError(
                f"{path} cannot be written: {error.strerror}. Make way, or take another --run-dir."
            ) from error
        self._board: Any = None
        if tensorboard is not None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(tensorboard), purge_step=after + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one object.

        Raises:
            RunError: if the disk does not take it.
        """
        try:
            self._file.write(json.dumps(dict(values)) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"{self._file.name} cannot be written: {error.strerror}. Saved checkpoints are as "
                "they were."
            ) from error
        if self._board is not None:
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(name, value, values["step"])

    def flush(self) -> None:
        """Do nothing: what is written is there."""

    def close(self) -> None:
        """Close the files."""
        with contextlib.suppress(OSError):  # what was left unwritten was said
            self._file.close()
        if self._board is not None:
            self._board.close()


class NoLog:
    """The log of a process that is not to write one."""

    def write(self, values: Mapping[str, Any]) -> None:
        """Write nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close nothing."""


def read_metrics(path: files.Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics file, and of its parts in a store; none if none is there.

    Raises:
        RunError: if they cannot be read.
    """
    if not files.is_stored(path):
        return _whole_lines(path)
    try:
        parts = files.names(parts_of(path))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}. Make way for it.") from error
    # First the parts: what is merged and deleted meanwhile is found in the file.
    since = [line for name in parts for line in _whole_lines(parts_of(path) / name)]
    merged = _whole_lines(path)
    last = max((line["step"] for line in merged), default=-1)
    return merged + [line for line in since if line["step"] > last]


def parts_of(path: files.Path) -> files.Path:
    """Return the folder of the parts of a metrics file in a store."""
    return path.with_name(PARTS)


def _whole_lines(path: files.Path) -> list[dict[str, Any]]:
    return [line for line in map(parse, _lines(path)) if line is not None]


def _lines(path: files.Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}. Make way for it.") from error


def parse(text: bytes) -> dict[str, Any] | None:
    """Return what a line of a metrics file says, None where it is damaged."""
    with contextlib.suppress(ValueError):  # the line that a kill cut short, or a damaged one
        line = json.loads(text)
        if isinstance(line, dict) and "step" in line:
            return line
    return None


def set_damaged_aside(path: files.Path) -> None:
    """Keep a copy of a file that has damaged lines before its end, which a kill may cut."""
    lines = _lines(path)
    damaged = [number for number, text in enumerate(lines[:-1], 1) if parse(text) is None]
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        with files.whole(aside) as file:
            file.write(path.read_bytes())
        sys.stderr.write(
            f"{path}: {len(damaged)} damaged lines, the first is {damaged[0]}; they are left out, "
            f"and kept in {aside}.\n"
        )
