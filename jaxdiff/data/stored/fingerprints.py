"""What parameters are told by, so that what they made can be tagged with them."""

import hashlib

import jax
import numpy as np

from jaxdiff import checks
from jaxdiff.typing import PyTree


def fingerprint(*trees: PyTree) -> str:
    """Return a digest of trees of arrays, such as parameters, by which others are told.

    It is the SHA-256 of their paths, dtypes, shapes and bytes, in 64 hexadecimal digits: the same
    wherever and on whatever device they lie. The kind of a container counts where its paths differ.

    Args:
        trees: of arrays that this process can read; several are told from one of all of them.

    Raises:
        TypeError: if a leaf is no array of numbers.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(trees):
        at = jax.tree_util.keystr(path)
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or leaf.dtype == object:
            raise TypeError(f"`trees{at}` must be an array of numbers; got {checks.shown(leaf)}.")
        digest.update(f"{at} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
