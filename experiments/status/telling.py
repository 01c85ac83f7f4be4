"""The status of a run in words."""

from collections.abc import Iterator

from experiments.common.units import size, span
from experiments.status.gathering import Status


def lines(status: Status) -> Iterator[str]:
    """Yield what a reader is told, a line each."""
    yield f"{status.run_dir}: {_what(status)}"
    yield from (f"  {name:<12}{text}" for name, text in _facts(status) if text)
    for warning in status.warnings:
        yield f"  WARNING     {warning}"
    if not status.warnings:
        yield "  no warnings"


def _what(status: Status) -> str:
    names = (
        status.experiment,
        status.preset and f"preset {status.preset}",
        status.hash and f"config {status.hash}",
    )
    return ", ".join(name for name in names if name) or "a run without a record"


def _facts(status: Status) -> Iterator[tuple[str, str]]:
    in_store = "://" in status.run_dir
    of_all = "" if status.num_steps is None else f" of {status.num_steps}, {status.percent:.1f}%"
    yield "step", f"{status.step}{of_all}{', finished' if status.finished else ''}"
    if status.writer is None:
        held = "lease" if in_store else "lock here"
        yield "written by", f"nobody that holds its {held}"
    else:
        yield "written by", status.writer
    if status.logged_age is not None:
        loss = "" if status.loss is None else f", loss {status.loss:.4g}"
        yield "logged", f"{span(status.logged_age)} ago{loss}"
    yield "speed", _speed(status)
    if status.skipped:
        yield "skipped", f"{status.skipped} steps, not finite"
    yield "checkpoints", _checkpoints(status)
    free = "" if status.free_bytes is None else f"; {size(status.free_bytes)} are free"
    yield (
        "stored" if in_store else "disk",
        f"{size(status.folder_bytes)}, {size(status.checkpoints_bytes)} of them checkpoints{free}",
    )
    yield "evaluation", _evaluation(status)


def _speed(status: Status) -> str:
    if status.steps_per_second is None or status.overall_steps_per_second is None:
        return ""
    said = (
        f"{status.steps_per_second:.3g} steps a second of late, "
        f"{status.overall_steps_per_second:.3g} overall"
    )
    if status.eta:
        going = "" if status.writer else " if it went on"
        said += f"; {span(status.eta)} to go{going}"
    return said


def _checkpoints(status: Status) -> str:
    if not status.checkpoints:
        return "none"
    said = []
    for each in status.checkpoints[-5:]:
        judged = {True: "sound", False: each["damage"], None: "not verified"}[each["sound"]]
        age = "" if each["age"] is None else f", {span(each['age'])} ago"
        said.append(f"{each['step']} ({judged}{age})")
    earlier = len(status.checkpoints) - len(said)
    return ", ".join(([f"{earlier} earlier"] if earlier else []) + said)


def _evaluation(status: Status) -> str:
    numbers = [
        f"{name} {value:.4g}"
        for name, value in status.evaluation.items()
        if isinstance(value, float) and not name.endswith("_stderr")
    ]
    if not numbers:
        return ""
    step = "" if status.evaluated_step is None else f" at step {status.evaluated_step}"
    return ", ".join(numbers[:6]) + step
