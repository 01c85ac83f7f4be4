"""Many samples of a trained model, over devices: sample i is a function of (parameters, key, i).

How many there are, in how many calls and on how many devices they are drawn changes none of them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import checks
from jaxdiff.denoisers import Model
from jaxdiff.devices import map_rows
from jaxdiff.rows import one_key
from jaxdiff.samplers import Sampler, sample
from jaxdiff.typing import Array, Denoiser, Key, PyTree

__all__ = [
    "AT_ONCE",
    "Generate",
    "make_generator",
]

AT_ONCE = 256
"""Samples that a device draws in one call; more are drawn in several, to the same result."""

Generate = Callable[..., Any]
"""``generate(params, key, rows, first=0, keep_path=False)``; see :func:`make_generator`."""


def make_generator(
    model: Model,
    make_sampler: Callable[..., Sampler],
    ts: Array,
    shape: Sequence[int],
    *,
    denoiser_of: Callable[[PyTree, PyTree], Denoiser] | None = None,
    by_row: bool = False,
    devices: Sequence[jax.Device] | None = None,
    at_once: int = AT_ONCE,
) -> Generate:
    """Return a function that draws samples of a model, spread over this process's devices.

    Args:
        model: what was trained.
        make_sampler: (process, denoise) -> the sampler, such as `samplers.heun`.
        ts: its times, from noise to data.
        shape: of one sample, without a batch axis.
        denoiser_of: (params, cond) -> the denoiser, where it is not the model's own: guidance, say.
            The parameters are whatever `generate` is given, a guidance scale among them.
        by_row: whether the sampler solves each row by itself and takes the conditioning as
            ``cond=``, such as `samplers.adaptive`; its denoiser is then that of no conditioning.
        devices: by default all of this process.
        at_once: how many a device draws in one call.

    Returns:
        ``generate(params, key, rows, first=0, keep_path=False)`` -> x0 (N, ...), a NumPy array.
        `rows` is N, or the conditioning of N rows, a pytree of arrays (N, ...); they have the
        numbers `first`, `first` + 1, ..., and sample i depends on (params, key, i, its
        conditioning) only. With `keep_path` it gives (x0, path), the path being x_T and the states
        after each step, (len(ts), N, ...). A new number of rows compiles anew, up to `at_once` a
        device; new parameters, keys and conditioning do not. It raises TypeError and ValueError
        for a key that is none, no rows, or conditioning whose leaves differ in their rows.

    Raises:
        TypeError: if `model` is no Model, `make_sampler` or `denoiser_of` no function, or a size
            no whole number.
        ValueError: if a size is below 1.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"`model` must be a Model(apply, process, prediction); got {checks.shown(model)}."
        )
    checks.function("make_sampler", make_sampler, "(process, denoise) -> Sampler")
    if denoiser_of is None:
        denoiser_of = model.denoiser
    checks.function("denoiser_of", denoiser_of, "(params, cond) -> denoiser", takes=2)
    size = tuple(checks.count(f"shape[{i}]", each) for i, each in enumerate(shape))
    draw = partial(_draw, model, make_sampler, denoiser_of, by_row, jnp.asarray(ts), size)
    mapped = {
        keep_path: map_rows(partial(draw, keep_path), devices=devices)
        for keep_path in (False, True)
    }
    count = len(jax.local_devices() if devices is None else devices)
    count *= checks.count("at_once", at_once)

    def generate(
        params: PyTree, key: Key, rows: PyTree, first: int = 0, keep_path: bool = False
    ) -> Any:
        shared = params, one_key(key)
        num_rows, cond = _judged(rows)
        index = checks.count("first", first, 0) + np.arange(num_rows)
        parts = []
        for i in range(0, num_rows, count):
            chosen = slice(i, i + count)
            of_part = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], cond)
            parts.append(mapped[keep_path](shared, of_part, index[chosen]))
        x0 = np.concatenate([part[0] for part in parts])
        if not keep_path:
            return x0
        return x0, np.moveaxis(np.concatenate([part[1] for part in parts]), 1, 0)

    return generate


def _draw(
    model: Model,
    make_sampler: Callable[..., Sampler],
    denoiser_of: Callable[[PyTree, PyTree], Denoiser],
    by_row: bool,
    ts: Array,
    shape: tuple[int, ...],
    keep_path: bool,
    shared: tuple[PyTree, Key],
    cond: PyTree,
    index: Array,
) -> tuple[Array, Array | None]:
    """Draw the rows of some numbers; of the path, rows lead."""
    (params, key), process = shared, model.process
    key_start, key_path = jax.random.split(key)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key_start, index)
    x_T = process.prior_sample(row_keys, (len(index), *shape), t=ts[0])  # noqa: N806
    if by_row:
        sampler = make_sampler(process, denoiser_of(params, None), cond=cond)
    else:
        sampler = make_sampler(process, denoiser_of(params, cond))
    if not keep_path:
        return sample(key_path, sampler, x_T, ts, index=index), None
    x0, path = sample(key_path, sampler, x_T, ts, index=index, collect=sampler.value)
    return x0, jnp.moveaxis(jnp.concatenate([x_T[None], path]), 0, 1)


def _judged(given: PyTree) -> tuple[int, PyTree]:
    """Return the number of rows, and their conditioning if there is any."""
    leaves = jax.tree.leaves(given)
    if not leaves or all(np.ndim(leaf) == 0 for leaf in leaves):
        number = given if len(leaves) == 1 else None
        return checks.count("rows", number), None
    num_rows = np.shape(leaves[0])[0] if np.ndim(leaves[0]) else 0
    checks.conditioning(given, checks.count("rows", num_rows))
    return num_rows, given
