"""Images of a trained model: image i is a function of (parameters, key, i, label i)."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from experiments.common.methods import METHODS, make_grid
from experiments.images.model import Recipe
from jaxdiff import denoisers, generation
from jaxdiff.typing import Denoiser, Key, PyTree


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
        path), the path being None unless asked for: see `jaxdiff.generation`.
    """
    process, method = model.process, METHODS[sampler_name]
    ts = make_grid(grid, process, num_steps, method.start(process, model.model.needs_signal))

    def denoiser_of(params: PyTree, cond: PyTree) -> Denoiser:
        return denoisers.conditioned(model.denoiser(params), cond)

    draw = generation.make_generator(
        model.model,
        method.factory,
        ts,
        shape,
        denoiser_of=denoiser_of,
        by_row=method.by_row,
        devices=devices,
    )

    def generate(
        params: PyTree, key: Key, labels: np.ndarray, keep_path: bool = False, first: int = 0
    ) -> tuple[np.ndarray, np.ndarray | None]:
        cond = model.cond(labels)
        rows = len(labels) if cond is None else cond
        if keep_path:
            return draw(params, key, rows, first, keep_path=True)
        return draw(params, key, rows, first), None

    return generate
