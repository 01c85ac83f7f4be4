"""Guidance by the difference of two denoisers, where it acts, and what keeps it in range."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import checks, numerics
from jaxdiff.denoisers.networks import ConditionedDenoiser
from jaxdiff.guidance.made import Evaluate, Guided, check_scale, divide, expand, in_dtype
from jaxdiff.guidance.rules import Rule, linear
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, PyTree


def classifier_free(
    conditional: Denoiser, unconditional: Denoiser, scale: Any, *, rule: Rule = linear
) -> Denoiser:
    """Guide by the difference between two denoisers.

    Args:
        conditional: the denoiser to lean towards.
        unconditional: the one to lean away from.
        scale: the w above, 1 more than the paper's; shape () or (B,), may be traced. Known to be
            1 it leaves `conditional` alone to be evaluated; known to be 0, with the linear rule,
            `unconditional`.
        rule: how the two combine: `linear`, `rescaled(phi)`, `projected(eta)` or one's own.

    Raises:
        ValueError: if `scale` has more than one axis, or is known and not finite.

    Source: Ho & Salimans 2022 (arXiv:2207.12598).
    """
    given = {"conditional": conditional, "unconditional": unconditional}
    return _by_difference(given, scale, rule)


def autoguidance(
    denoise: Denoiser, weaker: Denoiser, scale: Any, *, rule: Rule = linear
) -> Denoiser:
    """Guide a denoiser away from a weaker one of the same data and condition.

    The same as :func:`classifier_free`, whose arguments and errors these are; `weaker` is a
    smaller model, say, or one trained for a shorter time.

    Source: Karras et al. 2024 (arXiv:2406.02507).
    """
    return _by_difference({"denoise": denoise, "weaker": weaker}, scale, rule)


def _by_difference(given: Mapping[str, Denoiser], scale: Any, rule: Rule) -> Guided:
    """Guide by the difference of the first of two denoisers, by their names, to the second."""
    towards, away = (checks.judged(name, fn, checks.DENOISER) for name, fn in given.items())
    parts = _needed(towards, away, scale, rule)

    def combine(evaluate: Evaluate, x_t: Array, t: Array) -> Array:
        return _combine(rule, [evaluate(part, x_t, t) for part in parts], scale, x_t)

    return Guided(combine, parts, linear=rule is linear or len(parts) == 1)


def classifier_free_batched(
    denoise_cond: Callable[[Array, Array, PyTree], Array],
    cond: PyTree,
    null: PyTree,
    scale: Any,
    *,
    rule: Rule = linear,
) -> Denoiser:
    """Make :func:`classifier_free` of one conditional denoiser, called once with 2 B rows.

    Args:
        denoise_cond: (x_t, t, cond) -> x0_hat; the B rows with `cond` come first. With the linear
            rule its `v`, if it has one, makes that of the result.
        cond: pytree of (B, ...).
        null: what stands for no condition; the same structure, leaves broadcast to `cond`'s.
        scale: as in :func:`classifier_free`, as is `rule`; known to be 1 or 0, it leaves B rows.
        rule: how the two combine.

    Raises:
        ValueError: if `null` does not fit `cond`, or `scale` has more than one axis or is known
            and not finite; when called, if `cond` has not the rows of x_t.
    """
    form = "(x_t, t, cond) -> x0_hat, in the shape of x_t"
    checks.function("denoise_cond", denoise_cond, form, takes=3)

    def spread(c: Any, n: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(n, jnp.result_type(c, n)), jnp.shape(c))

    try:
        null = jax.tree.map(spread, cond, null)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`null` must have the leaves of `cond`; got {null}: {error}") from error
    parts = _needed(cond, null, scale, rule)

    def combine(evaluate: Evaluate, x_t: Array, t: Array) -> Array:
        for leaf in jax.tree.leaves(cond):
            if jnp.shape(leaf)[:1] != x_t.shape[:1]:
                raise ValueError(f"`cond` must hold {x_t.shape[0]} rows; got {jnp.shape(leaf)}.")
        num, given = len(parts), jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        times = t if jnp.ndim(t) == 0 else jnp.concatenate([t] * num)
        rows = jnp.concatenate([x_t] * num)
        batched = checks.Judged("denoise_cond", ConditionedDenoiser(denoise_cond, given))
        return _combine(rule, jnp.split(evaluate(batched, rows, times), num), scale, x_t)

    judged = checks.Judged("denoise_cond", denoise_cond)
    return Guided(combine, (judged,), linear=rule is linear or len(parts) == 1)


def interval(
    process: Process, guided: Denoiser, conditional: Denoiser, low: Any, high: Any
) -> Denoiser:
    """Guide only where low <= sigma / alpha <= high.

    At one time only one of the two denoisers runs. With a time an example both do, unless all
    is known and the examples agree.
    `low` and `high`, shape (), may be traced; at alpha = 0 the level is infinite. Raises ValueError
    if a known end is negative or NaN, or both are known and low > high.

    Source: Kynkaanniemi et al. 2024 (arXiv:2404.07724).
    """
    checks.process(process)
    bottom, top = (
        numerics.concrete(checks.number(name, value, 0.0, infinite=True))
        for name, value in (("low", low), ("high", high))
    )
    parts = (
        checks.judged("guided", guided, checks.DENOISER),
        checks.judged("conditional", conditional, checks.DENOISER),
    )
    if bottom is not None and top is not None and bottom > top:
        raise ValueError(f"`low` must be at most `high`; got {low} and {high}.")

    def choose(evaluate: Evaluate, x_t: Array, t: Array) -> Array:
        def within(t: Array) -> Array:
            t = in_dtype(t, x_t)
            level = divide(process.sigma(t), process.alpha(t), jnp.inf)
            return (low <= level) & (level <= high)

        def run(part: checks.Judged) -> Array:
            return evaluate(part, x_t, t).astype(x_t.dtype)

        known = numerics.known_value(within, t)
        if known is not None and (known.all() or not known.any()):
            return run(parts[0] if known.all() else parts[1])
        inside = numerics.expand_like(within(t), x_t)
        if inside.ndim == 0:
            return jax.lax.cond(inside, lambda: run(parts[0]), lambda: run(parts[1]))
        return jnp.where(inside, run(parts[0]), run(parts[1]))

    return Guided(choose, parts, linear=True)


def dynamic_threshold(denoise: Denoiser, percentile: Any = 0.995, bound: Any = 1.0) -> Denoiser:
    """Bring an x0_hat that large scales push out of the data's range back into it.

    It is clipped to [-s, s] and multiplied by bound / s, with s the percentile, a share in [0, 1],
    of its absolute values, example by example, or `bound` where that is larger. Raises ValueError
    if a known `percentile` is outside [0, 1], or a known `bound` not positive and finite.

    Source: Saharia et al. 2022 (arXiv:2205.11487).
    """
    checks.number("percentile", percentile, 0.0, 1.0)
    checks.number("bound", bound, 0.0, above=True)
    judged = checks.judged("denoise", denoise, checks.DENOISER)

    def thresholded(evaluate: Evaluate, x_t: Array, t: Array) -> Array:
        x0_hat = evaluate(judged, x_t, t)
        sizes = jnp.abs(x0_hat).reshape(x0_hat.shape[0], -1)
        s = jnp.maximum(jnp.quantile(sizes, numerics.as_time(percentile), axis=1), bound)
        s = numerics.expand_like(s, x0_hat)
        return (jnp.clip(x0_hat, -s, s) * (bound / s)).astype(x_t.dtype)

    return Guided(thresholded, (judged,))


def _needed(conditional: Any, unconditional: Any, scale: Any, rule: Rule) -> tuple[Any, ...]:
    """Return both, or the one that a known scale leaves."""
    known = check_scale(scale)
    if known is not None and (known == 1).all():
        return (conditional,)
    if known is not None and rule is linear and not known.any():
        return (unconditional,)
    return conditional, unconditional


def _combine(rule: Rule, estimates: Sequence[Array], scale: Any, x_t: Array) -> Array:
    scale = expand(scale, x_t)
    x0_hat = estimates[0] if len(estimates) == 1 else rule(estimates[0], estimates[1], scale)
    return x0_hat.astype(x_t.dtype)
