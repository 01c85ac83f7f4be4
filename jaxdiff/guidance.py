r"""Guidance: from denoisers to a denoiser that leans towards a condition.

As x0_hat = (x_t + variance score) / alpha, a change of the score by g is one of x0_hat by
variance / alpha g. So all guidance is written as denoiser -> denoiser: it composes, and every
sampler takes the result. With c and u the estimates with and without the condition and w the
scale, Bayes' rule log p(y | x_t) = log p(x_t | y) - log p(x_t) + const makes

    u + w (c - u)                                            `classifier_free`, rule `linear`
    u + w variance / alpha grad log p(y | x_t)               `classifier`

the same where all models are exact. w = 1 is the conditional distribution itself.

Guided denoisers compute in float32 at least and return the dtype of x_t. When called they raise
ValueError if a denoiser does not return the shape of x_t, or `scale` is neither () nor (B,).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import numerics
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, PyTree

Rule: TypeAlias = Callable[[Array, Array, Array], Array]
"""(conditional x0, unconditional x0, scale () or (B, 1, ...)) -> x0; conditional at scale 1."""


def linear(conditional: Array, unconditional: Array, scale: Array) -> Array:
    """Return unconditional + scale (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)


def rescaled(phi: Any) -> Rule:
    """Make the rule that gives what the linear rule makes the contrast of the conditional.

    phi x std(conditional) / std(x) + (1 - phi) x, with x from the linear rule and std over all
    axes of an example; here of x0_hat, in the paper of what its network predicts. Raises
    ValueError if `phi`, which may be traced, is known and outside [0, 1].

    Source: Lin et al. 2024 (arXiv:2305.08891), eqs. 15 and 16.
    """
    _check("phi", phi, lambda v: 0 <= v <= 1, "one number in [0, 1]")

    def rule(conditional: Array, unconditional: Array, scale: Array) -> Array:
        def std(x0: Array) -> Array:
            return numerics.sqrt(jnp.var(x0, axis=tuple(range(1, x0.ndim)), keepdims=True))

        guided = linear(conditional, unconditional, scale)
        return guided * (phi * _divide(std(conditional), std(guided), 1.0) + (1.0 - phi))

    return rule


def projected(eta: Any = 0.0, max_norm: Any = None) -> Rule:
    """Make the rule of adaptive projected guidance (APG), without its momentum.

    With d = conditional - unconditional, shortened to an L2 norm of `max_norm` an example and
    split along and across the conditional: conditional + (scale - 1) (d_across + eta d_along).
    In the paper d also has a momentum over steps; a denoiser has no memory to keep it in.

    Without `max_norm` eta = 1 is the linear rule. Both may be traced; raises ValueError if `eta`
    is known and not finite, or `max_norm` is known and not positive.

    Source: Sadat et al. 2024 (arXiv:2410.02416).
    """
    _check("eta", eta, np.isfinite, "one finite number")
    if max_norm is not None:
        _check("max_norm", max_norm, lambda v: v > 0, "one positive number, or None")

    def rule(conditional: Array, unconditional: Array, scale: Array) -> Array:
        def dot(a: Array, b: Array) -> Array:
            return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)

        d = conditional - unconditional
        if max_norm is not None:
            d = d * jnp.minimum(1.0, _divide(max_norm, numerics.sqrt(dot(d, d)), 1.0))
        along = _divide(dot(d, conditional), dot(conditional, conditional), 0.0) * conditional
        return conditional + (scale - 1.0) * (d - along + eta * along)

    return rule


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
    parts = _needed(conditional, unconditional, scale, rule)

    def denoise(x_t: Array, t: Array) -> Array:
        return _combine(rule, [_evaluate(part, x_t, t) for part in parts], scale, x_t)

    return _mark(denoise, *parts)


def autoguidance(
    denoise: Denoiser, weaker: Denoiser, scale: Any, *, rule: Rule = linear
) -> Denoiser:
    """Guide a denoiser away from a weaker one of the same data and condition.

    The same as :func:`classifier_free`, whose arguments and errors these are; `weaker` is a
    smaller model, say, or one trained for a shorter time.

    Source: Karras et al. 2024 (arXiv:2406.02507).
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
    """Make :func:`classifier_free` of one conditional denoiser, called once with 2 B rows.

    Args:
        denoise_cond: (x_t, t, cond) -> x0_hat; the B rows with `cond` come first.
        cond: pytree of (B, ...).
        null: what stands for no condition; the same structure, leaves broadcast to `cond`'s.
        scale: as in :func:`classifier_free`, as is `rule`; known to be 1 or 0, it leaves B rows.
        rule: how the two combine.

    Raises:
        ValueError: if `null` does not fit `cond`, or `scale` has more than one axis or is known
            and not finite; when called, if `cond` has not the rows of x_t.
    """

    def spread(c: Any, n: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(n, jnp.result_type(c, n)), jnp.shape(c))

    try:
        null = jax.tree.map(spread, cond, null)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`null` must have the leaves of `cond`; got {null}: {error}") from error
    parts = _needed(cond, null, scale, rule)

    def denoise(x_t: Array, t: Array) -> Array:
        for leaf in jax.tree.leaves(cond):
            if jnp.shape(leaf)[:1] != x_t.shape[:1]:
                raise ValueError(f"`cond` must hold {x_t.shape[0]} rows; got {jnp.shape(leaf)}.")
        num, given = len(parts), jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        times = t if jnp.ndim(t) == 0 else jnp.concatenate([t] * num)
        rows = jnp.concatenate([x_t] * num)
        both = _evaluate(lambda x, t: denoise_cond(x, t, given), rows, times)
        return _combine(rule, jnp.split(both, num), scale, x_t)

    return _mark(denoise, denoise_cond)


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
    bottom = _check("low", low, lambda v: v >= 0, "one number, at least 0")
    top = _check("high", high, lambda v: v >= 0, "one number, at least 0")
    if bottom is not None and top is not None and bottom > top:
        raise ValueError(f"`low` must be at most `high`; got {low} and {high}.")

    def denoise(x_t: Array, t: Array) -> Array:
        def within(t: Array) -> Array:
            t = _in_dtype(t, x_t)
            level = _divide(process.sigma(t), process.alpha(t), jnp.inf)
            return (low <= level) & (level <= high)

        def run(part: Denoiser) -> Array:
            return _evaluate(part, x_t, t).astype(x_t.dtype)

        known = numerics.known_value(within, t)
        if known is not None and (known.all() or not known.any()):
            return run(guided if known.all() else conditional)
        inside = numerics.expand_like(within(t), x_t)
        if inside.ndim == 0:
            return jax.lax.cond(inside, lambda: run(guided), lambda: run(conditional))
        return jnp.where(inside, run(guided), run(conditional))

    return _mark(denoise, guided, conditional)


def classifier(
    process: Process, denoise: Denoiser, log_prob: Callable[[Array, Array], Array], scale: Any
) -> Denoiser:
    """Guide by a classifier of noisy data: x0_hat + scale variance / alpha grad log_prob.

    x0_hat does not change where alpha is 0.

    Args:
        process: the forward process.
        denoise: the denoiser without the condition.
        log_prob: (x_t (B, ...), t () or (B,)) -> log p(y | x_t), (B,), row by row.
        scale: shape () or (B,), may be traced. Known to be 0, it returns `denoise` itself.

    Raises:
        ValueError: if `scale` is not () or (B,), or known and not finite, or `log_prob` not (B,).

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233); Song et al. 2021 (arXiv:2011.13456).
    """
    known = _check_scale(scale)
    if known is not None and not known.any():
        return denoise

    def guided(x_t: Array, t: Array) -> Array:
        def total(x: Array) -> Array:
            value = log_prob(x, t)
            if value.shape != x.shape[:1]:
                raise ValueError(f"`log_prob` must return {x.shape[:1]}; got {value.shape}.")
            return value.sum()

        time = numerics.expand_like(_in_dtype(t, x_t), x_t)
        gain = _expand(scale, x_t) * _divide(process.variance(time), process.alpha(time), 0.0)
        return (_evaluate(denoise, x_t, t) + gain * jax.grad(total)(x_t)).astype(x_t.dtype)

    return _mark(guided, denoise)


def dynamic_threshold(denoise: Denoiser, percentile: Any = 0.995, bound: Any = 1.0) -> Denoiser:
    """Bring an x0_hat that large scales push out of the data's range back into it.

    It is clipped to [-s, s] and multiplied by bound / s, with s the percentile, a share in [0, 1],
    of its absolute values, example by example, or `bound` where that is larger. Raises ValueError
    if a known `percentile` is outside [0, 1], or a known `bound` not positive and finite.

    Source: Saharia et al. 2022 (arXiv:2205.11487).
    """
    _check("percentile", percentile, lambda v: 0 <= v <= 1, "one number in [0, 1]")
    _check("bound", bound, lambda v: 0 < v < np.inf, "one positive finite number")

    def thresholded(x_t: Array, t: Array) -> Array:
        x0_hat = _evaluate(denoise, x_t, t)
        sizes = jnp.abs(x0_hat).reshape(x0_hat.shape[0], -1)
        s = jnp.maximum(jnp.quantile(sizes, percentile, axis=1), bound)
        s = numerics.expand_like(s, x0_hat)
        return (jnp.clip(x0_hat, -s, s) * (bound / s)).astype(x_t.dtype)

    return _mark(thresholded, denoise)


def dps(
    process: Process,
    denoise: Denoiser,
    operator: Callable[[Array], Array],
    y: Array,
    *,
    noise_std: Any = 0.0,
    data_std: Any = 1.0,
    scale: Any = 1.0,
) -> Denoiser:
    """Guide towards data of which y = operator(x0) + noise_std n was measured.

    Takes p(y | x_t) for N(operator(x0_hat), (noise_std^2 + r^2) I), with
    r^2 = variance d^2 / (variance + alpha^2 d^2), d = `data_std`: exact for data N(mu, d^2 I) and
    operators with A A^T = I on what they measure, as masks. Costs one evaluation and one
    vector-Jacobian product. x0_hat does not change where alpha = 0 or sigma = 0.

    Args:
        process: the forward process.
        denoise: the denoiser without the measurement.
        operator: x0 (B, ...) -> (B, ...), linear, row by row; for inpainting x0 -> mask x0.
        y: the measurements, in the shape that `operator` returns.
        noise_std: standard deviation of their noise, shape (); may be traced.
        data_std: that of the data, shape (); may be traced. 0 is the likelihood of DPS, in
            which x0_hat stands for x0.
        scale: shape () or (B,), may be traced; multiplies the change.

    Raises:
        ValueError: if a known number is not finite, a known standard deviation negative, or both
            0, or if `y` or `scale` has another shape.

    Source: Chung et al. 2023 (arXiv:2209.14687); for r, Song et al. 2023, Pseudoinverse-guided
    diffusion models for inverse problems, ICLR.
    """
    stds = {"noise_std": noise_std, "data_std": data_std}
    wanted = "one finite number, at least 0"
    if [_check(name, v, lambda v: 0 <= v < np.inf, wanted) for name, v in stds.items()] == [0, 0]:
        raise ValueError(f"`noise_std` or `data_std` must be positive; got {noise_std} for both.")
    _check_scale(scale)

    def guided(x_t: Array, t: Array) -> Array:
        def measure(x: Array) -> tuple[Array, Array]:
            x0_hat = _evaluate(denoise, x, t)
            return operator(x0_hat), x0_hat

        predicted, pull_back, x0_hat = jax.vjp(measure, x_t, has_aux=True)
        if jnp.shape(y) != predicted.shape:
            raise ValueError(f"`y` must have shape {predicted.shape}; got {jnp.shape(y)}.")
        (direction,) = pull_back((y - predicted).astype(predicted.dtype))
        time = numerics.expand_like(_in_dtype(t, x_t), x_t)
        variance, alpha = process.variance(time), process.alpha(time)
        noise_sq, data_sq = (_in_dtype(std, x_t) ** 2 for std in (noise_std, data_std))
        r_sq = _divide(variance * data_sq, variance + alpha**2 * data_sq, 0.0)
        gain = _divide(_divide(variance, alpha, 0.0), noise_sq + r_sq, 0.0)
        return (x0_hat + _expand(scale, x_t) * gain * direction).astype(x_t.dtype)

    return _mark(guided, denoise)


def _check(name: str, value: Any, fits: Callable, wanted: str, max_ndim: int = 0) -> Any:
    """Return a number where it is known; ValueError unless it has the shape and fits."""
    known = numerics.concrete(value)
    if jnp.ndim(value) > max_ndim or (known is not None and not fits(known)):
        raise ValueError(f"`{name}` must be {wanted}; got {value}.")
    return known


def _check_scale(scale: Any) -> Any:
    return _check("scale", scale, lambda v: np.isfinite(v).all(), "finite, () or (B,)", max_ndim=1)


def _in_dtype(value: Any, x_t: Array) -> Array:
    """Return a time or number in the dtype that guidance of x_t computes in."""
    return numerics.as_time(value).astype(jnp.promote_types(x_t.dtype, jnp.float32))


def _expand(scale: Any, x_t: Array) -> Array:
    if jnp.shape(scale) not in ((), x_t.shape[:1]):
        raise ValueError(f"`scale` must have shape () or {x_t.shape[:1]}; got {jnp.shape(scale)}.")
    return numerics.expand_like(_in_dtype(scale, x_t), x_t)


def _divide(a: Any, b: Array, otherwise: float) -> Array:
    """Return a / b where b > 0; values and gradients are finite elsewhere."""
    positive = b > 0
    return jnp.where(positive, a / jnp.where(positive, b, 1.0), otherwise)


def _evaluate(denoise: Denoiser, x_t: Array, t: Array) -> Array:
    x0_hat = denoise(x_t, t)
    if jnp.shape(x0_hat) != x_t.shape:
        raise ValueError(f"A denoiser must return {x_t.shape}; got {jnp.shape(x0_hat)}.")
    return numerics.as_float(x0_hat, "x0_hat")


def _needed(conditional: Any, unconditional: Any, scale: Any, rule: Rule) -> tuple[Any, ...]:
    """Return both, or the one that a known scale leaves."""
    known = _check_scale(scale)
    if known is not None and (known == 1).all():
        return (conditional,)
    if known is not None and rule is linear and not known.any():
        return (unconditional,)
    return conditional, unconditional


def _combine(rule: Rule, estimates: Sequence[Array], scale: Any, x_t: Array) -> Array:
    scale = _expand(scale, x_t)
    x0_hat = estimates[0] if len(estimates) == 1 else rule(estimates[0], estimates[1], scale)
    return x0_hat.astype(x_t.dtype)


def _mark(guided: Denoiser, *parts: Any) -> Denoiser:
    """Hand on that a part cannot start where alpha = 0: see `denoisers.from_network`."""
    for part in parts:
        if getattr(part, "needs_signal", None) is not None:
            guided.needs_signal = part.needs_signal  # type: ignore[attr-defined]
    return guided
