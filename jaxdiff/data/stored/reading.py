"""A store opened: its index judged, its files mapped into memory, its rows by number."""

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdiff import files
from jaxdiff.data.errors import NotPreparedError, UnreadableError
from jaxdiff.data.stored import layout
from jaxdiff.data.stored.layout import FORMAT, INDEX, Flat
from jaxdiff.data.stored.sharded import how_far
from jaxdiff.typing import PyTree

if TYPE_CHECKING:
    from jaxdiff.files.stores import StorePath


def open(folder: str | os.PathLike[str], *, verify: bool = True) -> "Stored":  # noqa: A001
    """Open a store.

    Args:
        folder: as given to `write` or `write_shards`.
        verify: compare each file with its checksum, which reads all of them once. Their sizes are
            compared in any case. Of an object store each file is copied to the local disk once, to
            a place without a name, which the system frees with the last reader.

    Raises:
        NotPreparedError: a FileNotFoundError and ValueError, if there is none, or it is not
            finished, saying how far it is.
        UnreadableError: a ValueError naming the file, if one is missing, altered or cut short.
    """
    place = layout.place(folder)
    if not (place / INDEX).is_file():
        if (found := how_far(place)) is not None:
            raise NotPreparedError(
                f"`folder` {place} is not finished: {found}; run the command again that makes it."
            )
        raise NotPreparedError(
            f"`folder` must be a store that data.stored made; {place} has no {INDEX}."
        )
    try:
        index = json.loads((place / INDEX).read_bytes())
        if index["format"] != FORMAT:
            raise UnreadableError(
                f"{place / INDEX} has format {index['format']!r}; this version reads {FORMAT}."
            )
        fields = {n: layout.Field.of(said) for n, said in index["fields"].items()}
        if files.is_stored(place):
            shards = [_copied(place, fields, shard, verify) for shard in index["shards"]]
        else:
            shards = [_mapped(place, fields, shard, verify) for shard in index["shards"]]
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
        return layout.nested(found)


def _mapped(
    place: files.Path, fields: dict[str, layout.Field], shard: dict[str, Any], verify: bool
) -> Flat:
    """Map the files of a shard.

    Raises:
        UnreadableError: if one is not what was written.
    """
    found = {}
    for name, field in fields.items():
        said = shard["files"][name]
        if wrong := layout.damage(place / said["name"], said, verify=verify):
            raise UnreadableError(f"{wrong} Write the store again.")
        found[name] = field.map(place / said["name"], int(shard["num_examples"]))
    return found


def _copied(
    place: "StorePath", fields: dict[str, layout.Field], shard: dict[str, Any], verify: bool
) -> Flat:
    """Map copies of the files of a shard, whose names go at once: the maps hold what is in them.

    Raises:
        UnreadableError: if one is not what was written.
    """
    with files.scratch() as scratch:
        for name in fields:
            file = shard["files"][name]["name"]
            try:
                (place / file).get(scratch / file)
            except OSError as error:
                raise UnreadableError(f"{place / file} cannot be read: {error}.") from error
        try:
            return _mapped(scratch, fields, shard, verify)
        except UnreadableError as error:
            raise UnreadableError(str(error).replace(f"{scratch}", f"{place}")) from error
