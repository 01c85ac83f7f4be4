"""What is said of a run at work: logged steps, their rates, a progress bar, a profiler trace."""

import contextlib
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxdiff import files
from jaxdiff.devices import distributed
from jaxdiff.training.throughput import NO_WORK, Work
from jaxdiff.typing import Array

MAX_SKIPPED = 100
"""How many steps in a row may be skipped because they are not finite."""
SKIPPED, SKIPPED_IN_A_ROW = "skipped", "skipped_in_a_row"
"""What logs and checkpoints call the numbers of skipped steps."""


class Log(Protocol):
    """Where logged steps go."""

    def write(self, values: Mapping[str, Any], /) -> None:
        """Write one object, which holds `step`."""

    def flush(self) -> None:
        """Wait until what was written would outlive this process."""


class Cadence(NamedTuple):
    """How often a run logs and saves.

    Attributes:
        log: steps between logged steps; the last is always logged.
        save: steps between checkpoints; the last step is always saved.
    """

    log: int = 20
    save: int = 500


class Telling(NamedTuple):
    """What is said of a run at work, and where.

    Attributes:
        log: where to log.
        work: what a step is, for rates.
        progress: show a progress bar if stderr is a terminal.
        profile: a folder for a profiler trace, and of how many steps after the first call.
        repeat: step -> what it takes to repeat it, for the report of one that is not finite.
    """

    log: Log
    work: Work = NO_WORK
    progress: bool = False
    profile: tuple[files.Path, int] | None = None
    repeat: Callable[[int], Mapping[str, Any]] = lambda step: {}


class Skips(NamedTuple):
    """How many steps of a run were skipped because they are not finite.

    Attributes:
        total: since the run began, whatever it was interrupted by.
        in_a_row: those at its end.
    """

    total: int = 0
    in_a_row: int = 0

    @classmethod
    def recorded(cls, metrics: Mapping[str, Any]) -> "Skips":
        """Return what the metrics of a checkpoint say; none where they say nothing."""
        counts = (metrics.get(name) for name in (SKIPPED, SKIPPED_IN_A_ROW))
        return cls(*(count if isinstance(count, int) else 0 for count in counts))

    def after(self, finite: bool) -> "Skips":
        """Return the numbers after one more step."""
        return Skips(self.total) if finite else Skips(self.total + 1, self.in_a_row + 1)

    def record(self) -> dict[str, int]:
        """Return what :meth:`recorded` reads."""
        return {SKIPPED: self.total} | ({SKIPPED_IN_A_ROW: self.in_a_row} if self.in_a_row else {})


NO_SKIPS = Skips()


class NotFinite(ArithmeticError):
    """The loss or its gradient became NaN or infinite.

    Attributes:
        details: the step, its values and what it takes to repeat it, as JSON holds it.
    """

    def __init__(
        self,
        step: int,
        values: Mapping[str, float],
        details: Mapping[str, Any] | None = None,
        *,
        skipped: int = 0,
    ) -> None:
        shown = ", ".join(f"{name}={value}" for name, value in values.items())
        kept = f"The {skipped} steps before it were skipped too" if skipped else "It was not saved"
        super().__init__(
            f"Step {step} is not finite: {shown}. {kept}; a lower learning rate may help."
        )
        self.details = {"step": step, "values": {k: str(v) for k, v in values.items()}}
        self.details |= details or {}


class Told:
    """What was said of a run since it started: its metrics read, its clock, its bar, its trace."""

    def __init__(
        self,
        telling: Telling,
        cadence: Cadence,
        *,
        start: int,
        num_steps: int,
        skip: bool,
        skips: Skips = NO_SKIPS,
    ) -> None:
        """Begin.

        Args:
            telling: what is to be said.
            cadence: which steps are logged.
            start: the step that the run is at.
            num_steps: how many it has in all.
            skip: whether steps that are not finite are passed over.
            skips: how many were up to `start`.
        """
        from tqdm import tqdm

        self._telling, self._every, self._start = telling, cadence.log, start
        self._unread = _Unread(skip, telling.repeat, skips)
        self._since_save: list[dict[str, float]] = []
        self._tracing = _Tracing(telling.profile)
        self._clock: tuple[float, int] | None = None  # started after the call that compiled
        self._bar = tqdm(
            total=num_steps,
            initial=start,
            unit="step",
            disable=not (telling.progress and sys.stderr.isatty()),
        )

    def add(self, step: int, length: int, metrics: dict[str, Array]) -> None:
        """Take the metrics of the `length` steps up to `step`, still on their devices."""
        self._unread.add(step - length, length, metrics)
        self._bar.update(length)
        if self._clock is None:
            jax.block_until_ready(metrics)
            self._clock = time.perf_counter(), step
        self._tracing.after(step - self._start, metrics)

    def read(self, step: int, length: int, *, logged: bool, last: bool) -> None:
        """Read what was added, and log what is due.

        Args:
            step: the newest.
            length: how many steps the last call made.
            logged: whether one of them is due.
            last: whether the newest is logged whatever its number.

        Raises:
            NotFinite: as it says.
        """
        values, skips = self._unread.read()
        if logged:
            rates = self._rates(step)
            for number, found in values.items():
                due = number % self._every == 0 or (last and number == step)
                if due and _is_finite(found):  # others are said on stderr
                    newest = rates if number > step - length else {}
                    skipped = self._unread.said(skips[number])
                    self._telling.log.write({"step": number, **found, **newest, **skipped})
            if step in values:
                self._bar.set_postfix(loss=f"{values[step]['loss']:.4f}")
        self._since_save += values.values()

    def keep(self) -> None:
        """See to it that what was logged is kept: a checkpoint follows, from which a run goes on.

        Raises:
            RunError: if it cannot be written.
        """
        self._telling.log.flush()

    def means(self) -> dict[str, float]:
        """Return what a checkpoint says of the steps read since it was last asked.

        That is the mean of each metric over those that are finite, and how many of the run were
        skipped so far: the count goes on from there, as the steps do.
        """
        finite = [each for each in self._since_save if _is_finite(each)]
        self._since_save = []
        names = finite[-1] if finite else {}
        means = {name: sum(each[name] for each in finite) / len(finite) for name in names}
        skips = self._unread.skips
        return means | (skips.record() if self._unread.said(skips) else {})

    def close(self) -> None:
        """End the bar and the trace."""
        self._tracing.close()
        self._bar.close()

    def _rates(self, step: int) -> dict[str, float]:
        """Return the speed since the last time it was asked, nothing the first time."""
        now = time.perf_counter()
        since, first = self._clock or (now, step)
        self._clock = now, step
        return self._telling.work.rates((step - first) / (now - since)) if step > first else {}


def _is_finite(values: Mapping[str, float]) -> bool:
    """Judge a step by what `make_update` skips it for."""
    return all(math.isfinite(values.get(name, 0.0)) for name in ("loss", "grad_norm"))


class _Unread:
    """The metrics of the steps since the last ones read, still on their devices."""

    def __init__(
        self, skip: bool, repeat: Callable[[int], Mapping[str, Any]], skips: Skips
    ) -> None:
        self._skip, self._repeat = skip, repeat
        self._held: list[tuple[int, int, dict[str, Array]]] = []
        self.skips = skips

    def add(self, step: int, length: int, metrics: dict[str, Array]) -> None:
        """Take the metrics of the `length` steps after `step`."""
        self._held.append((step, length, metrics))

    def said(self, skips: Skips) -> dict[str, int]:
        """Return what the log says of a number of skipped steps: nothing where none ever is."""
        return {SKIPPED: skips.total} if self._skip or skips.total else {}

    def read(self) -> tuple[dict[int, dict[str, float]], dict[int, Skips]]:
        """Return the values of each step by its number, and how many were skipped up to it.

        Raises:
            NotFinite: if one is not finite, unless such are skipped; at the `MAX_SKIPPED`th in a
                row all the same.
        """
        found, skips = {}, {}
        for first, length, metrics in jax.device_get(self._held):
            columns = {name: np.reshape(value, -1) for name, value in metrics.items()}
            for i in range(length):
                found[first + i + 1] = {name: float(v[i]) for name, v in columns.items()}
        self._held = []
        for step, values in found.items():
            finite, before = _is_finite(values), self.skips.in_a_row
            self.skips = skips[step] = self.skips.after(finite)
            if finite:
                continue
            problem = NotFinite(step, values, self._repeat(step), skipped=before)
            if not self._skip or self.skips.in_a_row >= MAX_SKIPPED:
                raise problem
            if distributed.is_main():
                sys.stderr.write(f"Step {step} is not finite and was skipped: {values}.\n")
        return found, skips


class _Tracing:
    """A profiler trace of some steps after the first call."""

    def __init__(self, profile: tuple[files.Path, int] | None) -> None:
        self._profile, self._on, self._until = profile, False, 0
        self._open = contextlib.ExitStack()
        self._made: pathlib.Path | None = None  # for a store

    def after(self, steps: int, metrics: Any) -> None:
        """Begin or end the trace, `steps` having been made and `metrics` being the last's."""
        if self._profile is None:
            return
        folder, count = self._profile
        if not self._on:
            if files.is_stored(folder):
                self._made = self._open.enter_context(files.scratch())
            jax.profiler.start_trace(str(self._made or folder))
            self._on, self._until = True, steps + count
        elif steps >= self._until:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """End the trace."""
        if self._on:
            jax.profiler.stop_trace()
            self._send()
        self._profile, self._on = None, False

    def _send(self) -> None:
        """Take a trace that was made on the local disk to its store, or say that it cannot be."""
        if self._profile is None or self._made is None:
            return
        folder: Any = self._profile[0]
        with self._open:
            try:
                for name in files.names(self._made):
                    (folder / name).put(self._made / name)
            except OSError as error:
                sys.stderr.write(f"{folder} cannot be written: {error}. Going on.\n")
