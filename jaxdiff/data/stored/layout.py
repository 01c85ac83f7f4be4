"""The files of a store: arrays by path, the files of one shard, and what is said of them."""

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff import files
from jaxdiff.data.errors import UnreadableError
from jaxdiff.data.records import checked_fields
from jaxdiff.typing import PyTree

INDEX = "index.json"
FORMAT = 1
SHARD_SIZE = 8192
ARRAYS = re.compile(r"\d{5,}-\d+\.npy")
"""Names of the files of shards."""

Flat = dict[str, np.ndarray]
"""Arrays by their path in the tree, its names joined by slashes."""


def place(folder: str | os.PathLike[str]) -> files.Path:
    """Return where a folder is, on a disk or in an object store."""
    text = os.fspath(folder)
    return files.to_path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def flat(name: str, fields: Any) -> Flat:
    """Return rows, a nest of dictionaries of arrays (n, ...), as arrays by path.

    Raises:
        TypeError: if there is anything else in it, or a name that is no text or has a slash.
        ValueError: if they have not one leading axis of rows.
    """
    found = _flat(checked_fields(name, fields))
    rows = {array.shape[0] if array.ndim else None for array in found.values()}
    if len(rows) != 1 or None in rows:
        raise ValueError(f"`{name}` must have one leading axis of rows.")
    return found


def num_rows(shard: Flat) -> int:
    """Return how many rows arrays have."""
    return int(next(iter(shard.values())).shape[0])


def fields_of(shard: Flat) -> dict[str, Any]:
    """Return what the index says of fields: the dtype and the shape of a row."""
    return {
        name: {"dtype": array.dtype.name, "shape": list(array.shape[1:])}
        for name, array in shard.items()
    }


def nested(shard: Flat) -> dict[str, PyTree]:
    """Return arrays by path as the nest of dictionaries that they were."""
    made: dict[str, PyTree] = {}
    for path, array in shard.items():
        *above, name = path.split("/")
        within = made
        for each in above:
            within = within.setdefault(each, {})
        within[name] = array
    return made


def write_arrays(folder: files.Path, number: int, shard: Flat) -> dict[str, Any]:
    """Write the arrays of a shard, each file whole; return what the index says of them."""
    said = {}
    for position, (name, array) in enumerate(shard.items()):
        path = folder / f"{number:05d}-{position}.npy"
        with files.whole(path) as file:
            np.save(file, array, allow_pickle=False)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            # Of what was written here, whoever else may write the same file.
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        said[name] = {"name": path.name, "bytes": size, "sha256": digest}
    return {"num_examples": num_rows(shard), "files": said}


def index_of(
    fields: Mapping[str, Any], attributes: Mapping[str, Any], shards: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the index of shards as `write_arrays` said them."""
    return {
        "format": FORMAT,
        "num_examples": sum(each["num_examples"] for each in shards),
        "fields": dict(fields),
        "attributes": dict(attributes),
        "shards": shards,
    }


def damage(
    path: files.Path,
    said: Mapping[str, Any],
    *,
    verify: bool = True,
    sizes: Mapping[str, int] | None = None,
) -> str | None:
    """Return what is wrong with a file, as far as its size and checksum tell; None if nothing is.

    Args:
        path: of the file.
        said: its "bytes" and "sha256".
        verify: whether to read it for its checksum.
        sizes: of the files there, by name, as `sizes_in` gives them.
    """
    try:
        if sizes is None:
            size = path.stat().st_size
        elif path.name in sizes:
            size = sizes[path.name]
        else:
            return f"{path} cannot be read: there is no such object."
        if size != said["bytes"]:
            return f"{path} is damaged: it has {size} bytes, {said['bytes']} were written."
        if verify:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != said["sha256"]:
                return f"{path} is damaged: it does not match its checksum."
    except OSError as error:
        return f"{path} cannot be read: {error}."
    return None


def sizes_in(folder: files.Path) -> dict[str, int] | None:
    """Return the sizes of what is in a folder of an object store, which asks once; None on a disk.

    Raises:
        OSError: if the store cannot be asked.
    """
    return files.sizes(folder) if files.is_stored(folder) else None


class Field:
    """The dtype and shape that an index says of a field."""

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Field":
        """Return what an index says."""
        return cls(np.dtype(said["dtype"]), tuple(said["shape"]))

    def map(self, path: files.Path, count: int) -> np.ndarray:
        """Map a file of `count` rows into memory.

        Raises:
            UnreadableError: if it holds anything else.
        """
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UnreadableError(f"{path} cannot be read: {error}.") from error
        if array.dtype.kind == "V":  # how NumPy's files call what it does not know, as bfloat16
            array = array.view(self.dtype)
        if array.dtype != self.dtype or array.shape != (count, *self.shape):
            raise UnreadableError(
                f"{path} is damaged: it holds {array.dtype} {array.shape}, not {self.dtype} "
                f"{(count, *self.shape)}."
            )
        return array


def _flat(fields: Mapping[str, PyTree], before: str = "") -> Flat:
    found: Flat = {}
    for name, value in fields.items():
        if not isinstance(name, str) or "/" in name:
            raise TypeError(f"names of fields must be text without a slash; got {name!r}.")
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}/")
        elif isinstance(value, np.ndarray):
            found[before + name] = value
        else:
            raise TypeError(f"`{before}{name}` must be an array or a dictionary of arrays.")
    return found
