"""Rules that combine a conditional and an unconditional prediction."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxdiff import numerics
from jaxdiff.typing import Array

Rule: TypeAlias = Callable[[Array, Array, Array], Array]
"""(conditional x0_hat (B, ...), unconditional x0_hat, scale () or (B, 1, ...)) -> x0_hat."""


def linear(conditional: Array, unconditional: Array, scale: Array) -> Array:
    """Return unconditional + scale (conditional - unconditional).

    Source: Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, whose w is scale - 1.
    """
    return unconditional + scale * (conditional - unconditional)


def rescaled(phi: Any = 0.7) -> Rule:
    """Make the linear rule with each example's spread brought back towards the conditional one's.

    With std over an example's numbers, the result is x (phi std(conditional) / std(x) + 1 - phi).
    The paper rescales the network's output; here it is x0_hat that is rescaled.

    Args:
        phi: in [0, 1]; 0 rescales nothing.

    Raises:
        ValueError: if `phi` is known and outside [0, 1].

    Source: Lin et al. 2024 (arXiv:2305.08891), eqs. 14-16.
    """
    known = numerics.concrete(phi)
    if known is not None and not 0.0 <= known <= 1.0:
        raise ValueError(f"`phi` must lie in [0, 1]; got {phi}.")

    def rule(conditional: Array, unconditional: Array, scale: Array) -> Array:
        guided = linear(conditional, unconditional, scale)
        spread, wanted = (per_example(_variance, x) for x in (guided, conditional))
        ratio = jnp.where(
            spread > 0, numerics.sqrt(wanted / jnp.where(spread > 0, spread, 1.0)), 1.0
        )
        return guided * (phi * ratio + 1.0 - phi)

    return rule


def projected(eta: Any = 0.0, max_norm: Any = None) -> Rule:
    """Make the rule of adaptive projected guidance: less of what only brightens the picture.

    The difference of the two predictions, its norm limited, is split into its parts parallel and
    orthogonal to the conditional one, and the parallel part is weighted by `eta`:
    conditional + (scale - 1) (orthogonal + eta parallel). The paper's momentum is left out: a
    denoiser has no memory.

    Args:
        eta: weight of the parallel part; 1, without a limit, is the linear rule.
        max_norm: the largest L2 norm of an example's difference; None sets no limit.

    Raises:
        ValueError: if `max_norm` is known and not positive.

    Source: Sadat et al. 2024 (arXiv:2410.02416), algorithm 1.
    """
    known = None if max_norm is None else numerics.concrete(max_norm)
    if known is not None and not known > 0:
        raise ValueError(f"`max_norm` must be positive, or None; got {max_norm}.")

    def rule(conditional: Array, unconditional: Array, scale: Array) -> Array:
        difference = conditional - unconditional
        if max_norm is not None:
            length = numerics.sqrt(per_example(_square, difference))
            difference *= jnp.where(
                length > max_norm, max_norm / jnp.maximum(length, max_norm), 1.0
            )
        size = per_example(_square, conditional)
        along = per_example(jnp.sum, difference * conditional)
        parallel = along / jnp.where(size > 0, size, 1.0) * conditional
        return conditional + (scale - 1.0) * (difference + (eta - 1.0) * parallel)

    return rule


def per_example(reduce: Callable[[Array], Array], x: Array) -> Array:
    """Reduce each example to one number; shape (B, 1, ..., 1)."""
    return numerics.expand_like(jax.vmap(lambda row: reduce(row.ravel()))(x), x)


def _variance(x: Array) -> Array:
    return jnp.var(x)


def _square(x: Array) -> Array:
    return jnp.sum(x**2)
