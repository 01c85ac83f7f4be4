"""The folder of an ablation: its lock, one file a group, and the tables made of them.

    ablation.json         what the folder holds: the same command goes on, another is refused
    groups/012.json       the rows of a finished group and their checksum
    results.csv           what reproduces byte for byte
    results.json          the same with all digits, and the comparison with the base
    timings.csv           seconds
    environment.json      versions, devices and commit of each group
    report.md, *.png      for readers

No group's file depends on another's, and the tables are made of all of them in the order of the
definition. So neither the order of the work, nor a kill, nor several machines change a byte. All
files are written whole or not at all, and what is read is held against the definition: a group's
file is that of its number, holds the rows that the group has, and is what was written.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.ablations.definition import SEED, Ablation, Group, groups, row_hash
from experiments.ablations.fields import as_json, defaults, replaced
from experiments.ablations.judging import Result
from experiments.ablations.results import COSTS
from experiments.common import options
from experiments.common.command import Refusal
from jaxdiff import files
from jaxdiff.training.run import config_hash, random_numbers

LOCK, GROUPS, RANDOM = "ablation.json", "groups", "random_numbers"


class Corrupt(Refusal):
    """A file of a folder is not what was written there."""


# --- The lock -------------------------------------------------------------------------------


def claim(directory: files.Path, record: Mapping[str, Any], ablation: Ablation) -> Ablation:
    """Lock a folder for an ablation, or find it locked for the same.

    Args:
        directory: of the ablation.
        record: of the ablation.
        ablation: what is asked for.

    Returns:
        The ablation, with the fields that the folder's rows are hashed by.

    Raises:
        Refusal: if the folder holds another one, or rows of other random numbers, naming what
            differs; no file is touched.
    """
    old = read_lock(directory)
    if old is not None:
        there = as_there(directory, old, record, ablation)
        check_random(directory, old)
        return there
    if directory.exists() and any(path.suffix == ".csv" for path in directory.iterdir()):
        raise Refusal(f"{directory} holds results but no {LOCK}. Take another --run-dir.")
    record = {**record, RANDOM: random_numbers()}
    whole = {"hash": config_hash(record), **record}
    try:
        (directory / GROUPS).mkdir(parents=True, exist_ok=True)
        files.write_text(directory / LOCK, json.dumps(whole, indent=2) + "\n")
    except OSError as error:
        raise Refusal(f"--run-dir {directory} cannot be written: {error.strerror}.") from error
    return ablation


def read_lock(directory: files.Path) -> dict[str, Any] | None:
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
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise Corrupt(f"{path} cannot be read ({error}). Take another folder.") from error
    if given != config_hash(record):
        raise Corrupt(
            f"{path} is corrupt: its hash is {given}, its content's {config_hash(record)}. "
            "Put back what was written, or take another folder."
        )
    seeds = record.get("seeds")
    named = all(isinstance(record.get(key), str) for key in ("name", "preset"))
    named = named and isinstance(record.get(RANDOM, {}), dict)
    counted = isinstance(seeds, list) and bool(seeds) and all(type(s) is int for s in seeds)
    if not (named and counted):
        raise Corrupt(f"{path} is no record of an ablation. Take another folder.")
    return record


def require_lock(directory: files.Path) -> dict[str, Any]:
    """Return what a folder is locked for.

    Raises:
        Refusal: if it is not.
    """
    record = read_lock(directory)
    if record is None:
        raise Refusal(f"{directory} holds no ablation: there is no {LOCK} in it.")
    return record


def as_there(
    directory: files.Path, old: Mapping[str, Any], asked: Mapping[str, Any], ablation: Ablation
) -> Ablation:
    """Return an ablation as a folder that holds it has it.

    A field of configs that a record lacks, because it was added since, means its default; the
    folder's rows are hashed by those that there were.

    Raises:
        Refusal: if the folder holds another one, naming each field that differs.
    """
    known = {f"base.{field}": value for field, value in defaults(ablation.world.config).items()}
    there, here = {**known, **old}, {**known, **asked}
    names = [k for k in {**old, **asked} if k != RANDOM and there.get(k) != here.get(k)]
    if names:
        fields = "\n".join(f"  {k}: there {there.get(k)}, asked {here.get(k)}" for k in names)
        raise Refusal(
            f"{directory} holds another ablation:\n{fields}\n"
            "Ask for the same to go on with it, or take another --run-dir."
        )
    later = options.later_defaults(ablation.world.config)
    held = {k.removeprefix("base."): v for k, v in old.items() if k.startswith("base.")}
    counted = {k for k, v in held.items() if k not in later or v == as_json(later[k])}
    return dataclasses.replace(ablation, hashed=frozenset({SEED} | counted))


def check_random(directory: files.Path, record: Mapping[str, Any]) -> None:
    """Refuse to add rows to a folder, or to compare some with it, if random numbers are others.

    Folders of before these were recorded are gone on with.

    Raises:
        Refusal: naming each setting that differs.
    """
    here = random_numbers()
    there = record.get(RANDOM, here)
    names = [name for name in here if there.get(name) != here[name]]
    if names:
        told = "\n".join(f"  {n.upper()}: there {there.get(n)}, here {here[n]}" for n in names)
        raise Refusal(
            f"{directory} holds rows of other random numbers:\n{told}\n"
            "Set the environment as it was, or take another --run-dir."
        )


# --- Groups ---------------------------------------------------------------------------------


def group_path(directory: files.Path, index: int) -> files.Path:
    """Return where the result of a group lies."""
    return directory / GROUPS / f"{index:03d}.json"


def write_group(directory: files.Path, group: Group, result: Result) -> None:
    """Store the result of a finished group with its checksum.

    Raises:
        Refusal: if it cannot be written.
    """
    path, content = group_path(directory, group.index), as_json(result)
    try:
        text = json.dumps({**content, "checksum": config_hash(content)}, indent=1) + "\n"
        files.write_text(path, text)
    except OSError as error:
        raise Refusal(
            f"{path} cannot be written: {error.strerror}. What is finished is as it was."
        ) from error


def read_group(directory: files.Path, ablation: Ablation, group: Group) -> Result | None:
    """Return the result of a group, None where it is not done.

    Raises:
        Corrupt: if the file cannot be read, was changed, or is that of another group.
    """
    path = group_path(directory, group.index)
    try:
        result = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        why: str | None = f"it cannot be read ({error})"
    else:
        why = _wrong(result, ablation, group)
        if why is None:
            del result["checksum"]
            return result
    raise Corrupt(f"{path} is corrupt: {why}. Put back what was written, or remove it to run anew.")


def _wrong(result: Any, ablation: Ablation, group: Group) -> str | None:
    """Say what a group's file has that it was not written with; None where all is well."""
    parts = {"group": int, "rows": list, "seconds": dict, "environment": dict, "checksum": str}
    if not isinstance(result, dict):
        return "it holds no object"
    for name, kind in parts.items():
        if not isinstance(result.get(name), kind):
            return f"it has no `{name}`"
    content = {name: value for name, value in result.items() if name != "checksum"}
    if config_hash(content) != result["checksum"]:
        return "its checksum is not that of its content, which was changed"
    if result["group"] != group.index:
        return f"it is a copy of group {result['group']}"
    wanted = list(group.rows())
    if len(result["rows"]) != len(wanted):
        return f"it holds {len(result['rows'])} rows for {len(wanted)}"
    for row, values in zip(result["rows"], wanted, strict=True):
        config = replaced(group.config, values)
        needed = {**as_json(values), "hash": row_hash(ablation, config)}
        if not isinstance(row, dict) or any(row.get(k) != v for k, v in needed.items()):
            return "its rows are not those of this group"
        for name in (*ablation.measures, *COSTS):
            value = row.get(name, math.nan)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                return f"a row has no finite {name}"
    return None


def read_groups(directory: files.Path, ablation: Ablation) -> dict[int, Result]:
    """Return the results of the groups that are done, by index; other files are not looked at.

    Raises:
        Corrupt: if one is not what was written.
    """
    found = {group.index: read_group(directory, ablation, group) for group in groups(ablation)}
    return {index: result for index, result in found.items() if result is not None}


def chosen(
    ablation: Ablation, only: Mapping[str, Sequence[Any]], shard: tuple[int, int]
) -> list[Group]:
    """Return the groups that hold a row with one of the asked values on each axis, of a shard."""

    def holds(group: Group) -> bool:
        return any(
            all(row[field] in values for field, values in only.items()) for row in group.rows()
        )

    index, count = shard
    return [g for g in groups(ablation) if g.index % count == index % count and holds(g)]
