"""How two estimates of x0 are combined into a guided one."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp

from jaxdiff import checks, numerics
from jaxdiff.guidance.made import divide
from jaxdiff.typing import Array

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
    checks.number("phi", phi, 0.0, 1.0)

    def rule(conditional: Array, unconditional: Array, scale: Array) -> Array:
        def std(x0: Array) -> Array:
            return numerics.sqrt(jnp.var(x0, axis=tuple(range(1, x0.ndim)), keepdims=True))

        guided = linear(conditional, unconditional, scale)
        return guided * (phi * divide(std(conditional), std(guided), 1.0) + (1.0 - phi))

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
    checks.number("eta", eta)
    if max_norm is not None:
        checks.number("max_norm", max_norm, 0.0, above=True, infinite=True)

    def rule(conditional: Array, unconditional: Array, scale: Array) -> Array:
        def dot(a: Array, b: Array) -> Array:
            return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)

        d = conditional - unconditional
        if max_norm is not None:
            d = d * jnp.minimum(1.0, divide(max_norm, numerics.sqrt(dot(d, d)), 1.0))
        along = divide(dot(d, conditional), dot(conditional, conditional), 0.0) * conditional
        return conditional + (scale - 1.0) * (d - along + eta * along)

    return rule
