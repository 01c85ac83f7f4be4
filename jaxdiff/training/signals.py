"""Signals that ask a process to end, made questions; those in quick succession are one.

Schedulers and terminals send some of them several times over (to a job, its step and its group), a
few milliseconds apart. The first is heard; more of them within `SUCCESSION` seconds say nothing
new, and would only tear down what the first one saves.
"""

import atexit
import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM)
SUCCESSION = 2.0

Handler = Callable[[int, FrameType | None], None]

_heard_at = -math.inf


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], str | None]]:
    """Turn SIGINT and SIGTERM into a question: the name of the one received, or None.

    One that comes later than `SUCCESSION` seconds after the first acts as it did before. Only the
    main thread can catch signals; in another one none is ever received.
    """
    received: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not received:
            _hear()
            received.append(signal.Signals(number).name)
        elif not _in_succession():
            _restore(before)
            signal.raise_signal(number)

    before = _install(handle)
    try:
        yield lambda: received[0] if received else None
    finally:
        _restore(before)


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, raise KeyboardInterrupt; for a whole program.

    Once a signal was heard, here or by `catch_signals`, the program is about to end: more of them
    in quick succession are not heard, nor any while the interpreter goes down, which they would
    abort. In a thread other than the main one nothing changes.
    """
    heard_before = _heard_at

    def handle(number: int, frame: FrameType | None) -> None:
        if _heard_at == heard_before or not _in_succession():
            _hear()
            raise KeyboardInterrupt

    def handle_at_the_end(number: int, frame: FrameType | None) -> None:
        if not _in_succession():
            _restore(before)
            signal.raise_signal(number)

    before = _install(handle)
    try:
        yield
    finally:
        if _heard_at == heard_before:
            _restore(before)
        elif before:
            _install(handle_at_the_end)
            atexit.register(_install, signal.SIG_IGN)


def _hear() -> None:
    global _heard_at
    _heard_at = time.monotonic()


def _in_succession() -> bool:
    return time.monotonic() - _heard_at < SUCCESSION


def _install(handler: Handler | signal.Handlers) -> dict[signal.Signals, object]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {caught: signal.signal(caught, handler) for caught in ENDING}


def _restore(before: dict[signal.Signals, object]) -> None:
    for caught, handler in before.items():
        signal.signal(caught, handler)  # type: ignore[arg-type]
