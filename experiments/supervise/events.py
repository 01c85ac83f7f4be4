"""What a supervisor says: a line an event, on stderr and in a file that stays small."""

import datetime
import os
import sys
from pathlib import Path

MOST_BYTES = 1_000_000


class Events:
    """Where events are said."""

    def __init__(self, log: Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        """Begin.

        Args:
            log: a file that is appended to, made with its folder if missing. Before it would grow
                past `most_bytes` it is renamed to `<name>.1`, in the place of the one before.
            most_bytes: of the file.

        Raises:
            OSError: if it cannot be written.
        """
        self._log, self._most = log, most_bytes
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.open("a").close()

    def say(self, text: str) -> None:
        """Say what happened, with the time."""
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        line = f"{now} supervise: {' '.join(text.split())}\n"
        try:
            sys.stderr.write(line)
            sys.stderr.flush()
        except (OSError, ValueError):  # nobody reads it
            pass
        if self._log is not None:
            try:
                self._append(self._log, line)
            except OSError as error:
                self._log = None
                self.say(f"--log cannot be written any more: {error.strerror or error}.")

    def _append(self, log: Path, line: str) -> None:
        if log.exists() and log.stat().st_size + len(line) > self._most:
            os.replace(log, log.with_name(f"{log.name}.1"))
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line)
