"""What names in a run's folder, and lines of its log, tell of how far it came."""

import json

_NO_ACCOUNT = (".tmp", ".corrupt")
"""How folders of checkpoints end that are being written, or were put aside."""


def counts(name: str) -> bool:
    """Tell whether a file or folder may show progress.

    What is hidden, unfinished or put aside does not, nor do TensorBoard's files, of which each
    start begins another.
    """
    return name[:1] != "." and not name.endswith(_NO_ACCOUNT) and "tfevents" not in name


def last_step(text: bytes) -> int | None:
    """Return the step of the last whole line of a log, None where it has none."""
    for line in reversed(text.splitlines()):
        try:
            step = json.loads(line)["step"]
        except (ValueError, LookupError, TypeError):  # cut short, or damaged
            continue
        if isinstance(step, int):
            return step
    return None
