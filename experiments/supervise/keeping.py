"""The loop of a supervisor: start, watch, and start again while that may help."""

import contextlib
import math
import shlex
import signal
import textwrap
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NamedTuple

from experiments.common.units import span
from experiments.supervise.children import Child
from experiments.supervise.events import Events
from experiments.supervise.policy import Ended, Next, Policy
from experiments.supervise.watching import Watch
from jaxdiff.training.loop import STOPPED_EXIT_CODE
from jaxdiff.training.signals import SUCCESSION

PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
"""The signals that end a supervisor, and what the command is told then."""
INSISTING = 3
"""The time that one of them kills the command; those in quick succession are one time."""


class Patience(NamedTuple):
    """How long is waited.

    Attributes:
        hang: seconds without progress after which a command hangs.
        grace: seconds from SIGTERM to SIGKILL for one that does.
        look: seconds between looks.
    """

    hang: float
    grace: float
    look: float


class Stopping:
    """Whether the supervisor itself was told to stop, and by what; it tells its command."""

    def __init__(self, events: Events) -> None:
        """Begin; `child` is whom to tell."""
        self.child: Child | None = None
        self.by: signal.Signals | None = None
        self._events = events
        self._times, self._heard_at = 0, -math.inf
        self._unsaid: list[str] = []

    def wait(self, seconds: float) -> bool:
        """Wait; tell whether it was told to stop before or meanwhile."""
        until = time.monotonic() + seconds
        while self.by is None and (left := until - time.monotonic()) > 0.0:
            time.sleep(min(left, 0.1))  # an Event's lock may be held where the signal comes
        self.say()
        return self.by is not None

    def say(self) -> None:
        """Say what was heard: a signal may come while something else is being written."""
        while self._unsaid:
            self._events.say(self._unsaid.pop(0))

    def adopt(self, child: Child) -> None:
        """Tell a command that was just started what it may have missed."""
        self.child = child
        if self.by is not None:
            self._tell(child, PASSED_ON[self.by])

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Catch the signals; a SIGHUP that is ignored, as under nohup, stays so."""
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        caught = [number for number in PASSED_ON if number != signal.SIGHUP or not ignored]
        before = {number: signal.signal(number, self._handle) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._heard_at > SUCCESSION:
            self._times, self._heard_at = self._times + 1, now
        self.by = signal.Signals(number)
        self._unsaid.append(f"{self.by.name}: the command is not started again")
        if self.child is not None:
            killed = self._times >= INSISTING
            self._tell(self.child, signal.SIGKILL if killed else PASSED_ON[self.by])

    def _tell(self, child: Child, number: signal.Signals) -> None:
        child.signal(number)
        self._unsaid.append(f"{number.name} is passed on to process {child.pid}")


def keep_running(
    words: Sequence[str], watch: Watch, policy: Policy, patience: Patience, events: Events
) -> int:
    """Run a command until it is done, must not be started again, or the supervisor is stopped.

    Args:
        words: the command.
        watch: what it writes.
        policy: says whether and when it is started again.
        patience: how long is waited.
        events: where all is said.

    Returns:
        What to exit with: the command's exit code, as a shell has it.

    Raises:
        OSError: if the command cannot be started at all.
    """
    began, starts, stopping = time.monotonic(), 0, Stopping(events)
    with stopping.catching():
        while True:
            starts += 1
            ended = _start(words, starts, watch, patience, stopping, events)
            if stopping.by is not None:
                following = Next(None, "It was told to stop.", ended.shell_code)
            else:
                following = policy.after(ended)
            said = f', having said: "{ended.said}"' if ended.said and ended.code else ""
            how = f"start {starts} {ended.how} after {span(ended.lived)}{said}"
            events.say(f"{how}. {following.why}")
            code = following.code
            if following.delay is not None:
                if not stopping.wait(following.delay):
                    continue
                code = STOPPED_EXIT_CODE
            spent = span(time.monotonic() - began)
            events.say(_summary(code, starts, spent, policy, watch.step))
            return code


def _start(
    words: Sequence[str],
    number: int,
    watch: Watch,
    patience: Patience,
    stopping: Stopping,
    events: Events,
) -> Ended:
    """Start a command and stay with it until it is over."""
    watch.has_changed()
    began = time.monotonic()
    child = Child(words)
    try:
        shown = textwrap.shorten(shlex.join(words), 300, placeholder=" ...")
        events.say(f"start {number}, process {child.pid}: {shown}")
        stopping.adopt(child)
        code, hung = _attend(child, watch, patience, stopping, events)
        lived = time.monotonic() - began
    finally:
        child.close()
        stopping.child = None
    stopping.say()
    return Ended(code, lived, watch.has_advanced(), hung, child.last_line)


def _attend(
    child: Child, watch: Watch, patience: Patience, stopping: Stopping, events: Events
) -> tuple[int, bool]:
    """Return the exit code of a command, and whether it was ended as one that hangs."""
    changed_at = time.monotonic()
    while (code := child.wait(patience.look)) is None:
        stopping.say()
        now = time.monotonic()
        if watch.has_changed():
            changed_at = now
        if now - max(changed_at, child.spoke_at) > patience.hang:
            where = " or ".join(["its output", *map(str, watch.places)])
            events.say(
                f"no progress for {span(patience.hang)} in {where}: it hangs. It is told to end, "
                f"and killed after {span(patience.grace)}."
            )
            return child.end(patience.grace), True
    return code, False


def _summary(code: int, starts: int, spent: str, policy: Policy, step: int | None) -> str:
    counts = {
        "start": starts,
        "preemption": policy.preemptions,
        "crash": policy.crashes,
        "hang": policy.hangs,
    }
    plural = {"crash": "crashes"}
    said = ", ".join(
        f"{count} {name if count == 1 else plural.get(name, f'{name}s')}"
        for name, count in counts.items()
    )
    reached = "" if step is None else f"; the furthest step logged is {step}"
    return f"ended with {code} after {spent}: {said}{reached}"
