"""Limits on what a denoiser says."""

from typing import Any

import jax.numpy as jnp

from jaxdiff import numerics
from jaxdiff.guidance.rules import per_example
from jaxdiff.typing import Array, Denoiser


def dynamic_threshold(denoise: Denoiser, percentile: float = 0.995, bound: Any = 1.0) -> Denoiser:
    """Make a denoiser whose outputs stay in [-bound, bound], each example by its own measure.

    With s the larger of `bound` and this percentile of |x0_hat|, x0_hat is clipped to [-s, s] and
    multiplied by bound / s. Guide first, then limit.

    Args:
        denoise: the denoiser.
        percentile: in (0, 1].
        bound: the largest magnitude of the data, positive.

    Raises:
        ValueError: if an option is known and out of range.

    Source: Saharia et al. 2022 (arXiv:2205.11487), section 2.3.
    """
    if not 0.0 < percentile <= 1.0:
        raise ValueError(f"`percentile` must lie in (0, 1]; got {percentile}.")
    known = numerics.concrete(bound)
    if known is not None and not known > 0:
        raise ValueError(f"`bound` must be positive; got {bound}.")

    def limited(x_t: Array, t: Array) -> Array:
        x0_hat = denoise(x_t, t).astype(x_t.dtype)
        largest = per_example(lambda x: jnp.quantile(jnp.abs(x), percentile), x0_hat)
        s = jnp.maximum(largest, bound)
        return jnp.clip(x0_hat, -s, s) * (bound / s)

    return limited
