"""A store of what comes, rows by rows, whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff import checks, files
from jaxdiff.data.stored import layout
from jaxdiff.data.stored.layout import INDEX, SHARD_SIZE, Flat
from jaxdiff.typing import PyTree


def write(
    folder: str | os.PathLike[str],
    examples: Iterable[Mapping[str, PyTree]],
    *,
    shard_size: int = SHARD_SIZE,
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Write a store, whole or not at all.

    If the process is killed, nothing is at `folder`; a hidden folder that it leaves beside it may
    be deleted. In an object store files without an index are left, which the next call deletes.
    What takes hours to make is better made by `write_shards`, which goes on.

    Args:
        folder: must not exist, or be empty.
        examples: rows, several at a time: each a dictionary of arrays (n, ...), which may hold
            dictionaries, with the same names, dtypes and shapes (...) throughout.
        shard_size: examples a file.
        attributes: what else readers should know, as JSON holds it: what made the latents, their
            mean and scale.

    Raises:
        FileExistsError: if `folder` holds something.
        OSError: if it cannot be written.
        TypeError: if `examples` gives no arrays of numbers by name, or `attributes` is not JSON.
        ValueError: if there are none, or they are not alike.
    """
    shard_size = checks.count("shard_size", shard_size)
    text = json.dumps(dict(attributes or {}))
    final = layout.place(folder)
    if files.is_stored(final):
        _write_in_store(final, _shards(examples, shard_size), json.loads(text))
        return
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(f"`folder` {final} holds something already. Take another.")
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        _write(scratch, _shards(examples, shard_size), json.loads(text))
        os.chmod(scratch, 0o777 & ~_umask())
        os.replace(scratch, final)
        files.flush(final.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(folder: files.Path, made: Iterator[Flat], attributes: Mapping[str, Any]) -> None:
    """Write shards and, last, their index."""
    fields: dict[str, Any] | None = None
    shards: list[dict[str, Any]] = []
    for shard in made:
        fields = layout.fields_of(shard)
        shards.append(layout.write_arrays(folder, len(shards), shard))
    if fields is None:
        raise ValueError("`examples` must give one at least; it gave none.")
    index = layout.index_of(fields, attributes, shards)
    files.write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")


def _write_in_store(final: files.Path, made: Iterator[Flat], attributes: Mapping[str, Any]) -> None:
    """Write in its place, where nothing is renamed: what has no index is no store, but a leftover.

    Raises:
        FileExistsError: if anything else is there.
    """
    names = files.names(final)
    if INDEX in names or not all(map(layout.ARRAYS.fullmatch, names)):
        raise FileExistsError(f"`folder` {final} holds something already. Take another.")
    files.remove_tree(final)
    try:
        _write(final, made, attributes)
    except BaseException:
        with contextlib.suppress(OSError):
            files.remove_tree(final)
        raise


def _shards(examples: Iterable[Mapping[str, PyTree]], size: int) -> Iterator[Flat]:
    """Cut what comes several rows at a time into shards of `size` rows; the last may be less."""
    held: list[Flat] = []
    count, expected = 0, None
    for number, given in enumerate(examples):
        flat = layout.flat(f"examples[{number}]", given)
        fields = layout.fields_of(flat)
        expected = expected or fields
        if fields != expected:
            raise ValueError(
                f"`examples[{number}]` must be like those before, {expected}; got {fields}."
            )
        held.append(flat)
        count += layout.num_rows(flat)
        if count >= size:
            whole = {name: np.concatenate([each[name] for each in held]) for name in flat}
            for first in range(0, count - size + 1, size):
                yield {name: array[first : first + size] for name, array in whole.items()}
            held = [{name: array[count - count % size :] for name, array in whole.items()}]
            count %= size
    if count:
        yield {name: np.concatenate([each[name] for each in held]) for name in held[0]}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
