"""Guidance by the gradient of a log-likelihood given x_t."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import numerics
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser


def classifier(
    process: Process, denoise: Denoiser, log_prob: Callable[[Array, Array], Array], scale: Any = 1.0
) -> Denoiser:
    """Make a denoiser guided by the gradient of a classifier of noisy data.

    Args:
        process: the forward process.
        denoise: the unconditional denoiser.
        log_prob: (x_t (B, ...), t) -> log p(y | x_t) (B,), a row's own.
        scale: of the gradient, shape () or (B,). At 1 and with the exact log p(y | x_t) the
            result is the exact conditional denoiser. Where alpha = 0 nothing is added.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4; Song et al. 2021
    (arXiv:2011.13456), eq. 14.
    """

    def guided(x_t: Array, t: Array) -> Array:
        gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x_t)
        return (denoise(x_t, t) + _step(process, x_t, t, scale) * gradient).astype(x_t.dtype)

    return guided


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
    r"""Make a denoiser guided by a measurement y = operator(x0) + noise_std n.

    The likelihood is taken as p(y | x_t) = N(y; operator(x0_hat), (noise_std^2 + r^2) I) with
    r^2 = variance d^2 / (variance + alpha^2 d^2), d = `data_std`: the spread that x0 has left
    given x_t. That is exact for data N(mu, d^2 I) and operators with A A^T = I on what they
    keep, such as the masks of inpainting. d = 0 is the likelihood of DPS, whose guidance gets
    stiff as `noise_std` gets small.

    Args:
        process: the forward process.
        denoise: the denoiser; it is differentiated.
        operator: x0 (B, ...) -> what is measured of it (B, ...), linear in each row.
        y: the measurement, of the operator's output shape; `mask * x` with
            ``operator = lambda x: mask * x`` inpaints.
        noise_std: standard deviation of the measurement's noise.
        data_std: standard deviation of the data.
        scale: of the gradient. Where alpha = 0 nothing is added.

    Raises:
        ValueError: if a standard deviation is known and negative, or both are known to be 0, or,
            when called, `y` has not the operator's output shape.

    Source: Chung et al. 2023 (arXiv:2209.14687), eqs. 11 and 14; the variance r^2:
    Song et al. 2023, Pseudoinverse-guided diffusion models (ICLR), section 3.
    """
    known = numerics.concrete(noise_std), numerics.concrete(data_std)
    for name, value in zip(("noise_std", "data_std"), known, strict=True):
        if value is not None and not value >= 0:
            raise ValueError(f"`{name}` must be at least 0; got {value}.")
    if all(value is not None and value == 0 for value in known):
        raise ValueError("`noise_std` and `data_std` must not both be 0: nothing would be left.")

    def guided(x_t: Array, t: Array) -> Array:
        time = numerics.expand_like(numerics.as_time(t).astype(x_t.dtype), x_t)

        def measure(x: Array) -> tuple[Array, Array]:
            x0_hat = denoise(x, t).astype(x.dtype)
            return operator(x0_hat), x0_hat

        measured, pull, x0_hat = jax.vjp(measure, x_t, has_aux=True)
        if measured.shape != jnp.shape(y):
            raise ValueError(
                f"`y` must have the operator's output shape, {measured.shape}; got {jnp.shape(y)}."
            )
        noise = process.variance(time)
        total = noise + (process.alpha(time) * data_std) ** 2
        spread = noise_std**2 + noise * data_std**2 / total
        per_row = (
            spread.reshape(spread.shape[:1] + (1,) * (measured.ndim - 1)) if spread.ndim else spread
        )
        residual = (y - measured) / jnp.where(per_row > 0, per_row, jnp.inf)
        (gradient,) = pull(residual.astype(measured.dtype))
        return x0_hat + _step(process, x_t, t, scale) * gradient

    return guided


def _step(process: Process, x_t: Array, t: Array, scale: Any) -> Array:
    """Return scale variance / alpha, what a score's change is times to change x0_hat."""
    t = numerics.expand_like(numerics.as_time(t).astype(x_t.dtype), x_t)
    scale = numerics.expand_like(jnp.asarray(scale, x_t.dtype), x_t)
    alpha = process.alpha(t)
    return scale * jnp.where(alpha > 0, process.variance(t) / jnp.where(alpha > 0, alpha, 1.0), 0.0)
