r"""The terms of the variational bound, which losses and likelihoods share.

For a model that starts from N(0, sigma_T^2 I), goes back by q(x_s | x_t, x0 = x0_hat) and ends with
a decoder,

    -log p(x0) <= KL(q(x_T | x0) || N(0, sigma_T^2 I))               prior
                  + sum 1/2 (SNR(s) - SNR(t)) ||x0 - x0_hat||^2      diffusion, over steps t to s
                  - E log p(x0 | x_{t_end})                          reconstruction

in nats, SNR = alpha^2 / sigma^2; in the limit of small steps the sum is the integral of
-1/2 SNR'(t) ||x0 - x0_hat||^2 over t.

Source: Kingma et al. 2021 (arXiv:2107.00630), eqs. 11, 13, 15.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxdiff import checks
from jaxdiff.processes import Process
from jaxdiff.typing import Array

__all__ = [
    "Decoder",
    "gaussian_decoder",
    "level_decoder",
    "prior_divergence",
    "row_sum",
    "snr",
]

Decoder: TypeAlias = Callable[[Process, Array, Array, Array], Array]
"""(process, x0 (B, ...), x_t (B, ...), t ()) -> log p(x0 | x_t) in nats (B,)."""


def snr(process: Process, t: Array) -> Array:
    """Return alpha^2 / variance, finite where alpha is 0."""
    return process.alpha(t) ** 2 / process.variance(t)


def prior_divergence(process: Process, x0: Array) -> Array:
    """Return KL(q(x_T | x0) || N(0, variance(t_max) I)) in nats (B,), for x0 (B, ...).

    It is what the reverse process loses by starting from the prior; 0 where alpha(t_max) is.
    """
    checks.process(process)
    x0 = checks.batch("x0", x0)
    t_max = jnp.asarray(process.t_max, x0.dtype)
    return 0.5 * snr(process, t_max) * row_sum(x0**2)


def gaussian_decoder() -> Decoder:
    """Decode to a density: N(x0; x_t / alpha, sigma^2 / alpha^2 I)."""

    def decode(process: Process, x0: Array, x_t: Array, t: Array) -> Array:
        level = process.sigma(t) / process.alpha(t)
        error = (x0 - x_t / process.alpha(t)) / level
        log_norm = 0.5 * math.log(2.0 * math.pi) + jnp.log(level)
        return -row_sum(0.5 * error**2 + log_norm)

    return decode


def level_decoder(num_levels: int) -> Decoder:
    """Decode to the probability of one of L levels, whose x are the centres (2k + 1)/L - 1.

    Each dimension by itself: p(k | x_t) is proportional to N(x_t / alpha; x_k, sigma^2 / alpha^2).

    Raises:
        ValueError: if `num_levels` is less than 2.

    Source: Kingma et al. 2021 (arXiv:2107.00630), section 3.3.
    """
    num_levels = checks.count("num_levels", num_levels, 2)

    def decode(process: Process, x0: Array, x_t: Array, t: Array) -> Array:
        centers = (2.0 * jnp.arange(num_levels, dtype=x0.dtype) + 1.0) / num_levels - 1.0
        centers = centers.reshape(-1, *(1,) * x0.ndim)
        level = process.sigma(t) / process.alpha(t)
        logits = -0.5 * (((x_t / process.alpha(t))[None] - centers) / level) ** 2
        k = jnp.argmin(jnp.abs(x0[None] - centers), axis=0)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=0), k[None], axis=0)
        return row_sum(chosen[0])

    return decode


def row_sum(x: Array) -> Array:
    """Return the sum over the dimensions of each example, (B,), of x (B, ...)."""
    return jnp.sum(x.reshape(x.shape[0], -1), axis=1)
