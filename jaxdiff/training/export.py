"""Parameters alone, in one file that NumPy reads without this library or JAX."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import files
from jaxdiff.training.stored_tree import CheckpointError, key_kinds, named_leaves
from jaxdiff.typing import PyTree

CONFIG = "__config__"
DTYPES = "__dtypes__"


def export_params(
    path: str | os.PathLike[str], params: PyTree, config: Mapping[str, Any] | None = None
) -> None:
    """Write parameters as an `.npz` file: one array a leaf, named by its path with dots.

    Dtypes that NumPy lacks, such as bfloat16, are there as raw bytes, and named in `__dtypes__`.

    Args:
        path: the file, or an object's URL, written whole or not at all; it must end in `.npz`.
        params: a nest of dictionaries with string keys, without dots in them.
        config: what JSON can hold, kept beside them as `__config__`.

    Raises:
        ValueError: if a key is not a string or holds a dot, a leaf has one of the two names above
            or holds a random key, or `path` ends otherwise.
        OSError: if the file cannot be written.
    """
    path = files.to_path(path)
    if path.suffix != ".npz":
        raise ValueError(f"`path` must end in .npz; got {path}.")
    for tree_path, _ in jax.tree.leaves_with_path(params):
        dotted = [each.key for each in tree_path if "." in str(getattr(each, "key", ""))]
        if dotted:  # the file's names could not tell them from nests
            raise ValueError(f"`params` must have no key with a dot in it; got {dotted[0]!r}.")
    named = named_leaves(params)
    for name in (CONFIG, DTYPES):
        if name in named:
            raise ValueError(f"`params` must not have a leaf of the name {name}. Rename it.")
    keys = key_kinds(params)
    arrays: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    for name, leaf in named.items():
        if name in keys:
            raise ValueError(f"`params` must hold numbers; {name} is a random key.")
        array = np.asarray(leaf)
        if array.dtype.kind == "V":
            dtypes[name] = array.dtype.name
            array = array.view(f"V{array.dtype.itemsize}")
        arrays[name] = array
    arrays[CONFIG] = np.asarray(json.dumps(dict(config or {})))
    if dtypes:
        arrays[DTYPES] = np.asarray(json.dumps(dtypes))
    files.write_arrays(path, arrays)


def import_params(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `export_params` wrote.

    Returns:
        The parameters as nested dictionaries of NumPy arrays, and the config.

    Raises:
        CheckpointError: if the file is damaged or not of this kind.
        OSError: if it cannot be opened.
    """
    with files.to_path(path).open("rb") as raw:
        try:
            return _read(raw)
        except Exception as error:  # what NumPy and zipfile make of damage is of any kind
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path} holds no exported parameters: {reason}.") from error


def _read(raw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(raw, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    config = dict(json.loads(str(arrays.pop(CONFIG))))
    dtypes = json.loads(str(arrays.pop(DTYPES))) if DTYPES in arrays else {}
    params: dict[str, Any] = {}
    for name, array in arrays.items():
        if array.dtype.kind == "V":  # two bytes without a name: bfloat16 of earlier versions
            known = "bfloat16" if array.dtype.itemsize == 2 else None
            array = array.view(jnp.dtype(dtypes.get(name, known)))
        *parents, last = name.split(".")
        branch = params
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = array
    return params, config
