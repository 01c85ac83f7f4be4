"""What a log tells of a run's speed, of spikes of its loss and of stalls.

Lines have no time of day: a run that was resumed logs what it would have logged. They have the
rate since the line before, and so the time that they took.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

RATE = "steps_per_second"
WINDOW = 50
"""Lines before one that say what is usual."""
FEWEST = 10
"""Below so many nothing is usual."""
RECENT = 10
"""Lines that say how fast it is now."""


class Spike(NamedTuple):
    """Lines in a row whose loss is far above what was usual.

    Attributes:
        first: step.
        last: step.
        worst: loss.
        usual: loss.
    """

    first: int
    last: int
    worst: float
    usual: float


class Stall(NamedTuple):
    """Lines in a row whose steps took far longer than usual.

    Attributes:
        step: the last.
        steps: how many there are.
        seconds: that they took.
        usual: seconds.
    """

    step: int
    steps: int
    seconds: float
    usual: float


class Pace(NamedTuple):
    """Speed, in steps a second; None where it is not known.

    Attributes:
        recent: over the last lines.
        overall: over all.
        seconds: between lines, as a rule.
    """

    recent: float | None
    overall: float | None
    seconds: float | None


def spikes(lines: Sequence[Mapping[str, Any]], deviations: float = 10.0) -> list[Spike]:
    """Find losses far above the median of the lines before them.

    The measure is their median absolute deviation, as a standard deviation of a Gaussian, and at
    least 2% of the median: a smooth loss is none that spikes at each grain.

    Args:
        lines: of a log.
        deviations: how many above the median are a spike.
    """
    found: list[Spike] = []
    losses: list[float] = []
    open_spike = False
    for line in lines:
        step, loss = line["step"], line.get("loss")
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            continue
        before = losses[-WINDOW:]
        losses.append(loss)
        if len(before) < FEWEST:
            continue
        usual = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(other - usual) for other in before)
        if loss <= usual + deviations * max(deviation, 0.02 * abs(usual)):
            open_spike = False
        elif open_spike:
            last = found[-1]
            found[-1] = last._replace(last=step, worst=max(last.worst, loss))
        else:
            found.append(Spike(step, step, loss, usual))
            open_spike = True
    return found


def intervals(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, float]]:
    """Return (step, steps since the line before, steps a second) of lines that say a rate."""
    found, before = [], None
    for line in lines:
        step, rate = line["step"], line.get(RATE)
        steps = 0 if before is None else step - before
        if steps > 0 and isinstance(rate, int | float) and math.isfinite(rate) and rate > 0:
            found.append((step, steps, float(rate)))
        before = step
    return found


def pace(lines: Sequence[Mapping[str, Any]]) -> Pace:
    """Say how fast a run is, and was."""
    found = intervals(lines)
    if not found:
        return Pace(None, None, None)
    return Pace(
        _rate(found[-RECENT:]),
        _rate(found),
        statistics.median(steps / rate for _, steps, rate in found),
    )


def stalls(
    lines: Sequence[Mapping[str, Any]], factor: float = 5.0, seconds: float = 10.0
) -> list[Stall]:
    """Find lines that took far longer than those before them.

    Args:
        lines: of a log.
        factor: how many times as long as usual.
        seconds: how much longer at least.
    """
    found: list[Stall] = []
    rates: list[float] = []
    open_stall = False
    for step, steps, rate in intervals(lines):
        before = rates[-WINDOW:]
        rates.append(rate)
        if len(before) < FEWEST:
            continue
        taken, usual = steps / rate, steps / statistics.median(before)
        if taken <= max(factor * usual, usual + seconds):
            open_stall = False
        elif open_stall:
            last = found[-1]
            found[-1] = Stall(step, last.steps + steps, last.seconds + taken, last.usual + usual)
        else:
            found.append(Stall(step, steps, taken, usual))
            open_stall = True
    return found


def slowdown(lines: Sequence[Mapping[str, Any]], factor: float = 2.0) -> tuple[float, float] | None:
    """Return (rate of late, rate before) where that is `factor` times as fast, else None."""
    rates = [rate for _, _, rate in intervals(lines)]
    if len(rates) < FEWEST + RECENT:
        return None
    late, before = statistics.median(rates[-RECENT:]), statistics.median(rates[:-RECENT])
    return (late, before) if before > factor * late else None


def _rate(found: Sequence[tuple[int, int, float]]) -> float:
    return sum(steps for _, steps, _ in found) / sum(steps / rate for _, steps, rate in found)
