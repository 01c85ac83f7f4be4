"""Records: what has a length and gives its rows by index, whatever it is read from."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxdiff import checks
from jaxdiff.typing import PyTree


@runtime_checkable
class Records(Protocol):
    """Examples with random access: images, signals, point clouds, latents, embeddings.

    `batches` reads any. Two attributes, which records may have, tell it more: ``title``, their name
    in messages, and ``in_memory``, whether rows are gathered from memory: those of others are read
    ahead by threads, in which `rows` must then be safe to call.
    """

    def __len__(self) -> int:
        """Return N, the number of examples."""

    def rows(self, indices: np.ndarray, /) -> dict[str, PyTree]:
        """Return examples `indices`, int64 (B,) in 0..N-1, by field: trees of (B, ...) arrays."""


class Arrays:
    """Arrays in memory, as records. Made by `from_arrays`."""

    in_memory = True

    def __init__(self, fields: dict[str, PyTree], num_examples: int, title: str) -> None:
        self._fields, self._num_examples, self.title = fields, num_examples, title

    def __len__(self) -> int:
        return self._num_examples

    def __repr__(self) -> str:
        shapes = jax.tree.map(lambda leaf: (str(leaf.dtype), leaf.shape[1:]), self._fields)
        return f"Arrays({self.title!r}, {self._num_examples} x {shapes})"

    def rows(self, indices: np.ndarray) -> dict[str, PyTree]:
        """Return examples `indices` (B,), each field a tree of (B, ...) arrays."""
        gathered: dict[str, PyTree] = jax.tree.map(lambda leaf: leaf[indices], self._fields)
        return gathered


def from_arrays(arrays: Mapping[str, PyTree], *, title: str = "arrays") -> Arrays:
    """Make records of arrays that are in memory: floats or integers, of any shape.

        clouds = data.from_arrays({"points": points, "label": labels})   # (N, 1024, 3) and (N,)

    Args:
        arrays: by field, an array (N, ...) or a tree of them; not copied.
        title: shown in messages.

    Returns:
        Records of N examples with these fields.

    Raises:
        TypeError: if `arrays` is no mapping of names, or a leaf holds no numbers.
        ValueError: if there is no array or no example, or the arrays differ in N.
    """
    fields = checked_fields("arrays", arrays)
    leaves = jax.tree.leaves_with_path(fields)
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else None for _, leaf in leaves}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            "`arrays` must have one leading axis of N examples, N at least 1; "
            f"got {_shapes(leaves) or 'none'}."
        )
    return Arrays(jax.tree.map(_read_only, fields), int(sizes.pop() or 0), title)


def checked_fields(name: str, fields: Any) -> dict[str, PyTree]:
    """Return fields by name, their leaves as NumPy arrays.

    Raises:
        TypeError: if they are no mapping of names to trees of numbers.
    """
    if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
        raise TypeError(f"`{name}` must be arrays by name; got {checks.shown(fields)}.")
    made: dict[str, PyTree] = jax.tree.map(np.asarray, dict(fields))
    for path, leaf in jax.tree.leaves_with_path(made):
        if leaf.dtype.kind in "OSUMm":
            raise TypeError(
                f"`{name}{jax.tree_util.keystr(path)}` must hold numbers; got {leaf.dtype}."
            )
    return made


def title_of(records: Records) -> str:
    """Return how messages name records."""
    return str(getattr(records, "title", "the data set"))


def check_rows(records: Records) -> None:
    """Read the first example; refuse records that do not give what `Records` says.

    Raises:
        TypeError: if they are no records, or their rows no arrays by name.
        ValueError: if the arrays have no row for each index.
    """
    if not isinstance(records, Records):
        raise TypeError(
            "`records` must have a length and rows(indices) -> {name: (B, ...)}; data.from_arrays "
            f"makes such of arrays; got {checks.shown(records)}."
        )
    if len(records) == 0:
        raise ValueError(f"`records` must hold an example at least; {title_of(records)} has none.")
    fields = checked_fields("records.rows", records.rows(np.arange(1)))
    leaves = jax.tree.leaves_with_path(fields)
    if not leaves or any(np.shape(leaf)[:1] != (1,) for _, leaf in leaves):
        raise ValueError(
            "`records.rows` must give one row for each index; of 1 index it gave "
            f"{_shapes(leaves) or 'nothing'}."
        )


def _shapes(leaves: Any) -> str:
    return ", ".join(f"{jax.tree_util.keystr(path)} {np.shape(leaf)}" for path, leaf in leaves)


def _read_only(leaf: np.ndarray) -> np.ndarray:
    view = leaf.view()
    view.flags.writeable = False
    return view
