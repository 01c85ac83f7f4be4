"""What names in a run's folder, and lines of its log, tell of how far it came."""

from collections.abc import Mapping

from jaxdiff.training import metrics_log

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
        said = metrics_log.parse(line)
        if said is not None and isinstance(said["step"], int):
            return said["step"]
    return None


class Furthest:
    """How far runs ever came: what they have for good, and the steps that they logged."""

    def __init__(self) -> None:
        """Begin: what is there first is no progress."""
        self._names: set[str] | None = None
        self._steps: dict[str, int] = {}

    @property
    def step(self) -> int | None:
        """The furthest step that was logged, None where none was."""
        return max(self._steps.values(), default=None)

    def is_passed(self, names: set[str], steps: Mapping[str, int]) -> bool:
        """Tell whether something is further than ever before, and keep it.

        Args:
            names: of what is there now.
            steps: the last that each run logged, by its name.
        """
        begins, before = self._names is None, self._names or set()
        self._names = before | names
        later = {run: step for run, step in steps.items() if step > self._steps.get(run, -1)}
        self._steps |= later
        return not begins and (bool(later) or not names <= before)
