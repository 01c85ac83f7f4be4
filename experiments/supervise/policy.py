"""What is done after a command ended: whether it is started again, when, and why."""

import random
import signal
from collections.abc import Callable
from typing import NamedTuple

from jaxdiff.training.lease import LEASED
from jaxdiff.training.loop import STOPPED_EXIT_CODE

REFUSED = (1, 2)
"""What a command exits with that refuses what it is asked for, or cannot read its command line."""


class Limits(NamedTuple):
    """How often, and how soon.

    Attributes:
        max_restarts: in a row without progress, after which it is given up.
        first_delay: seconds before the first of them; each doubles it.
        longest_delay: the most that it grows to.
        soon: an end within so many seconds may be a refusal.
    """

    max_restarts: int = 10
    first_delay: float = 5.0
    longest_delay: float = 600.0
    soon: float = 60.0


class Ended(NamedTuple):
    """How a start of a command ended.

    Attributes:
        code: its exit code as `subprocess` has it: negative, a signal.
        lived: for how many seconds.
        progressed: whether it came further than any before.
        hung: whether it was ended for making no progress.
        said: the last line of its stderr.
    """

    code: int
    lived: float
    progressed: bool
    hung: bool = False
    said: str = ""

    @property
    def how(self) -> str:
        """Say it in a few words."""
        if self.hung:
            return "hung and was ended"
        if self.code >= 0:
            return f"exited with {self.code}"
        try:
            return f"was killed by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"was killed by signal {-self.code}"

    @property
    def shell_code(self) -> int:
        """What a shell makes of the exit code."""
        return self.code if self.code >= 0 else 128 - self.code


class Next(NamedTuple):
    """What comes next.

    Attributes:
        delay: seconds to the next start, None where there is none.
        why: in a sentence.
        code: where there is none, what to exit with.
    """

    delay: float | None
    why: str
    code: int = 0


class Policy:
    """What is known of all starts so far, and what follows from it."""

    def __init__(self, limits: Limits, jitter: Callable[[], float] = random.random) -> None:
        """Begin.

        Args:
            limits: how often, and how soon.
            jitter: draws a number in [0, 1), so that many supervisors do not start at once.
        """
        self._limits, self._jitter = limits, jitter
        self._in_a_row = 0  # restarts without progress
        self._idle_stops = 0  # stops by others without progress
        self._before: Ended | None = None
        self.preemptions = self.crashes = self.hangs = 0

    def after(self, ended: Ended) -> Next:
        """Decide what comes after a start that ended of its own, or was ended as hung."""
        before, self._before = self._before, ended
        if ended.code == 0:
            return Next(None, "It is done.")
        if ended.progressed:
            self._in_a_row = self._idle_stops = 0
        if ended.code == STOPPED_EXIT_CODE and not ended.hung:
            self.preemptions += 1
            self._idle_stops += not ended.progressed
            if self._idle_stops < 2:
                return Next(0.0, "It was told to stop, not by this supervisor: restart at once.")
        elif ended.hung:
            self.hangs += 1
        else:
            self.crashes += 1
        if before is not None and self._refuses(ended) and _same(before, ended):
            why = "It refuses, twice in the same words: starting it again would not mend that."
            return Next(None, why, ended.code)
        return self._later(ended)

    def _refuses(self, ended: Ended) -> bool:
        at_once = ended.lived < self._limits.soon and not ended.progressed
        mends = not ended.said or LEASED in ended.said  # a lease ends when its holder is gone
        return ended.code in REFUSED and not ended.hung and at_once and not mends

    def _later(self, ended: Ended) -> Next:
        most = self._limits.max_restarts
        if self._in_a_row >= most:
            code = ended.shell_code if ended.code != STOPPED_EXIT_CODE else 1
            return Next(None, f"Given up: {most} restarts in a row brought no progress.", code)
        longest = min(
            self._limits.longest_delay, self._limits.first_delay * 2.0 ** min(self._in_a_row, 60)
        )
        self._in_a_row += 1
        delay = longest * (0.5 + 0.5 * self._jitter())
        return Next(delay, f"Restart {self._in_a_row} of {most} without progress in {delay:.1f} s.")


def _same(before: Ended, ended: Ended) -> bool:
    return (before.code, before.said) == (ended.code, ended.said)
