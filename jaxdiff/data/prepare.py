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
from jaxdiff.numerics import as_float, expand_like
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


def latents(*, scale: float = 1.0, shift: float = 0.0, deviations: bool = True) -> Prepare:
    """Make the `prepare` of latents that an autoencoder left as means and deviations.

    It maps {"mean": m (B, ...), "deviation": s like it, "text": (B, ...), a tree of such or absent}
    to {"x0": scale (m + s eps - shift), "cond": the text or absent}, eps being standard normal and
    drawn at every step anew; other fields pass through. Row i depends on (key, i) only. What is
    stored in less than float32 is computed in it.

    Args:
        scale: what makes the latents about as large as the noise: one over their deviation.
        shift: their mean.
        deviations: whether to draw about the mean; otherwise the mean itself is taken, and
            "deviation" neither needed nor passed on.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if `scale` is not above 0 or `shift` not finite; traced, if a batch has no
            "mean" or no "deviation" of its shape.

    Source: Rombach et al. 2022 (arXiv:2112.10752), appendix on autoencoders: latents are drawn and
    divided by the deviation of all of their components.
    """
    checks.number("scale", scale, 0.0, above=True)
    checks.number("shift", shift)
    if not isinstance(deviations, bool):
        raise TypeError(f"`deviations` must be true or false; got {deviations!r}.")
    needed = ("mean", "deviation") if deviations else ("mean",)

    def prepare(frozen: PyTree, key: Key, batch: Batch) -> dict[str, Any]:
        del frozen
        if missing := [name for name in needed if name not in batch]:
            raise ValueError(
                f'`batch` must hold "{missing[0]}"; got {", ".join(batch) or "nothing"}.'
            )
        x0 = as_float(batch["mean"], 'batch["mean"]')
        if deviations:
            deviation = as_float(batch["deviation"], 'batch["deviation"]')
            if deviation.shape != x0.shape:
                raise ValueError(
                    f'batch["deviation"] must have the shape of batch["mean"], {x0.shape}; got '
                    f"{deviation.shape}."
                )
            given = rows.of_batch(batch, x0.shape[0])
            numbers = x0.shape[0] if given is None else given
            x0 = x0 + deviation.astype(x0.dtype) * rows.normal(rows.keys(key, numbers), x0)
        used = ("mean", "deviation", "text")
        made = {name: value for name, value in batch.items() if name not in used}
        made["x0"] = jnp.asarray(scale, x0.dtype) * (x0 - jnp.asarray(shift, x0.dtype))
        return made | ({"cond": batch["text"]} if "text" in batch else {})

    return prepare


def _flipped(row_keys: Key, images: Array) -> Array:
    mirrored = jax.vmap(jax.random.bernoulli)(row_keys)
    return jnp.where(expand_like(mirrored, images), jnp.flip(images, axis=2), images)
