"""A tree of arrays as orbax stores it: leaves known by their names, whatever holds them.

Orbax returns a NamedTuple as a dict, and a dict with its keys sorted as strings. Leaves are
therefore matched by name, never by position.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.training.quiet import quiet_orbax


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


def key_kinds(tree: Any) -> dict[str, str]:
    """Name the leaves that are typed random keys, and of which kind each is.

    Raises:
        ValueError: if a kind has no name that JAX knows.
    """
    kinds = {}
    for name, leaf in named_leaves(tree).items():
        if _is_key(leaf):
            kind = str(jax.random.key_impl(leaf))
            try:
                jax.eval_shape(functools.partial(jax.random.key, impl=kind), 0)
            except ValueError:
                raise ValueError(
                    f"`state` has a key of a kind without a name in {name}: {kind}. Save its "
                    "`jax.random.key_data`."
                ) from None
            kinds[name] = kind
    return kinds


def snapshot(leaf: Any) -> Any:
    """Copy to the host what this process holds in full; orbax gathers what it does not.

    An array on the host has no sharding that another machine would have to match, and outlives the
    donation of its source.

    Args:
        leaf: an array or a number.

    Returns:
        A NumPy array of its own memory, of a key its data; or `leaf` where other processes hold a
        part of it.
    """
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return leaf
    return np.array(leaf)


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def read(folder: Path, target: Any, keys: Mapping[str, str]) -> Any:
    """Read one orbax checkpoint into the structure of `target`, or as it was written.

    Args:
        folder: an orbax checkpoint.
        target: a tree of arrays or `jax.ShapeDtypeStruct`, or None.
        keys: the leaves that are typed keys, and of which kind.

    Returns:
        `target` with the leaves of the checkpoint, or nested dicts and lists of NumPy arrays; keys
        are keys again.

    Raises:
        CheckpointError: if the names, shapes or dtypes of the leaves differ.
    """
    import orbax.checkpoint as ocp

    wanted = None if target is None else named_leaves(target)

    def restore_args(path: tuple[Any, ...], _: Any) -> Any:
        leaf = None if wanted is None else wanted[_name(path)]
        sharding = getattr(leaf, "sharding", None)
        if leaf is None or sharding is None or _is_key(leaf) or _is_of_this_process_alone(sharding):
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    with quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(folder).item_metadata.tree
        if wanted is not None:
            _require_fit(folder, wanted, named_leaves(saved), keys)
        arguments = jax.tree_util.tree_map_with_path(restore_args, saved)
        state = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments))
    if wanted is None:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _as_key(leaf, keys.get(_name(path))), state
        )
    values = {name: _as_key(leaf, keys.get(name)) for name, leaf in named_leaves(state).items()}
    leaves = [_placed(values[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _is_of_this_process_alone(sharding: Any) -> bool:
    """Tell placements that orbax, which restores with all processes together, does not know."""
    return jax.process_count() > 1 and sharding.is_fully_addressable


def _as_key(data: Any, kind: str | None) -> Any:
    return data if kind is None else jax.random.wrap_key_data(data, impl=kind)


def _placed(value: Any, leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and (_is_key(leaf) or _is_of_this_process_alone(sharding)):
        return jax.device_put(value, sharding)
    return value


def _require_fit(
    folder: Path, wanted: dict[str, Any], saved: dict[str, Any], keys: Mapping[str, str]
) -> None:
    absent = "no such leaf"
    wanted_types = {name: _type(leaf) for name, leaf in wanted.items()}
    saved_types = {name: _type(leaf, keys.get(name)) for name, leaf in saved.items()}
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


def _type(leaf: Any, kind: str | None = None) -> str:
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    if kind is not None:
        data = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        leaf = jax.eval_shape(functools.partial(jax.random.wrap_key_data, impl=kind), data)
    name = str(leaf.dtype) if _is_key(leaf) else np.dtype(leaf.dtype).name
    return f"{name}{list(leaf.shape)}"
