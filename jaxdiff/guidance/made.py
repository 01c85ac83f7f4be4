"""What all guidance shares: a denoiser made of others, and the numbers that it takes."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxdiff import checks, numerics
from jaxdiff.typing import Array

Evaluate: TypeAlias = Callable[[checks.Judged, Array, Array], Array]
"""(part, x_t, t) -> the part's x0_hat, or its v."""


@dataclasses.dataclass(frozen=True, eq=False)
class Guided:
    """A denoiser made of others, which knows of them where they can start, and v if it can.

    Attributes:
        made: (evaluate, x_t, t) -> what is made of the parts' outputs, each `evaluate`d.
        parts: what it is made of.
        linear: whether v is made of the parts' v as x0_hat is of their x0_hat: at a given x_t they
            are affine in each other, so weights that sum to 1 take one to the other.
    """

    made: Callable[[Evaluate, Array, Array], Array]
    parts: tuple[checks.Judged, ...]
    linear: bool = False

    @property
    def needs_signal(self) -> str | None:
        """The first part's that needs it: see `typing.Denoiser`."""
        needs = (part.needs_signal for part in self.parts)
        return next((need for need in needs if need is not None), None)

    @property
    def v(self) -> Callable[[Array, Array], Array] | None:
        """(x_t, t) -> v where all is linear and all parts know theirs."""
        if not self.linear or any(part.v is None for part in self.parts):
            return None
        return lambda x_t, t: self.made(v_of, x_t, t)

    def __call__(self, x_t: Array, t: Array) -> Array:
        """Return x0_hat (B, ...) in the dtype of x_t."""
        return self.made(x0_hat_of, x_t, t)


def x0_hat_of(part: checks.Judged, x_t: Array, t: Array) -> Array:
    """Evaluate a part as it is, in float32 at least."""
    return _as_wide(checks.output(part.name, part.fn(x_t, t), x_t, cast=False))


def v_of(part: checks.Judged, x_t: Array, t: Array) -> Array:
    """Evaluate the v of a part that gives it, in float32 at least."""
    assert part.v is not None
    return _as_wide(checks.output(f"{part.name}.v", part.v(x_t, t), x_t, cast=False))


def _as_wide(value: Array) -> Array:
    return numerics.as_float(value, "x0_hat")


def check_scale(scale: Any) -> Any:
    """Return a scale where it is known, None where it is traced.

    Raises:
        TypeError: if it holds no real numbers.
        ValueError: if it has more than one axis, or is known and not finite.
    """
    checks.real("scale", scale)
    known = numerics.concrete(scale)
    if jnp.ndim(scale) > 1 or (known is not None and not np.isfinite(known).all()):
        raise ValueError(f"`scale` must be finite, () or (B,); got {scale}.")
    return known


def in_dtype(value: Any, x_t: Array) -> Array:
    """Return a time or number in the dtype that guidance of x_t computes in."""
    return numerics.as_time(value).astype(jnp.promote_types(x_t.dtype, jnp.float32))


def expand(scale: Any, x_t: Array) -> Array:
    """Let a scale broadcast against x_t; ValueError if it is neither () nor (B,)."""
    if jnp.shape(scale) not in ((), x_t.shape[:1]):
        raise ValueError(f"`scale` must have shape () or {x_t.shape[:1]}; got {jnp.shape(scale)}.")
    return numerics.expand_like(in_dtype(scale, x_t), x_t)


def divide(a: Any, b: Array, otherwise: float) -> Array:
    """Return a / b where b > 0; values and gradients are finite elsewhere."""
    positive = b > 0
    return jnp.where(positive, a / jnp.where(positive, b, 1.0), otherwise)
