"""Keep a command running until it is done: start it again where it was stopped, crashed or hangs.

    python -m experiments.supervise -- python -m experiments.digits train --run-dir runs/digits

It runs in a process group of its own. SIGTERM and SIGINT are passed on to it, the third time as
SIGKILL, and then it is not started again. Otherwise:

- exit code 0 ends;
- exit code 75 (stopped by a signal with everything saved, a preemption) starts it again at once;
- any other code, or death by a signal, starts it again after a delay that doubles from one to the
  next, up to a number of restarts in a row that bring no progress;
- no progress for some minutes is a hang: SIGTERM, then SIGKILL, and it is started again likewise;
- a refusal, exit code 1 or 2 within a minute, twice with the same last words, ends; one for the
  lease of another process, which ends of itself, is no such refusal.

Each event is one line on stderr. No accelerator is touched: they are the command's.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.common import command
from experiments.common.command import Refusal, refusing
from experiments.supervise.events import Events
from experiments.supervise.keeping import Patience, keep_running
from experiments.supervise.policy import Limits, Policy
from experiments.supervise.watching import Watch


@dataclasses.dataclass(frozen=True)
class Options:
    """How a command is kept running."""

    hang_after: float = 30.0
    """Minutes without progress, be it output or a change in its run's folder, after which it hangs.
    Compiling is no progress: allow for it."""
    max_restarts: int = 10
    """Restarts in a row without progress, after which it is given up. Progress is a later step
    logged, or a new file, in its run's folder; output is none."""
    first_delay: float = 5.0
    """Seconds before the first restart; doubled by each one that follows without progress."""
    longest_delay: float = 600.0
    """Seconds that the delay grows to at most."""
    grace: float = 60.0
    """Seconds from SIGTERM to SIGKILL for a command that hangs."""
    progress: str | None = None
    """A folder or file that shows progress, or the URL of one in a store; by default what the
    command's own --run-dir names."""
    log: str | None = None
    """A file on a disk to which events are appended too. At a megabyte it is renamed to FILE.1."""

    def check(self) -> None:
        """Refuse numbers that cannot be meant."""
        for name in ("hang_after", "first_delay", "longest_delay", "grace"):
            value = getattr(self, name)
            if not 0 <= value < float("inf") or (name == "hang_after" and not value):
                raise Refusal(f"--{name.replace('_', '-')} must be a positive time; got {value}.")
        if "://" in (self.log or ""):
            raise Refusal(f"--log must be a file on a disk; got {self.log}.")
        if self.max_restarts < 0:
            raise Refusal(f"--max-restarts must be at least 0; got {self.max_restarts}.")


def supervise(options: Options, words: Sequence[str]) -> int:
    """Keep a command running; return what to exit with."""
    options.check()
    if not words:
        raise Refusal(
            "Which command? Say it after --:\n"
            "  python -m experiments.supervise -- python -m experiments.digits train --run-dir DIR"
        )
    with refusing(OSError, say=f"--log {options.log} cannot be written: "):
        events = Events(None if options.log is None else Path(options.log))
    own = options.progress
    where, option = own or command.word_of(words, "run-dir"), "--progress" if own else "--run-dir"
    watch = Watch([command.path_of(where, option)] if where else [], events.say)
    limits = Limits(options.max_restarts, options.first_delay, options.longest_delay)
    hang = 60.0 * options.hang_after
    patience = Patience(hang, options.grace, min(5.0, hang / 10.0))
    with refusing(FileNotFoundError, PermissionError, say="The command cannot be started: "):
        return keep_running(words, watch, Policy(limits), patience, events)


def main(argv: list[str]) -> int:
    """Run the command line: options of its own, --, and the command."""
    split = argv.index("--") if "--" in argv else len(argv)
    own, words, codes = argv[:split], argv[split + 1 :], [0]

    def supervised(options: tyro.conf.OmitArgPrefixes[Options]) -> None:
        codes.append(supervise(options, words))

    supervised.__doc__ = f"{__doc__}\n\nArgs:\n    options: How it is kept running."
    return command.run("supervise", supervised, own) or codes[-1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
