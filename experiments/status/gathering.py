"""The status of a run: what was read of its folder, measured and judged."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.common import command
from experiments.common.units import size, span
from experiments.status import judging, reading
from experiments.status.places import Place
from experiments.status.reading import Checkpoint, Found
from jaxdiff.training.telling import SKIPPED
from jaxdiff.training.trainer import KEEP

SILENT = 10.0
"""How many times longer than from line to line a log is silent before that is said..."""
SILENT_SECONDS = 60.0
"""... and how long at least."""
COMPILING_SECONDS = 1800.0
"""How long it may be before the first line."""
SHOWN = 3
"""How many spikes and stalls are named, the last ones."""


@dataclasses.dataclass(frozen=True)
class Status:
    """What a run is at.

    Times are seconds, sizes bytes; None is what is not known.
    """

    run_dir: str
    experiment: str | None
    preset: str | None
    hash: str | None
    step: int
    num_steps: int | None
    percent: float | None
    finished: bool
    writer: str | None
    """The process that writes there now."""
    logged_age: float | None
    """Since the last line of the log."""
    loss: float | None
    steps_per_second: float | None
    """Of late."""
    overall_steps_per_second: float | None
    eta: float | None
    skipped: int
    """Steps of the whole run that were skipped as not finite."""
    checkpoints: list[dict[str, Any]]
    checkpoints_bytes: int
    folder_bytes: int
    free_bytes: int | None
    evaluation: Mapping[str, Any]
    evaluated_step: int | None
    warnings: list[str]


def status(place: Place, verified: int | None) -> Status:
    """Read, measure and judge a run.

    Args:
        place: the folder of the run.
        verified: how many of the newest checkpoints are compared with their checksums; None as many
            as is usual.
    """
    found = reading.read(place, verified)
    config = found.record.get("config", {})
    pace = judging.pace(found.lines)
    last = found.lines[-1] if found.lines else {}
    newest = found.checkpoints[-1].step if found.checkpoints else 0
    step = max(last.get("step", 0), newest)
    num_steps = config.get("num_steps")
    num_steps = num_steps if isinstance(num_steps, int) and num_steps > 0 else None
    finished = num_steps is not None and newest >= num_steps
    left = None if num_steps is None else max(0, num_steps - step)
    free = place.free()
    skipped = _skipped(found)
    return Status(
        run_dir=str(place.folder),
        experiment=found.record.get(command.EXPERIMENT, config.get(command.EXPERIMENT)),
        preset=found.record.get(command.PRESET, config.get(command.PRESET)),
        hash=found.record.get("hash"),
        step=step,
        num_steps=num_steps,
        percent=None if num_steps is None else 100.0 * min(step / num_steps, 1.0),
        finished=finished,
        writer=found.writer,
        logged_age=found.logged_age,
        loss=_finite(last.get("loss")),
        steps_per_second=pace.recent,
        overall_steps_per_second=pace.overall,
        eta=left / pace.recent if left is not None and pace.recent else None,
        skipped=skipped,
        checkpoints=[_shown(each) for each in found.checkpoints],
        checkpoints_bytes=found.checkpoints_bytes,
        folder_bytes=place.size(),
        free_bytes=free,
        evaluation=found.evaluation,
        evaluated_step=found.evaluated_step,
        warnings=[
            *found.problems,
            *_of_steps(found, skipped, step),
            *_of_speed(found, pace, step, finished),
            *_of_files(found, num_steps, free),
        ],
    )


def _skipped(found: Found) -> int:
    """Return the newest number of skipped steps that the log or a checkpoint says."""
    said = [(each.step, each.metrics) for each in found.checkpoints if each.damage is None]
    said += [(line["step"], line) for line in found.lines]
    counts = [(step, values[SKIPPED]) for step, values in said if SKIPPED in values]
    count = max(counts, key=lambda each: each[0])[1] if counts else 0
    return count if isinstance(count, int) else 0


def _shown(checkpoint: Checkpoint) -> dict[str, Any]:
    sound = checkpoint.damage is None if checkpoint.verified else None
    values = {"step": checkpoint.step, "sound": sound, "damage": checkpoint.damage}
    return values | {"bytes": checkpoint.bytes, "age": checkpoint.age}


def _of_steps(found: Found, skipped: int, step: int) -> Iterator[str]:
    """Warn of losses: spikes, steps that were skipped, the one that stopped the run."""
    spikes = judging.spikes(found.lines)
    for spike in spikes[-SHOWN:]:
        at = f"step {spike.first}"
        if spike.last > spike.first:
            at = f"steps {spike.first} to {spike.last}"
        yield f"the loss spiked at {at}: {spike.worst:.4g}, where {spike.usual:.4g} was usual"
    if len(spikes) > SHOWN:
        yield f"the loss spiked {len(spikes)} times in all; the last {SHOWN} are named"
    if skipped:
        steps = "1 step was" if skipped == 1 else f"{skipped} steps were"
        yield f"{steps} skipped as not finite, {skipped / max(step, skipped):.2%} of all"
    bad = found.nonfinite.get("step")
    if isinstance(bad, int) and bad > step:
        yield f"it stopped because step {bad} was not finite: see nonfinite.json"


def _of_speed(found: Found, pace: judging.Pace, step: int, finished: bool) -> Iterator[str]:
    """Warn of stalls, of a run that became slow, and of one that is silent."""
    stalls = judging.stalls(found.lines)
    for stall in stalls[-SHOWN:]:
        yield (
            f"a stall: the {stall.steps} steps up to {stall.step} took {span(stall.seconds)}, "
            f"where {span(stall.usual)} was usual"
        )
    if len(stalls) > SHOWN:
        lost = sum(stall.seconds - stall.usual for stall in stalls)
        yield f"{len(stalls)} stalls in all cost {span(lost)}; the last {SHOWN} are named"
    slow = judging.slowdown(found.lines)
    if slow is not None:
        yield f"it became slow: {slow[0]:.3g} steps a second of late, {slow[1]:.3g} before"
    if found.writer is None or finished:
        return
    if not found.lines:
        if (found.record_age or 0.0) > COMPILING_SECONDS:
            yield f"nothing was logged in {span(found.record_age or 0.0)}: it may hang"
    elif (found.logged_age or 0.0) > max(SILENT_SECONDS, SILENT * (pace.seconds or 0.0)):
        usual = "" if pace.seconds is None else f", where {span(pace.seconds)} is usual"
        yield (
            f"a process is at work and nothing was logged for {span(found.logged_age or 0.0)}"
            f"{usual}: it may hang"
        )


def _of_files(found: Found, num_steps: int | None, free: int | None) -> Iterator[str]:
    """Warn of damage, and of a disk that will not do."""
    for name in dict.fromkeys(name for name, _ in found.damaged_lines):
        numbers = [number for where, number in found.damaged_lines if where == name]
        yield f"{name}: {len(numbers)} damaged lines, the first is {numbers[0]}"
    for each in found.checkpoints:
        if each.damage is not None:
            yield f"checkpoint {each.step} is {each.damage}"
    if found.aside:
        yield f"damaged checkpoints were put aside, and may be deleted: {', '.join(found.aside)}"
    if found.unfinished:
        yield (
            f"checkpoints without a seal, which no reader takes for one and the next save deletes: "
            f"{', '.join(found.unfinished)}"
        )
    needed = _needed(found, num_steps)
    if free is not None and needed > free:
        yield (
            f"the disk has {size(free)} free, and checkpoints to come take {size(needed)} more: "
            "saving will fail"
        )


def _needed(found: Found, num_steps: int | None) -> int:
    """Return how much more checkpoints will take: one being written, and those that are to stay."""
    if not found.checkpoints:
        return 0
    newest = found.checkpoints[-1]
    running = found.record.get("running", {})
    last, every = running.get("keep_last", KEEP.last), running.get("keep_every")
    left = 0 if num_steps is None else num_steps - newest.step
    if num_steps is not None and left <= 0:
        return 0
    more = 1 + max(0, last - len(found.checkpoints))
    if every and num_steps is not None:
        more += num_steps // every - newest.step // every
    return more * newest.bytes


def _finite(value: Any) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None
