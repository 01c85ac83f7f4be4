"""All that is read of a run's folder, beside the run that writes it; nothing is touched.

What a run deletes while it is read is not there.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from experiments.common import evaluations
from experiments.common.command import Refusal
from experiments.common.units import span
from experiments.status.places import Place, place_of
from jaxdiff import files
from jaxdiff.training import lease, lock, metrics_log
from jaxdiff.training import run as runs
from jaxdiff.training.folders import RunError, existing_run
from jaxdiff.training.sound_steps import SoundSteps
from jaxdiff.training.trainer import NONFINITE

VERIFIED = 3
"""How many checkpoints are verified where nobody says; in a store none, as all would be fetched."""
LOOKED_AT = 5
"""Of how many of the newest checkpoints in a store more than the size is read."""


class Checkpoint(NamedTuple):
    """One checkpoint.

    Attributes:
        step: the number of updates done.
        bytes: of all its files.
        age: seconds since it was sealed, None where that is not known.
        damage: what is wrong with it, None where nothing is, or it was not looked at.
        verified: whether its checksums were looked at.
        metrics: what was measured of it.
    """

    step: int
    bytes: int
    age: float | None
    damage: str | None
    verified: bool
    metrics: Mapping[str, Any]


class Found(NamedTuple):
    """What is in a run's folder.

    Attributes:
        record: what config.json says; nothing where there is none, or none that can be read.
        lines: the whole lines of the log.
        damaged_lines: the file and number of those that are not, but for a last one being written.
        logged_age: seconds since the log was written, None where there is none.
        record_age: the same of config.json, where a process is at work that logged nothing yet.
        writer: which process writes there, None where none is known to.
        checkpoints: oldest first.
        aside: names of damaged checkpoints that were put aside.
        unfinished: names of saves, or deletions, in a store that came to no end.
        checkpoints_bytes: of all in the folder of checkpoints.
        evaluation: what evaluation.json says.
        evaluated_step: the step that it is of, None where it is not said.
        nonfinite: what nonfinite.json says.
        problems: what could not be read, and why; what is wrong with a lease.
    """

    record: Mapping[str, Any]
    lines: list[dict[str, Any]]
    damaged_lines: list[tuple[str, int]]
    logged_age: float | None
    record_age: float | None
    writer: str | None
    checkpoints: list[Checkpoint]
    aside: list[str]
    unfinished: list[str]
    checkpoints_bytes: int
    evaluation: Mapping[str, Any]
    evaluated_step: int | None
    nonfinite: Mapping[str, Any]
    problems: list[str]


def place(run_dir: str) -> Place:
    """Return the folder that a command line names, or refuse where there is none."""
    return place_of(existing_run(run_dir, "RUN_DIR"))


def runs_in(place: Place) -> tuple[bool, list[Place]]:
    """Tell whether a folder is a run's, and which folders in it are.

    Raises:
        Refusal: if there is no run at all.
        RunError: if all that there is of one is a config.json that is none of a run.
    """
    inner = place.inner()
    own = place.was_trained() or (place.has_record() and runs.read_record(place.folder) is not None)
    if not own and not inner:
        raise Refusal(
            f"RUN_DIR {place.folder} is no run: it has no {runs.CONFIG}, {runs.METRICS} or "
            f"{runs.CHECKPOINTS}, and no folder in it has. Name what --run-dir of the run named."
        )
    return own, inner


def read(place: Place, verified: int | None) -> Found:
    """Read the folder of a run.

    Args:
        place: exists.
        verified: how many of the newest checkpoints are compared with their checksums; None as many
            as is usual.
    """
    folder = place.folder
    problems: list[str] = []
    record: Mapping[str, Any] = {}
    try:
        record = (runs.read_record(folder) if place.has_record() else None) or {}
    except RunError as error:
        problems.append(str(error))
    free = runs.free_of(record) if record else ()
    writer, wrong = _writer(folder)
    lines, damaged, logged_age = _log(place)
    stored = SoundSteps(folder / runs.CHECKPOINTS, record.get("config"), free, lambda message: None)
    return Found(
        record,
        lines,
        damaged,
        logged_age,
        place.age(runs.CONFIG) if writer is not None and not lines else None,
        writer,
        _checkpoints(stored, place, verified),
        [name for name in place.entries(runs.CHECKPOINTS) if ".corrupt" in name],
        _unfinished(stored) if writer is None else [],
        place.size(runs.CHECKPOINTS),
        _json(place, evaluations.EVALUATION),
        evaluations.read(folder).get("step") if evaluations.REPORT in place.entries("") else None,
        _json(place, NONFINITE),
        [*problems, *wrong],
    )


def _writer(folder: files.Path) -> tuple[str | None, list[str]]:
    """Say which process writes a run, and what is wrong with its lease."""
    if not files.is_stored(folder):
        return lock.writer(folder), []
    seen = lease.look(folder)
    if seen is None:
        return None, []
    return (str(seen.holder) if seen.held else None), list(_of_lease(seen))


def _of_lease(seen: lease.Seen) -> Iterator[str]:
    """Warn of a lease that nobody renews: its holder does every quarter of its time."""
    if seen.dead:
        yield f"{seen.holder}, died and left its lease: the next command goes on at once"
    elif not seen.held:
        yield (
            f"{seen.holder}, left its lease, which was renewed last {span(seen.age)} ago and has "
            "ended: it died, or does not reach the store"
        )
    elif seen.age > seen.holder.ttl / 2:
        yield (
            f"the lease of {seen.holder}, was not renewed for {span(seen.age)} and ends after "
            f"{span(seen.holder.ttl)}: the process may be dead, or not reach the store"
        )


def _log(place: Place) -> tuple[list[dict[str, Any]], list[tuple[str, int]], float | None]:
    """Return the lines of a log, the file and number of damaged ones, and its age.

    Of a store's log the parts are read first: what is merged and deleted meanwhile is found in the
    file. A step that is in both counts once.
    """
    names = place.logs()
    texts = {name: _bytes(place.folder / name) for name in reversed(names)}
    there = [name for name in names if texts[name] is not None]
    lines: list[dict[str, Any]] = []
    damaged: list[tuple[str, int]] = []
    for name in there:
        text = texts[name] or b""
        parsed = [_line(each) for each in text.splitlines()]
        bad = [(name, number) for number, line in enumerate(parsed, 1) if line is None]
        if bad and bad[-1][1] == len(parsed) and not text.endswith(b"\n"):
            bad.pop()  # it is being written, or a kill cut it
        merged = lines[-1]["step"] if lines and name != runs.METRICS else -1
        lines += [line for line in parsed if line is not None and line["step"] > merged]
        damaged += bad
    return lines, damaged, place.age(there[-1]) if there else None


def _line(text: bytes) -> dict[str, Any] | None:
    line = metrics_log.parse(text)
    return line if line is not None and isinstance(line["step"], int) else None


def _checkpoints(stored: SoundSteps, place: Place, verified: int | None) -> list[Checkpoint]:
    in_store = files.is_stored(place.folder)
    steps = [step for step in stored.steps() if not in_store or place.size(_name_of(step))]
    count = verified if verified is not None else 0 if in_store else VERIFIED
    newest = set(steps[-count:]) if count else set()
    looked_at = set(steps[-LOOKED_AT:]) if in_store else set(steps)
    found = []
    for step in steps:
        damage = stored.find_damage(step) if step in newest else None
        each = Checkpoint(
            step,
            place.size(_name_of(step)),
            place.age_of(step) if step in looked_at else None,
            damage,
            step in newest,
            stored.metrics(step) if step in looked_at else {},
        )
        if _is_there(stored, step, damage, in_store):
            found.append(each)
    stored.kept.close()
    return found


def _name_of(step: int) -> str:
    return f"{runs.CHECKPOINTS}/{step}"


def _is_there(stored: SoundSteps, step: int, damage: str | None, in_store: bool) -> bool:
    """Tell whether a step is there yet; if not it was deleted meanwhile, and there are newer."""
    if in_store:  # one that is sound was there
        return damage is None or step in stored.steps()
    return (stored.directory / str(step)).is_dir()


def _unfinished(stored: SoundSteps) -> list[str]:
    """Name what has no seal in a store and nobody is at work on."""
    if not files.is_stored(stored.directory):
        return []
    found = [path.name for path in stored.kept.leftovers()]
    return found if found and lock.is_saved_to(stored.directory) is False else []


def _json(place: Place, name: str) -> Mapping[str, Any]:
    text = _bytes(place.folder / name) if name in place.entries("") else None
    try:
        found = json.loads(text or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _bytes(path: files.Path) -> bytes | None:
    """Return what a file holds, None where it is not there or cannot be read on a disk.

    Raises:
        OSError: if a store does not answer.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        if files.is_stored(path):
            raise
        return None
