"""A command at work, in a process group of its own, whose output passes through and is heard."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

_TAIL = 4096
_SHOWN = 600


class Child:
    """A command that was started; to be closed when it is over."""

    def __init__(self, words: Sequence[str]) -> None:
        """Start it.

        It reads nothing, as it could not read it again. Python's own buffer of what it prints is
        off, or that would be heard late.

        Raises:
            OSError: if there is no such program, or it cannot be run.
        """
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            env={"PYTHONUNBUFFERED": "1", **os.environ},
        )
        self.pid = self._process.pid
        self.spoke_at = time.monotonic()
        self._tail = b""
        streams = (
            (self._process.stdout, sys.stdout, False),
            (self._process.stderr, sys.stderr, True),
        )
        self._pumps = [threading.Thread(target=self._pump, args=s, daemon=True) for s in streams]
        for pump in self._pumps:
            pump.start()

    @property
    def last_line(self) -> str:
        """What it said last on stderr, but for empty lines."""
        lines = self._tail.decode(errors="replace").splitlines()
        return next((line.strip()[:_SHOWN] for line in reversed(lines) if line.strip()), "")

    def wait(self, seconds: float) -> int | None:
        """Return its exit code, None where it is at work still after some seconds."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: int) -> None:
        """Send a signal to it and to what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def end(self, grace: float) -> int:
        """Ask it to end; kill it where it has not after `grace` seconds. Return its exit code."""
        self.signal(signal.SIGTERM)
        code = self.wait(grace)
        if code is None:
            self.signal(signal.SIGKILL)
            code = self._process.wait()
        return code

    def close(self) -> None:
        """Let none of what it started outlive it, unless it ended well; read what it said last."""
        if self._process.poll() != 0:
            self.signal(signal.SIGKILL)
            self._process.wait()
        for pump in self._pumps:
            pump.join(timeout=5.0)

    def _pump(self, source: IO[bytes], target: IO[str], kept: bool) -> None:
        with source:
            while data := os.read(source.fileno(), 1 << 16):
                self.spoke_at = time.monotonic()
                if kept:
                    self._tail = (self._tail + data)[-_TAIL:]
                with contextlib.suppress(OSError, ValueError):  # nobody reads it: it works on
                    target.buffer.write(data)  # type: ignore[attr-defined]
                    target.flush()
