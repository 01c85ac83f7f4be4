"""The folder of an ablation: its lock, one file a group, and the tables made of them.

    ablation.json         what the folder holds: the same command goes on, another is refused
    groups/012.json       the rows of a finished group, written whole or not at all
    results.csv           what reproduces byte for byte
    results.json          the same with all digits, and the comparison with the base
    timings.csv           seconds
    environment.json      versions, devices and commit of each group
    report.md, *.png      for readers

No group's file depends on another's, and the tables are made of all of them in the order of the
definition. So neither the order of the work, nor a kill, nor several machines change a byte.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.ablations.definition import SEED, Ablation, Group, cells, groups
from experiments.ablations.judging import Result
from experiments.command import Refusal
from experiments.tables import Row, csv_text
from jaxdiff.training.run import config_hash

LOCK, GROUPS = "ablation.json", "groups"
RESULTS, TIMINGS, ENVIRONMENT = "results.csv", "timings.csv", "environment.json"
COSTS = ("nfe", "train_flops", "sample_flops")


def claim(directory: Path, record: Mapping[str, Any], tag: str) -> None:
    """Lock a folder for an ablation, or find it locked for the same.

    Raises:
        Refusal: if it holds another one, naming what differs; no file is touched.
    """
    old = read_lock(directory)
    if old is not None:
        check_same(directory, old, record)
        return
    if directory.exists() and any(directory.glob("*.csv")):
        raise Refusal(f"{directory} holds results but no {LOCK}. Take another --run-dir.")
    whole = {"hash": config_hash(record), **record}
    try:
        (directory / GROUPS).mkdir(parents=True, exist_ok=True)
        write_whole(directory / LOCK, json.dumps(whole, indent=2) + "\n", tag)
    except OSError as error:
        raise Refusal(f"--run-dir {directory} cannot be written: {error.strerror}.") from error


def read_lock(directory: Path) -> dict[str, Any] | None:
    """Return what a folder is locked for, without the hash; None where there is no lock.

    Raises:
        Refusal: if the lock cannot be read, or its hash is not that of the rest.
    """
    path = directory / LOCK
    try:
        record = json.loads(path.read_text())
        given = record.pop("hash")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise Refusal(f"{path} cannot be read ({error}). Take another folder.") from error
    if given != config_hash(record):
        raise Refusal(f"{path} was changed: its hash is {given}, its content's another.")
    return record


def require_lock(directory: Path) -> dict[str, Any]:
    """Return what a folder is locked for.

    Raises:
        Refusal: if it is not.
    """
    record = read_lock(directory)
    if record is None:
        raise Refusal(f"{directory} holds no ablation: there is no {LOCK} in it.")
    return record


def check_same(directory: Path, old: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse an ablation that is not the one that a folder holds.

    Raises:
        Refusal: naming each field that differs.
    """
    names = [k for k in {**old, **asked} if old.get(k) != asked.get(k)]
    if names:
        fields = "\n".join(f"  {k}: there {old.get(k)}, asked {asked.get(k)}" for k in names)
        raise Refusal(
            f"{directory} holds another ablation:\n{fields}\n"
            "Ask for the same to go on with it, or take another --run-dir."
        )


def write_whole(path: Path, text: str, tag: str = "") -> None:
    """Write a file whole or not at all; shards of several machines differ in their tag."""
    staged = path.with_name(f".{path.name}.{tag}.tmp")
    staged.write_text(text)
    os.replace(staged, path)


def group_path(directory: Path, index: int) -> Path:
    """Return where the result of a group lies."""
    return directory / GROUPS / f"{index:03d}.json"


def write_group(directory: Path, group: Group, result: Result, tag: str) -> None:
    """Store the result of a finished group."""
    write_whole(group_path(directory, group.index), json.dumps(result, indent=1) + "\n", tag)


def read_groups(directory: Path, ablation: Ablation) -> dict[int, Result]:
    """Return the results of the groups that are done, by index.

    Raises:
        Refusal: if one cannot be read.
    """
    found = {}
    for group in groups(ablation):
        path = group_path(directory, group.index)
        try:
            found[group.index] = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise Refusal(f"{path} cannot be read ({error}). Remove it to run it anew.") from error
    return found


def chosen(
    ablation: Ablation, only: Mapping[str, Sequence[Any]], shard: tuple[int, int]
) -> list[Group]:
    """Return the groups that hold a row with one of the asked values on each axis, of a shard."""

    def holds(group: Group) -> bool:
        sources = (({**group.fixed},), group.members, group.samplings)
        return all(
            any(each.get(field) in values for source in sources for each in source)
            for field, values in only.items()
        )

    index, count = shard
    return [g for g in groups(ablation) if g.index % count == index % count and holds(g)]


# --- Tables ---------------------------------------------------------------------------------


def ordered_rows(ablation: Ablation, done: Mapping[int, Result]) -> list[Row]:
    """Return the rows that are done, in the order of the axes, seeds last."""
    fields = list(ablation.varied)
    places = {tuple(cell[field] for field in fields): i for i, cell in enumerate(cells(ablation))}
    seeds = ablation.seed_values

    def place(row: Row) -> tuple[int, int]:
        return places[tuple(_hashable(row[field]) for field in fields)], seeds.index(row[SEED])

    return sorted((row for result in done.values() for row in result["rows"]), key=place)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def results_csv(ablation: Ablation, rows: Sequence[Row], summary: Sequence[Row]) -> str:
    """Return results.csv: a line a row, its measures beside their mean and error over seeds."""
    names = list(ablation.measures)
    spread = [f"{name}_{part}" for name in names for part in ("mean", "stderr")]
    columns = [*ablation.varied, SEED, "hash", *names, *spread, *COSTS]
    of_cell = {tuple(cell[f] for f in ablation.varied): cell for cell in summary}
    lines = [
        {**{k: of_cell[tuple(row[f] for f in ablation.varied)][k] for k in spread}, **row}
        for row in rows
    ]
    return csv_text(lines, columns)


def timings_csv(ablation: Ablation, done: Mapping[int, Result]) -> str:
    """Return timings.csv: the seconds of each group that is done."""
    made = {group.index: group for group in groups(ablation)}
    fixed = list(made[0].fixed)
    lines = [
        {
            "group": index,
            **made[index].fixed,
            "runs": len(made[index].members),
            **{f"{name}_seconds": value for name, value in result["seconds"].items()},
            "train_seconds_a_run": result["seconds"]["train"] / len(made[index].members),
        }
        for index, result in done.items()
    ]
    seconds = ("compile_seconds", "train_seconds", "judge_seconds", "train_seconds_a_run")
    return csv_text(lines, ["group", *fixed, "runs", *seconds])


def environments(done: Mapping[int, Result]) -> str:
    """Return environment.json: each environment once, with the groups that ran in it."""
    found: list[dict[str, Any]] = []
    for index, result in done.items():
        same = next((e for e in found if e["environment"] == result["environment"]), None)
        if same is None:
            same = {"groups": [], "environment": result["environment"]}
            found.append(same)
        same["groups"].append(index)
    return json.dumps(found, indent=2) + "\n"
