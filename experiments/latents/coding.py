"""Many pictures encoded, decoded and compared, spread over devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import flows
from experiments.latents.autoencoder import Autoencoder
from experiments.latents.sources import NUM_LEVELS
from jaxdiff import data, metrics
from jaxdiff.devices import map_rows
from jaxdiff.typing import Array, PyTree

AT_ONCE = 256
"""Pictures that are encoded or decoded in one call, of few the next power of two."""


def make_coders(
    autoencoder: Autoencoder, devices: Sequence[jax.Device] | None = None
) -> tuple[Callable[..., Any], Callable[..., np.ndarray]]:
    """Return functions of many pictures, spread over devices, each compiled once.

    Args:
        autoencoder: of the pictures.
        devices: by default all of this process.

    Returns:
        ``encode(params, levels (N, H, W, C))`` -> (mean, std), of latents of the pictures at the
        centres of their levels; and ``decode(params, z (N, h, w, c))`` -> levels, uint8. Both
        NumPy.
    """

    def encoded(params: PyTree, levels: Array) -> tuple[Array, Array]:
        x = data.centers(levels, NUM_LEVELS, dtype=jnp.float32)
        return autoencoder.encode(params, x)

    return _chunked(map_rows(encoded, devices=devices)), _chunked(
        map_rows(autoencoder.levels, devices=devices)
    )


def _chunked(mapped: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function of rows with so many at once; the last call is filled up."""

    def call(params: PyTree, rows: np.ndarray) -> Any:
        size = min(AT_ONCE, 1 << (len(rows) - 1).bit_length())
        filled = np.minimum(np.arange(-(-len(rows) // size) * size), len(rows) - 1)
        parts = [
            jax.tree.map(np.asarray, mapped(params, rows[chosen]))
            for chosen in flows.chunks(filled, size)
        ]
        return jax.tree.map(lambda *each: np.concatenate(each)[: len(rows)], *parts)

    return call


def quality(
    autoencoder: Autoencoder,
    params: PyTree,
    levels: np.ndarray,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[dict[str, float], np.ndarray]:
    """Return how near decoded means are to the pictures, by name, and the levels decoded.

    Args:
        autoencoder: of the pictures.
        params: its parameters.
        levels: the pictures, uint8 (N, H, W, C).
        devices: by default all of this process.
    """
    encode, decode = make_coders(autoencoder, devices)
    decoded = decode(params, encode(params, levels)[0])
    x, y = (2.0 * each.astype(np.float32) / 255.0 - 1.0 for each in (levels, decoded))
    ratios = np.asarray(metrics.psnr(x, y))
    likeness = np.asarray(metrics.ssim(x, y))
    return {
        "psnr": float(ratios.mean()),
        "psnr_stderr": float(ratios.std(ddof=1) / len(ratios) ** 0.5),
        "ssim": float(likeness.mean()),
    }, decoded
