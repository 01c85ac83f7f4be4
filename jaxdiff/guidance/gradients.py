"""Guidance by the gradient of a likelihood: of a class, or of a measurement."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import checks, numerics
from jaxdiff.guidance.made import (
    Evaluate,
    Guided,
    check_scale,
    divide,
    expand,
    in_dtype,
)
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser


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
    checks.process(process)
    checks.function("log_prob", log_prob, "(x_t, t) -> log p(y | x_t), (B,)", takes=2)
    judged = checks.judged("denoise", denoise, checks.DENOISER)
    known = check_scale(scale)
    if known is not None and not known.any():
        return denoise

    def guided(evaluate: Evaluate, x_t: Array, t: Array) -> Array:
        def total(x: Array) -> Array:
            value = log_prob(x, t)
            if jnp.shape(value) != x.shape[:1]:
                raise ValueError(f"`log_prob` must return {x.shape[:1]}; got {jnp.shape(value)}.")
            return value.sum()

        time = numerics.expand_like(in_dtype(t, x_t), x_t)
        gain = expand(scale, x_t) * divide(process.variance(time), process.alpha(time), 0.0)
        return (evaluate(judged, x_t, t) + gain * jax.grad(total)(x_t)).astype(x_t.dtype)

    return Guided(guided, (judged,))


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
    checks.process(process)
    checks.function("operator", operator, "x0 (B, ...) -> (B, ...)", takes=1)
    judged = checks.judged("denoise", denoise, checks.DENOISER)
    stds = {"noise_std": noise_std, "data_std": data_std}
    if [numerics.concrete(checks.number(name, v, 0.0)) for name, v in stds.items()] == [0, 0]:
        raise ValueError(f"`noise_std` or `data_std` must be positive; got {noise_std} for both.")
    check_scale(scale)
    checks.real("y", y)
    y = numerics.as_array(y, "y")

    def guided(evaluate: Evaluate, x_t: Array, t: Array) -> Array:
        def measure(x: Array) -> tuple[Array, Array]:
            x0_hat = evaluate(judged, x, t)
            return numerics.as_array(operator(x0_hat), "operator(...)"), x0_hat

        predicted, pull_back, x0_hat = jax.vjp(measure, x_t, has_aux=True)
        if jnp.shape(y) != predicted.shape:
            raise ValueError(f"`y` must have shape {predicted.shape}; got {jnp.shape(y)}.")
        (direction,) = pull_back((y - predicted).astype(predicted.dtype))
        time = numerics.expand_like(in_dtype(t, x_t), x_t)
        variance, alpha = process.variance(time), process.alpha(time)
        noise_sq, data_sq = (in_dtype(std, x_t) ** 2 for std in (noise_std, data_std))
        r_sq = divide(variance * data_sq, variance + alpha**2 * data_sq, 0.0)
        gain = divide(divide(variance, alpha, 0.0), noise_sq + r_sq, 0.0)
        return (x0_hat + expand(scale, x_t) * gain * direction).astype(x_t.dtype)

    return Guided(guided, (judged,))
