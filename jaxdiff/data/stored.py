"""Arrays stored on disk as records: latents, embeddings, or whatever is costly to make twice.

    stored.write(folder, ({"latent": encode(x), "text": tokens(x)} for x in batches_of_images))
    latents = stored.open(folder)

A store is a folder of .npy files, one a field and shard, that NumPy alone reads, and `index.json`,
which says what they hold, with the SHA-256 of each. It is written beside its place and renamed into
it when it is complete: there is a whole store or none. Reading maps the files into memory.
"""

import builtins
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff import checks, files
from jaxdiff.data.errors import NotPreparedError, UnreadableError
from jaxdiff.data.records import checked_fields
from jaxdiff.typing import PyTree

INDEX = "index.json"
FORMAT = 1
SHARD_SIZE = 8192

Flat = dict[str, np.ndarray]
"""Arrays by their path in the tree, its names joined by slashes."""


def write(
    folder: str | os.PathLike[str],
    examples: Iterable[Mapping[str, PyTree]],
    *,
    shard_size: int = SHARD_SIZE,
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Write a store, whole or not at all.

    If the process is killed, nothing is at `folder`; a hidden folder that it leaves beside it may
    be deleted.

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
    final = Path(os.path.abspath(os.path.expanduser(os.fspath(folder))))
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(f"`folder` {final} holds something already. Take another.")
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        fields: dict[str, Any] | None = None
        shards: list[dict[str, Any]] = []
        for shard in _shards(examples, shard_size):
            fields = _fields(shard)
            shards.append(_write_shard(scratch, len(shards), shard))
        if fields is None:
            raise ValueError("`examples` must give one at least; it gave none.")
        index = {"format": FORMAT, "num_examples": sum(each["num_examples"] for each in shards)}
        index |= {"fields": fields, "attributes": json.loads(text), "shards": shards}
        files.write_text(scratch / INDEX, json.dumps(index, indent=1) + "\n")
        os.chmod(scratch, 0o777 & ~_umask())
        os.replace(scratch, final)
        files.flush(final.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def open(folder: str | os.PathLike[str], *, verify: bool = True) -> "Stored":  # noqa: A001
    """Open a store.

    Args:
        folder: as given to `write`.
        verify: compare each file with its checksum, which reads all of them once. Their sizes are
            compared in any case.

    Raises:
        NotPreparedError: a FileNotFoundError and ValueError, if there is none.
        UnreadableError: a ValueError naming the file, if one is missing, altered or cut short.
    """
    place = Path(os.path.abspath(os.path.expanduser(os.fspath(folder))))
    if not (place / INDEX).is_file():
        raise NotPreparedError(
            f"`folder` must be a store that stored.write made; {place} has no {INDEX}."
        )
    try:
        index = json.loads((place / INDEX).read_bytes())
        if index["format"] != FORMAT:
            raise UnreadableError(
                f"{place / INDEX} has format {index['format']!r}; this version reads {FORMAT}."
            )
        fields = {name: _Field.of(said) for name, said in index["fields"].items()}
        shards: list[Flat] = []
        for shard in index["shards"]:
            count = int(shard["num_examples"])
            shards.append({n: fields[n].map(place, shard["files"][n], count) for n in fields})
            for said in shard["files"].values() if verify else ():
                _verify(place / said["name"], said["sha256"])
        counts = [int(shard["num_examples"]) for shard in index["shards"]]
        if not shards or not fields or sum(counts) != index["num_examples"]:
            raise UnreadableError(f"{place / INDEX} does not add up.")
        return Stored(str(place), shards, counts, index["attributes"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeError) as error:
        raise UnreadableError(f"{place / INDEX} is no index of a store: {error!r}.") from error


class Stored:
    """A store, as records. Made by `open`.

    Attributes:
        title: its folder, as messages name it.
        attributes: what `write` was given.
    """

    in_memory = False

    def __init__(
        self, title: str, shards: list[Flat], counts: list[int], attributes: dict[str, Any]
    ) -> None:
        self.title, self.attributes = title, attributes
        self._shards, self._ends = shards, np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, indices: np.ndarray) -> dict[str, PyTree]:
        """Return examples `indices` (B,), each field (B, ...), read from the disk.

        Raises:
            IndexError: if an index is outside 0..N-1.
        """
        indices = np.asarray(indices)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"`indices` must lie in 0..{len(self) - 1}.")
        of = np.searchsorted(self._ends, indices, side="right")
        within = indices - np.concatenate([[0], self._ends])[of]
        found: Flat = {}
        for name, like in self._shards[0].items():
            found[name] = np.empty((len(indices), *like.shape[1:]), like.dtype)
            for number in np.unique(of):
                mine = of == number
                found[name][mine] = self._shards[number][name][within[mine]]
        return _nested(found)


# --- Writing --------------------------------------------------------------------------------


def _shards(examples: Iterable[Mapping[str, PyTree]], size: int) -> Iterator[Flat]:
    """Cut what comes several rows at a time into shards of `size` rows; the last may be less."""
    held: list[Flat] = []
    count, expected = 0, None
    for number, given in enumerate(examples):
        flat = _flat(checked_fields(f"examples[{number}]", given))
        rows = {array.shape[0] if array.ndim else None for array in flat.values()}
        if len(rows) != 1 or None in rows:
            raise ValueError(f"`examples[{number}]` must have one leading axis of rows.")
        expected = expected or _fields(flat)
        if _fields(flat) != expected:
            raise ValueError(
                f"`examples[{number}]` must be like those before, {expected}; got {_fields(flat)}."
            )
        held.append(flat)
        count += next(iter(flat.values())).shape[0]
        if count >= size:
            whole = {name: np.concatenate([each[name] for each in held]) for name in flat}
            for first in range(0, count - size + 1, size):
                yield {name: array[first : first + size] for name, array in whole.items()}
            held = [{name: array[count - count % size :] for name, array in whole.items()}]
            count %= size
    if count:
        yield {name: np.concatenate([each[name] for each in held]) for name in held[0]}


def _fields(flat: Flat) -> dict[str, Any]:
    return {
        name: {"dtype": array.dtype.name, "shape": list(array.shape[1:])}
        for name, array in flat.items()
    }


def _write_shard(folder: Path, number: int, flat: Flat) -> dict[str, Any]:
    """Write the arrays of a shard; return what the index says of them."""
    said = {}
    for position, (name, array) in enumerate(flat.items()):
        file = folder / f"{number:05d}-{position}.npy"
        with builtins.open(file, "wb") as opened:
            np.save(opened, array, allow_pickle=False)
            opened.flush()
            os.fsync(opened.fileno())
        said[name] = {"name": file.name, "bytes": file.stat().st_size, "sha256": _digest(file)}
    return {"num_examples": next(iter(flat.values())).shape[0], "files": said}


def _flat(fields: Mapping[str, PyTree], before: str = "") -> Flat:
    """Return a nest of dictionaries as arrays by path.

    Raises:
        TypeError: if there is anything else in it, or a name that is no text or has a slash.
    """
    flat: Flat = {}
    for name, value in fields.items():
        if not isinstance(name, str) or "/" in name:
            raise TypeError(f"names of fields must be text without a slash; got {name!r}.")
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name}/")
        elif isinstance(value, np.ndarray):
            flat[before + name] = value
        else:
            raise TypeError(f"`{before}{name}` must be an array or a dictionary of arrays.")
    return flat


def _nested(flat: Flat) -> dict[str, PyTree]:
    nested: dict[str, PyTree] = {}
    for path, array in flat.items():
        *above, name = path.split("/")
        place = nested
        for each in above:
            place = place.setdefault(each, {})
        place[name] = array
    return nested


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- Reading --------------------------------------------------------------------------------


class _Field:
    """The dtype and shape that an index says of a field."""

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "_Field":
        """Return what an index says."""
        return cls(np.dtype(said["dtype"]), tuple(said["shape"]))

    def map(self, folder: Path, said: Mapping[str, Any], count: int) -> np.ndarray:
        """Map a file into memory, if it is there and as long as it was.

        Raises:
            UnreadableError: if it is not.
        """
        path = folder / said["name"]
        try:
            if path.stat().st_size != said["bytes"]:
                raise UnreadableError(
                    f"{path} is damaged: it has {path.stat().st_size} bytes, {said['bytes']} were "
                    "written. Write the store again."
                )
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            if isinstance(error, UnreadableError):
                raise
            raise UnreadableError(f"{path} cannot be read: {error}.") from error
        if array.dtype.kind == "V":  # how NumPy's files call what it does not know, as bfloat16
            array = array.view(self.dtype)
        if array.dtype != self.dtype or array.shape != (count, *self.shape):
            raise UnreadableError(
                f"{path} is damaged: it holds {array.dtype} {array.shape}, not {self.dtype} "
                f"{(count, *self.shape)}."
            )
        return array


def _verify(path: Path, digest: str) -> None:
    with contextlib.suppress(OSError):
        if _digest(path) == digest:
            return
    raise UnreadableError(
        f"{path} is damaged: it does not match its checksum. Write the store again."
    )


def _digest(path: Path) -> str:
    with builtins.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
