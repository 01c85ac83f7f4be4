"""A look at the lock of a run directory before anything costly is imported.

Starting a command takes seconds of a processor that a training at work has no use for losing. So a
second start is refused first thing, by the standard library alone; whoever comes through here is
held to the lock itself by `jaxdiff.training.lock`.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

WRITERS = {
    "experiments.digits": "train",
    "experiments.toy2d": None,
    "experiments.families": None,
    "experiments.solvers": None,
    "experiments.theory": None,
}
"""The commands that write a run directory, and the subcommand that does."""


def refuse_if_written(command_line: Sequence[str]) -> None:
    """End the program where it was started to write a run that another process writes.

    Args:
        command_line: of the interpreter, as `sys.orig_argv` has it.
    """
    words = list(command_line)
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    own = words[words.index("-m") + 2 :] if module in WRITERS else []
    if WRITERS.get(module) not in (None, *own[:1]) or "--distributed" in own:
        return
    for i, word in enumerate(own):
        option, _, value = word.partition("=")
        if option not in ("--run-dir", "--run_dir"):
            continue
        given = value or "".join(own[i + 1 : i + 2])
        if "://" in given:  # what guards a store is not seen from here
            continue
        directory = Path(given)
        holder = holder_of(directory)
        if holder is not None:
            sys.exit(
                f"error: --run-dir {directory} is being written by {holder}. Wait until it ends, "
                "stop it, or take another --run-dir."
            )


def holder_of(run_dir: Path) -> str | None:
    """Say which process writes a run, None where none does or that is not to be told here."""
    with contextlib.suppress(OSError, ImportError), (run_dir / ".lock").open("rb") as file:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return "process {pid} on {host}, since {since}".format(**json.load(file))
            return "another process"
    return None
