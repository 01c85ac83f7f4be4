"""Guidance by two models, and where to guide."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import numerics
from jaxdiff.guidance.rules import Rule, linear
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, PyTree


def classifier_free(
    conditional: Denoiser, unconditional: Denoiser, scale: Any, *, rule: Rule = linear
) -> Denoiser:
    """Make a denoiser of two: away from the unconditional one, past the conditional one.

    Args:
        conditional: what is wanted.
        unconditional: what is not; any weaker model (see :func:`autoguidance`).
        scale: shape () or (B,), may be traced. 1 is the conditional model: where that is known,
            the unconditional one is not evaluated; nor, by the linear rule, is the conditional
            one at a known 0.
        rule: how the two are combined.

    Returns:
        The denoiser; it computes in the dtype of x_t.

    Source: Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, whose w is scale - 1.
    """
    only = _only_one(scale, rule)
    if only is not None:
        return conditional if only == "conditional" else unconditional

    def denoise(x_t: Array, t: Array) -> Array:
        pair = [model(x_t, t).astype(x_t.dtype) for model in (conditional, unconditional)]
        return _combine(rule, pair, scale)

    return denoise


def autoguidance(
    denoise: Denoiser, weaker: Denoiser, scale: Any, *, rule: Rule = linear
) -> Denoiser:
    """Make a denoiser guided away from a weaker model of the same data.

    Args:
        denoise: the model.
        weaker: a smaller or less trained one, under the same conditioning.
        scale: as in :func:`classifier_free`.
        rule: as there.

    Source: Karras et al. 2024 (arXiv:2406.02507), eq. 3.
    """
    return classifier_free(denoise, weaker, scale, rule=rule)


def classifier_free_batched(
    denoise_cond: Callable[[Array, Array, PyTree], Array],
    cond: PyTree,
    null: PyTree,
    scale: Any,
    *,
    rule: Rule = linear,
) -> Denoiser:
    """Make a classifier-free guided denoiser that costs one call, of 2B rows.

    Args:
        denoise_cond: (x_t (B, ...), t, cond) -> x0_hat, with rows that do not see each other.
        cond: conditioning, a pytree of (B, ...).
        null: what stands for none: the same structure, its leaves broadcasting to those of `cond`.
        scale: as in :func:`classifier_free`; at a known 1, or 0, the call has B rows.
        rule: as there.

    Raises:
        ValueError: if `null` does not fit `cond`, or, when called, `cond` the batch.
    """
    wanted, got = str(jax.tree.structure(cond)), str(jax.tree.structure(null))
    if wanted != got:
        raise ValueError(f"`null` must have the structure of `cond`, {wanted}; got {got}.")

    def spread(empty: Any, full: Any) -> Array:
        if jnp.broadcast_shapes(jnp.shape(empty), jnp.shape(full)) != jnp.shape(full):
            raise ValueError(
                f"`null` must broadcast to `cond`, {jnp.shape(full)}; got {jnp.shape(empty)}."
            )
        return jnp.broadcast_to(jnp.asarray(empty, jnp.asarray(full).dtype), jnp.shape(full))

    nulls = jax.tree.map(spread, null, cond)
    only = _only_one(scale, rule)

    def denoise(x_t: Array, t: Array) -> Array:
        for leaf in jax.tree.leaves(cond):
            if jnp.shape(leaf)[:1] != x_t.shape[:1]:
                raise ValueError(
                    f"`cond` must hold one entry an example, {x_t.shape[0]}; "
                    f"got a leaf of shape {jnp.shape(leaf)}."
                )
        if only is not None:
            return denoise_cond(x_t, t, cond if only == "conditional" else nulls)
        twice = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, nulls)
        times = t if jnp.ndim(t) == 0 else jnp.concatenate([t, t])
        both = denoise_cond(jnp.concatenate([x_t, x_t]), times, twice).astype(x_t.dtype)
        return _combine(rule, jnp.split(both, 2), scale)

    return denoise


def interval(
    process: Process, guided: Denoiser, conditional: Denoiser, low: Any, high: Any
) -> Denoiser:
    """Make a denoiser that is guided at some noise levels only: low <= sigma / alpha <= high.

    For one time only one of the two runs (`lax.cond`); for a time an example both do.

    Args:
        process: gives the noise level; infinite where alpha = 0.
        guided: used within the interval.
        conditional: used outside it.
        low: the lowest level, at least 0.
        high: the highest one; may be infinite.

    Raises:
        ValueError: if known levels are negative, NaN or `low` > `high`.

    Source: Kynkaanniemi et al. 2024 (arXiv:2404.07724), eq. 5.
    """
    known_low, known_high = numerics.concrete(low), numerics.concrete(high)
    for name, known in (("low", known_low), ("high", known_high)):
        if known is not None and not known >= 0:
            raise ValueError(f"`{name}` must be at least 0; got {known}.")
    if known_low is not None and known_high is not None and known_low > known_high:
        raise ValueError(f"`low` must be at most `high`; got low={low} > high={high}.")

    def denoise(x_t: Array, t: Array) -> Array:
        t = numerics.as_time(t).astype(x_t.dtype)
        alpha = process.alpha(t)
        signal = jnp.where(alpha > 0, alpha, 1.0)
        level = jnp.where(alpha > 0, process.sigma(t) / signal, jnp.inf)
        inside = (level >= low) & (level <= high)
        models = [
            lambda x, t, model=model: model(x, t).astype(x.dtype) for model in (guided, conditional)
        ]
        if t.ndim == 0:
            return jax.lax.cond(inside, *models, x_t, t)
        within, without = (model(x_t, t) for model in models)
        return jnp.where(numerics.expand_like(inside, x_t), within, without)

    return denoise


def _only_one(scale: Any, rule: Rule) -> str | None:
    """Return which model alone is needed, where the scale is known."""
    known = numerics.concrete(scale)
    if known is not None and np.all(known == 1.0):
        return "conditional"
    if known is not None and np.all(known == 0.0) and rule is linear:
        return "unconditional"
    return None


def _combine(rule: Rule, pair: Sequence[Array], scale: Any) -> Array:
    conditional, unconditional = pair
    scale = numerics.expand_like(jnp.asarray(scale, conditional.dtype), conditional)
    return rule(conditional, unconditional, scale).astype(conditional.dtype)
