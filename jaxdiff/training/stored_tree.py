"""A tree of arrays as orbax stores it: leaves known by their names, whatever holds them.

Orbax returns a NamedTuple as a dict, and a dict with its keys sorted as strings. Leaves are
therefore matched by name, never by position.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or read back, or does not fit."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Name each leaf by its path, as orbax does: `params.block_00.w`, `opt_state.0.count`.

    Args:
        tree: any pytree whose dictionaries have string keys.

    Returns:
        The leaves by name, in the order of the tree.

    Raises:
        ValueError: if a key is not a string, or two leaves get the same name.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = _name(path)
        for entry in path:
            if isinstance(entry, jax.tree_util.DictKey) and not isinstance(entry.key, str):
                raise ValueError(
                    f"`state` must have string keys, or their order changes on the way back; "
                    f"got the key {entry.key!r} in {name}."
                )
        if name in named:
            raise ValueError(f"`state` has two leaves of the name {name}: a key holds a dot.")
        named[name] = leaf
    return named


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def snapshot(leaf: Any) -> Any:
    """Copy to the host what this process holds in full; orbax gathers what it does not.

    An array on the host has no sharding that another machine would have to match, and outlives the
    donation of its source.

    Args:
        leaf: an array or a number.

    Returns:
        A NumPy array of its own memory, or `leaf` where other processes hold a part of it.
    """
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return leaf
    return np.array(leaf)


def read(folder: Path, target: Any) -> Any:
    """Read one orbax checkpoint into the structure of `target`, or as it was written.

    Args:
        folder: an orbax checkpoint.
        target: a tree of arrays or `jax.ShapeDtypeStruct`, or None.

    Returns:
        `target` with the leaves of the checkpoint, or nested dicts and lists of NumPy arrays.

    Raises:
        CheckpointError: if the names, shapes or dtypes of the leaves differ.
    """
    import orbax.checkpoint as ocp

    wanted = None if target is None else named_leaves(target)

    def restore_args(path: tuple[Any, ...], _: Any) -> Any:
        leaf = None if wanted is None else wanted[_name(path)]
        sharding = getattr(leaf, "sharding", None)
        if leaf is None or sharding is None or _is_of_this_process_alone(sharding):
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(folder).item_metadata.tree
        if wanted is not None:
            _require_fit(folder, wanted, named_leaves(saved))
        arguments = jax.tree_util.tree_map_with_path(restore_args, saved)
        state = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments))
    if wanted is None:
        return state
    values = named_leaves(state)
    leaves = [_placed(values[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _is_of_this_process_alone(sharding: Any) -> bool:
    """Tell placements that orbax, which restores with all processes together, does not know."""
    return jax.process_count() > 1 and sharding.is_fully_addressable


def _placed(value: Any, leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and _is_of_this_process_alone(sharding):
        return jax.device_put(value, sharding)
    return value


def _require_fit(folder: Path, wanted: dict[str, Any], saved: dict[str, Any]) -> None:
    absent = "no such leaf"
    wanted_types = {name: _type(leaf) for name, leaf in wanted.items()}
    saved_types = {name: _type(leaf) for name, leaf in saved.items()}
    misfits = [
        f"{name}: wanted {wanted_types.get(name, absent)}, got {saved_types.get(name, absent)}"
        for name in wanted_types | saved_types
        if wanted_types.get(name) != saved_types.get(name)
    ]
    if misfits:
        more = f"; and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise CheckpointError(
            f"{folder} does not fit `target`: {'; '.join(misfits[:5])}{more}. "
            "Restore with the network and optimizer it was saved with."
        )


def _type(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
