"""Timing of sides that take turns, so that a machine whose speed drifts slows both."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def time_in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each side's calls, the sides taking turns."""
    for side in sides.values():
        side()  # compiles
        side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides) if i % 2 == 0 else reversed(list(sides)):
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: dict[str, list[float]]) -> float:
    """Return the median of the pairwise ratios of two sides, the first over the second."""
    ours, bare = times.values()
    return statistics.median([a / b for a, b in zip(ours, bare, strict=True)])


def compare(sides: dict[str, Callable[[], None]], rounds: int, calls: int) -> None:
    """Time two sides in turn; print both medians and, last, the median ratio."""
    times = time_in_turn(sides, rounds)
    print(f"{'side':<10} {'median ms':>10} {'min ms':>10} {'max ms':>10}")
    for name, seconds in times.items():
        row = [1e3 * f(seconds) / calls for f in (statistics.median, min, max)]
        print(f"{name:<10} " + " ".join(f"{value:10.3f}" for value in row))
    print(f"ratio {median_ratio(times):.3f}")
