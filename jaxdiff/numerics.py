r"""Broadcasting, time derivatives, divergences; the draws of `jaxdiff.rows` by name too.

**Divergences.** With J the Jacobian of f, div f = tr J = sum_d e_d^T J e_d exactly, and
E[z^T J z] for z with identity covariance (Hutchinson's estimator; Grathwohl et al. 2019,
arXiv:1810.01367, eq. 7).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.rows import is_row_keys, normal, rademacher, split, uniform
from jaxdiff.rows import keys as row_keys
from jaxdiff.typing import Array

__all__ = [
    "as_array",
    "as_float",
    "as_time",
    "concrete",
    "divergence",
    "expand_like",
    "hutchinson_divergence",
    "is_row_keys",
    "known_value",
    "normal",
    "pytree_dataclass",
    "rademacher",
    "row_keys",
    "split",
    "sqrt",
    "time_derivative",
    "uniform",
]


def concrete(value: Any) -> np.ndarray | None:
    """Return `value` as a NumPy array where its numbers are known, None while it is traced.

    Checks of values apply to concrete ones only, so that whatever they guard may be traced.
    """
    if isinstance(value, jax.core.Tracer):
        return None
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # e.g. shards held by another process
        return None


def known_value(fn: Callable[[Array], Array], t: Any) -> np.ndarray | None:
    """Return fn(t) where all it depends on is known, also while something else is traced."""
    if concrete(t) is None:
        return None
    with jax.ensure_compile_time_eval():
        return concrete(fn(as_time(t)))


def as_array(value: Any, name: str) -> Array:
    """Return `value` as an array.

    Raises:
        TypeError: if it is none, naming the argument.
    """
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be an array; got {type(value).__name__}.") from None


def as_float(value: Any, name: str = "x") -> Array:
    """Return `value` as a floating-point array of at least float32.

    Raises:
        TypeError: if `value` holds integers, booleans or anything but real numbers.
    """
    array = as_array(value, name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`{name}` must hold floating-point numbers; got {array.dtype}.")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def as_time(t: Any) -> Array:
    """Return times as an array of floating-point numbers, keeping a dtype that they have.

    Raises:
        TypeError: if they are no real numbers.
    """
    t = as_array(t, "t")
    if jnp.issubdtype(t.dtype, jnp.floating):
        return t
    if not jnp.issubdtype(t.dtype, jnp.integer):
        raise TypeError(f"`t` must hold real numbers; got {t.dtype}.")
    return t.astype(float)


def expand_like(t: Array, x: Array) -> Array:
    """Give `t` the trailing axes that let it broadcast against `x`.

    Args:
        t: one value for the whole batch, shape (), or one an example, shape (B,).
        x: shape (B, ...).

    Returns:
        Shape () or (B, 1, ..., 1).

    Raises:
        ValueError: if `t` has neither shape.
    """
    t = as_array(t, "t")
    if t.ndim == 0:
        return t
    if t.ndim != 1 or x.ndim == 0 or t.shape[0] != x.shape[0]:
        raise ValueError(
            f"`t` must have shape () or (B,) with B the leading axis of x; "
            f"got t {t.shape} beside x {x.shape}."
        )
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def sqrt(x: Array) -> Array:
    """Return the square root of x >= 0 with gradient 0, rather than infinite, at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def time_derivative(fn: Callable[[Array], Array], t: Array) -> Array:
    """Differentiate a function of time that acts elementwise; `t` of any shape."""
    t = as_time(t)
    return jax.jvp(fn, (t,), (jnp.ones_like(t),))[1]


T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that is a pytree of its fields.

    Rebuilt by a transformation it skips `__post_init__`: its leaves may then be anything, and
    were checked when it was made. (`jax.tree_util.register_dataclass` runs it again; and in
    jaxlib 0.10 it takes classes of equally many fields for the same structure, so that what was
    compiled for one may run on the other.)
    """
    made = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]

    def flatten_with_keys(value: Any) -> Any:
        return [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names], None

    def flatten(value: Any) -> Any:
        return [getattr(value, name) for name in names], None

    def unflatten(_: None, leaves: Any) -> Any:
        value: Any = object.__new__(made)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(value, name, leaf)
        return value

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


# --- Divergences of a function of one example ----------------------------------------------


def divergence(fn: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """Evaluate f and its exact divergence at one point.

    Args:
        fn: maps x to an array of its shape.
        x: one point, any shape, D numbers in all; costs one linearisation and D tangents.

    Returns:
        (f(x), div f(x) of shape ()).
    """
    value, push = jax.linearize(fn, x)
    basis = jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)
    return value, jnp.sum(basis * jax.vmap(push)(basis))


def hutchinson_divergence(
    fn: Callable[[Array], Array], x: Array, probes: Array
) -> tuple[Array, Array]:
    """Evaluate f at one point and estimate its divergence there.

    Args:
        fn: maps x to an array of its shape.
        x: one point.
        probes: (N, *x.shape), independent with identity covariance; their estimates are averaged.

    Returns:
        (f(x), the unbiased estimate of div f(x), shape ()).
    """
    value, push = jax.linearize(fn, x)
    return value, jnp.sum(probes * jax.vmap(push)(probes)) / math.prod(probes.shape[:1])
