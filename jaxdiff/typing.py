"""The few types the whole library speaks: arrays, keys, networks and denoisers."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax

__all__ = [
    "Apply",
    "Array",
    "Batch",
    "Denoiser",
    "Key",
    "LossFn",
    "Network",
    "PyTree",
]

Array: TypeAlias = jax.Array
"""A JAX array; shapes are written in docstrings, ``(B, ...)`` being a batch of examples."""

Key: TypeAlias = jax.Array
"""A typed key (``jax.random.key``): one for a batch, or ``(B,)`` row keys, one an example."""

PyTree: TypeAlias = Any
"""Any nest of arrays that ``jax.tree`` understands."""

Batch: TypeAlias = Mapping[str, PyTree]
"""``{"x0": (B, ...), "cond": pytree of (B, ...)}``; ``cond`` may be absent."""


class Network(Protocol):
    """What is trained, with its parameters and conditioning closed over."""

    def __call__(self, x_t: Array, t: Array, /) -> Array:
        """Map noisy data (B, ...) at time t, () or (B,), to an output of the same shape."""


class Denoiser(Protocol):
    """The one currency of sampling: an estimate of E[x0 | x_t].

    It may have two attributes, which guidance hands on where it can: ``v``, a function as this one
    that gives v = alpha eps_hat - sigma x0_hat without taking x0_hat from x_t, and
    ``needs_signal``, what cannot be asked where alpha is 0, as a refusal names it.
    """

    def __call__(self, x_t: Array, t: Array, /) -> Array:
        """Map noisy data (B, ...) at time t, () or (B,), to x0_hat of the same shape."""


class Apply(Protocol):
    """A pure network: parameters in, output out."""

    def __call__(
        self,
        params: PyTree,
        x_t: Array,
        t: Array,
        cond: PyTree = None,
        /,
        *,
        key: Key | None = None,
    ) -> Array:
        """Evaluate the network; a key turns training behaviour (dropout) on."""


LossFn: TypeAlias = Callable[[PyTree, Key, Batch], tuple[Array, dict[str, Array]]]
"""``(params, key, batch) -> (loss (B,), {name: (B,)})``."""
