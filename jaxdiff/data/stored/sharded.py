"""A store made shard by shard in its own place, by a command that may be killed and run again.

Each file is written whole. When the arrays of shard 3 are there its record is written,
`00003.json`: what the store is of, and the size and SHA-256 of each file; when every record is
there, the index. So what a record names is complete, and a folder without an index is begun, not
finished. Nothing that is written tells which process wrote it, or when: two that write the same
shard write the same bytes, if what makes it makes the same twice.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxdiff import checks, files
from jaxdiff.data.stored import layout
from jaxdiff.data.stored.layout import ARRAYS, FORMAT, INDEX, SHARD_SIZE, Flat
from jaxdiff.typing import PyTree

_RECORD = re.compile(r"\d{5,}\.json")

Record = dict[str, Any]
"""{"of": what the store is of, "num_examples": rows, "files": by field}, of one shard."""


def write_shards(
    folder: str | os.PathLike[str],
    num_examples: int,
    make: Callable[[int, int], Mapping[str, PyTree]],
    *,
    shard_size: int = SHARD_SIZE,
    attributes: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
    mine: tuple[int, int] = (0, 1),
) -> None:
    """Write a store in its place, shard by shard, going on where a killed process left it.

    The same call goes on: shards whose files match their checksums stay, what is missing, damaged
    or cut is made again, and of a finished store nothing is written. Until all are there, `open`
    says how many are. Several processes may write at once, each its own shards, or even the same:
    they write the same bytes.

    Args:
        folder: made where missing; empty, or begun by such a call.
        num_examples: N.
        make: (first, last) -> rows first..last - 1, a dictionary as `write` takes them; rows must
            not depend on when or by which process they are made.
        shard_size: rows a file, and of one call of `make`; the last shard may have less.
        attributes: what else readers should know, and what tells this store from another: a folder
            begun with others is refused. JSON without NaN.
        progress: called with (done, total) rows of this process's shards: once with what was found,
            then after each shard.
        mine: (i, n): make every n-th shard from the i-th on, being process i of n. The index is
            written by whoever finds all shards there.

    Raises:
        FileExistsError: if `folder` holds something else.
        OSError: if it cannot be written; what was written before stays, and counts.
        TypeError: if `make` is no function or gives no arrays of numbers by name, or `attributes`
            is not JSON.
        ValueError: if `folder` was begun with another `num_examples`, `shard_size`, `attributes` or
            with other fields, `make` gives other rows than asked, or an argument is out of range.
    """
    plan = _Plan.of(num_examples, shard_size, attributes)
    checks.function("make", make, "(first, last) -> arrays by name", takes=2)
    number, count = _share(mine)
    place = layout.place(folder)
    names = _names(place)
    _refuse_others(place, names)
    place.mkdir(parents=True, exist_ok=True)
    records = _records(place, names, plan)
    own = range(number, plan.num_shards, count)
    sizes = layout.sizes_in(place)
    there = {i for i in own if i in records and _is_sound(place, records[i], sizes)}
    wanted = [i for i in own if i not in there]
    if wanted:
        left = sorted({*names} & {*map(_name, wanted)})
        for name in (INDEX, *left):  # so that what is made anew is not there
            (place / name).unlink(missing_ok=True)
    done, total = (sum(plan.num_rows(i) for i in some) for some in (there, own))
    fields = _fields(place, records)
    if progress is not None:
        progress(done, total)
    for i in wanted:
        first = i * plan.shard_size
        shard = _made(place, make, first, first + plan.num_rows(i), fields)
        fields = layout.fields_of(shard)
        said = layout.write_arrays(place, i, shard)
        files.write_text(place / _name(i), _sealed({"of": plan.record(fields)} | said))
        done += plan.num_rows(i)
        if progress is not None:
            progress(done, total)
    _finish(place, plan)


def how_far(place: files.Path) -> str | None:
    """Return how many shards are there of a store that is not finished; None if none is begun."""
    names = _names(place)
    records = _read_all(place, names)
    if not records:
        return "none of its shards is there" if _begun(names) else None
    of = next(iter(records.values()))["of"]
    plan = _Plan(*(of[field.name] for field in dataclasses.fields(_Plan)))
    there = sum(i in records for i in range(plan.num_shards))
    return f"{there} of {plan.num_shards} shards are there"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a store is of, before its fields are known."""

    num_examples: int
    shard_size: int
    attributes: dict[str, Any]

    @classmethod
    def of(cls, num_examples: Any, shard_size: Any, attributes: Any) -> "_Plan":
        """Judge arguments.

        Raises:
            TypeError: if one is of another type, or no JSON.
            ValueError: if one is out of range.
        """
        try:
            text = json.dumps(dict(attributes or {}), sort_keys=True, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"`attributes` must be JSON that can be compared: {error}.") from error
        counts = checks.count("num_examples", num_examples), checks.count("shard_size", shard_size)
        return cls(*counts, json.loads(text))

    @property
    def num_shards(self) -> int:
        """How many shards there will be."""
        return -(-self.num_examples // self.shard_size)

    def num_rows(self, number: int) -> int:
        """Return how many rows a shard has."""
        return min(self.shard_size, self.num_examples - number * self.shard_size)

    def record(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the record of each shard says that it is of."""
        return dataclasses.asdict(self) | {"fields": dict(fields)}

    def refuse_another(self, place: files.Path, record: Record) -> None:
        """Refuse a shard of another store.

        Raises:
            ValueError: if it is, naming what differs.
        """
        for name, now in dataclasses.asdict(self).items():
            before = record["of"][name]
            if before == now:
                continue
            if name == "attributes":
                keys = sorted(before.keys() | now.keys())
                differ = [key for key in keys if before.get(key) != now.get(key)]
                before, now = ({key: each.get(key) for key in differ} for each in (before, now))
            raise ValueError(
                f"`{name}` must be as when {place} was begun, {before}; got {now}. Take another "
                "folder, or remove that one."
            )


def _share(mine: Any) -> tuple[int, int]:
    if not isinstance(mine, tuple | list) or len(mine) != 2:
        raise TypeError(f"`mine` must be (i, n), process i of n; got {checks.shown(mine)}.")
    number, count = checks.count("mine[0]", mine[0], 0), checks.count("mine[1]", mine[1])
    if number >= count:
        raise ValueError(f"`mine` must be (i, n) with i in 0..n - 1; got {tuple(mine)}.")
    return number, count


def _made(
    place: files.Path,
    make: Callable[[int, int], Mapping[str, PyTree]],
    first: int,
    last: int,
    fields: Mapping[str, Any] | None,
) -> Flat:
    """Make rows; refuse what are not those asked for.

    Raises:
        TypeError: if they are no arrays by name.
        ValueError: if they are of another count, or have other fields than those before.
    """
    shard = dict(sorted(layout.flat(f"make({first}, {last})", make(first, last)).items()))
    if layout.num_rows(shard) != last - first:
        raise ValueError(
            f"`make({first}, {last})` must give {last - first} rows; got {layout.num_rows(shard)}."
        )
    if fields is not None and layout.fields_of(shard) != fields:
        raise ValueError(
            f"`make({first}, {last})` must give the fields that {place} holds, {fields}; got "
            f"{layout.fields_of(shard)}. Take another folder, or remove that one."
        )
    return shard


# --- What is there --------------------------------------------------------------------------


def _name(number: int) -> str:
    return f"{number:05d}.json"


def _names(place: files.Path) -> list[str]:
    """List what is in a folder, but for what is hidden: of file managers, or left by a kill."""
    try:
        return sorted(path.name for path in place.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _begun(names: list[str]) -> bool:
    """Tell whether anything of a store made by shards is among what a folder holds."""
    return any(_RECORD.fullmatch(name) or ARRAYS.fullmatch(name) for name in names)


def _refuse_others(place: files.Path, names: list[str]) -> None:
    """Refuse a folder that holds something, but nothing of a store made by shards.

    Args:
        place: the folder.
        names: of what it holds.

    Raises:
        FileExistsError: if it does.
    """
    if INDEX in names and not any(map(_RECORD.fullmatch, names)):
        raise FileExistsError(
            f"`folder` {place} holds a store that was written whole. Take another, or remove it."
        )
    if (names and not _begun(names)) or place.is_file():
        raise FileExistsError(f"`folder` {place} holds something already. Take another.")


def _records(place: files.Path, names: list[str], plan: _Plan) -> dict[int, Record]:
    """Return the records that can be read, by their shard.

    Raises:
        ValueError: if one is of another store.
    """
    found = _read_all(place, names)
    for record in found.values():
        plan.refuse_another(place, record)
    return found


def _read_all(place: files.Path, names: list[str]) -> dict[int, Record]:
    """Return what records can be read of a folder that holds `names`, by their shard."""
    numbers = (int(name.removesuffix(".json")) for name in names if _RECORD.fullmatch(name))
    read = ((number, _read(place / _name(number))) for number in numbers)
    return {number: record for number, record in read if record is not None}


def _read(path: files.Path) -> Record | None:
    """Return a record, or None if it is not there or not as it was written."""
    try:
        text = path.read_bytes()
        record: Record = json.loads(text)["record"]
        return record if text == _sealed(record).encode() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sealed(record: Record) -> str:
    """Return the text of a record, which says its own checksum."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    whole = {"format": FORMAT, "record": record, "sha256": digest}
    return json.dumps(whole, indent=1) + "\n"


def _is_sound(
    place: files.Path, record: Record, sizes: Mapping[str, int] | None, *, verify: bool = True
) -> bool:
    return not any(
        layout.damage(place / said["name"], said, verify=verify, sizes=sizes)
        for said in record["files"].values()
    )


def _fields(place: files.Path, records: Mapping[int, Record]) -> dict[str, Any] | None:
    """Return the fields that all shards there have; None if there is none.

    Raises:
        ValueError: if they differ.
    """
    fields: dict[str, Any] | None = None
    for number, record in records.items():
        mine = record["of"]["fields"]
        if fields is not None and mine != fields:
            raise ValueError(
                f"`make` must give the same fields for every shard; in {place} that of "
                f"{_name(number)} has {mine}, those before have {fields}. Remove what is wrong."
            )
        fields = mine
    return fields


def _finish(place: files.Path, plan: _Plan) -> None:
    """Write the index if all shards are there."""
    records = _records(place, _names(place), plan)
    fields = _fields(place, records)
    if fields is None or any(i not in records for i in range(plan.num_shards)):
        return
    ordered = [records[i] for i in range(plan.num_shards)]
    sizes = layout.sizes_in(place)
    if not all(_is_sound(place, record, sizes, verify=False) for record in ordered):
        return
    shards = [{key: record[key] for key in ("num_examples", "files")} for record in ordered]
    text = json.dumps(layout.index_of(fields, plan.attributes, shards), indent=1) + "\n"
    path = place / INDEX
    if not path.is_file() or path.read_bytes() != text.encode():
        files.write_text(path, text)
