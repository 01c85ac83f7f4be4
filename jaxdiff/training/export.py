"""Parameters alone, in one file that NumPy reads without this library or JAX."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.training.stored_tree import CheckpointError, named_leaves
from jaxdiff.typing import PyTree

CONFIG = "__config__"


def export_params(
    path: str | os.PathLike[str], params: PyTree, config: Mapping[str, Any] | None = None
) -> None:
    """Write parameters as an `.npz` file: one array a leaf, named by its path with dots.

    Args:
        path: the file, written whole or not at all; it must end in `.npz`.
        params: a nest of dictionaries with string keys.
        config: what JSON can hold, kept beside them as `__config__`.

    Raises:
        ValueError: if a key is not a string, or `path` ends otherwise.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"`path` must end in .npz; got {path}.")
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    arrays[CONFIG] = np.asarray(json.dumps(dict(config or {})))
    staged = path.with_name(f".{path.name}")
    try:
        np.savez(staged, **arrays)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def import_params(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `export_params` wrote.

    Returns:
        The parameters as nested dictionaries of NumPy arrays, and the config.

    Raises:
        CheckpointError: if the file is damaged or not of this kind.
        OSError: if it cannot be read.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        config = json.loads(str(arrays.pop(CONFIG)))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} holds no exported parameters: {error}.") from error
    params: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split(".")
        branch = params
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = array
    return params, config
