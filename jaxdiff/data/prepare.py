r"""Where data meet the loss: one function turns what was read into what is noised.

    loss_fn = data.prepared(losses.denoising(...), data.dequantized_images(256, flip=True))

A recipe's ``prepare(frozen, key, batch) -> {"x0", "cond", ...}`` runs inside the compiled update,
on every step anew: it dequantises, flips, encodes, embeds. ``frozen`` is what it needs and nobody
trains, such as the parameters of an encoder; ``key`` is its own, apart from the loss's.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxdiff import checks, rows
from jaxdiff.data.scaling import bin_width, dequantize
from jaxdiff.numerics import expand_like
from jaxdiff.typing import Array, Batch, Key, LossFn, PyTree

Prepare: TypeAlias = Callable[[PyTree, Key, Batch], Mapping[str, Any]]
"""``(frozen, key, batch as it was read) -> {"x0": (B, ...), "cond": optional, ...}``."""

FORM = "(frozen, key, batch) -> {'x0': ..., 'cond': ...}"


def prepared(loss_fn: LossFn, prepare: Prepare, *, frozen: PyTree = ()) -> LossFn:
    """Make a loss of what is read of a loss of what is noised.

    The key is split in two: the first is `prepare`'s, the second the loss's. Both know the rows
    that the key knows. ``batch["rows"]``, where it is given, numbers the rows of both.

    Args:
        loss_fn: ``(params, key, {"x0", "cond", ...}) -> (loss (B,), metrics)``.
        prepare: ``(frozen, key, batch) -> {"x0", "cond", ...}``; traced. What it draws by
            `jaxdiff.rows`, with ``rows.of_batch(batch, B)`` where rows may be given, is the same
            in every parallel mode.
        frozen: handed to `prepare`; gradients do not flow into it.

    Returns:
        ``(params, key, batch) -> (loss (B,), metrics)``. Traced, it raises TypeError or ValueError
        if `prepare` gives no "x0".

    Raises:
        TypeError: if `loss_fn` or `prepare` is no such function.
    """
    checks.function("loss_fn", loss_fn, "(params, key, batch) -> (loss (B,), metrics)", takes=3)
    checks.function("prepare", prepare, FORM, takes=3)

    def of_read(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        key_data, key_loss = rows.split(key)
        made = prepare(jax.lax.stop_gradient(frozen), key_data, batch)
        if not isinstance(made, Mapping):
            raise TypeError(f'`prepare` must return {{"x0": ...}}; got {checks.shown(made)}.')
        if "x0" not in made:
            raise ValueError(f'`prepare` must return "x0"; got {", ".join(made) or "nothing"}.')
        numbered = {"rows": batch["rows"]} if "rows" in batch else {}
        return loss_fn(params, key_loss, {**numbered, **made})

    return of_read


def dequantized_images(num_levels: int, *, flip: bool = False) -> Prepare:
    """Make the `prepare` of images: levels become points of their bins, labels conditioning.

    It maps {"image": integers (B, H, W, C), "label": (B,) or absent} to {"x0": floats in (-1, 1),
    "cond": the labels or absent}; other fields pass through. Row i depends on (key, i) only.

    Args:
        num_levels: L, 2..256.
        flip: also mirror each image, left to right, with probability 1/2.

    Raises:
        TypeError: if `flip` is no truth value.
        ValueError: if `num_levels` is outside 2..256; traced, if a batch has no "image".
    """
    bin_width(num_levels)
    if not isinstance(flip, bool):
        raise TypeError(f"`flip` must be true or false; got {flip!r}.")

    def prepare(frozen: PyTree, key: Key, batch: Batch) -> dict[str, Any]:
        del frozen
        if "image" not in batch:
            raise ValueError(f'`batch` must hold "image"; got {", ".join(batch) or "nothing"}.')
        made = {name: value for name, value in batch.items() if name not in ("image", "label")}
        levels = jnp.asarray(batch["image"])
        given = rows.of_batch(batch, levels.shape[0])
        numbers = levels.shape[0] if given is None else given
        if flip:
            key, key_flip = rows.split(key)
            levels = _flipped(rows.keys(key_flip, numbers), levels)
        made["x0"] = dequantize(rows.keys(key, numbers), levels, num_levels)
        return made | ({"cond": batch["label"]} if "label" in batch else {})

    return prepare


def _flipped(row_keys: Key, images: Array) -> Array:
    mirrored = jax.vmap(jax.random.bernoulli)(row_keys)
    return jnp.where(expand_like(mirrored, images), jnp.flip(images, axis=2), images)
