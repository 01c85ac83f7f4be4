"""Images of a trained model: image i is a function of (parameters, key, i, label i)."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.methods import METHODS, make_grid
from experiments.images.model import Recipe
from jaxdiff import sample
from jaxdiff.training import parallel
from jaxdiff.typing import Array, Key, PyTree

CHUNK = 256
"""Images that a device samples in one call; more are sampled in several, to the same result."""


def make_generator(
    model: Recipe,
    shape: tuple[int, ...],
    sampler_name: str,
    num_steps: int,
    *,
    grid: str = "uniform",
    devices: Sequence[jax.Device] | None = None,
) -> Callable[..., tuple[np.ndarray, np.ndarray | None]]:
    """Return a function that draws images of given labels, spread over devices.

    Args:
        model: of images.
        shape: of one, (H, W, C).
        sampler_name: see `experiments.common.methods`.
        num_steps: from noise to data.
        grid: which times, as `methods.make_grid` names them.
        devices: by default all of this process.

    Returns:
        ``generate(params, key, labels (N,), keep_path=False, first=0)`` -> (x0 (N, H, W, C),
        path), the path being x_T and the states after each step, (T + 1, N, H, W, C), or None
        unless asked for. The images have the numbers `first`, `first` + 1, ...; image i depends on
        (params, key, i, label i) only.
    """
    process, method = model.process, METHODS[sampler_name]
    ts = make_grid(grid, process, num_steps, method.start(process, model.model.needs_signal))

    def draw(
        shared: tuple[PyTree, Key], labels: Array, index: Array, *, keep_path: bool
    ) -> tuple[Array, Array | None]:
        params, key = shared
        key_start, key_path = jax.random.split(key)
        rows = jax.vmap(jax.random.fold_in, (None, 0))(key_start, index)
        x_T = process.prior_sample(rows, (len(index), *shape), t=ts[0])  # noqa: N806
        sampler = method.make(process, model.denoiser(params), cond=model.cond(labels))
        if not keep_path:
            return sample(key_path, sampler, x_T, ts, index=index), None
        x0, path = sample(key_path, sampler, x_T, ts, index=index, collect=sampler.value)
        return x0, jnp.moveaxis(jnp.concatenate([x_T[None], path]), 0, 1)

    count = len(jax.local_devices() if devices is None else devices)
    spread = {
        keep_path: parallel.map_rows(partial(draw, keep_path=keep_path), devices=devices)
        for keep_path in (False, True)
    }

    def generate(
        params: PyTree, key: Key, labels: np.ndarray, keep_path: bool = False, first: int = 0
    ) -> tuple[np.ndarray, np.ndarray | None]:
        index = first + np.arange(len(labels))
        size = count * CHUNK
        parts = [
            spread[keep_path]((params, key), labels[i : i + size], index[i : i + size])
            for i in range(0, len(labels), size)
        ]
        x0 = np.concatenate([part[0] for part in parts])
        if not keep_path:
            return x0, None
        return x0, np.moveaxis(np.concatenate([part[1] for part in parts]), 1, 0)

    return generate
