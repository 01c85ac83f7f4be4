r"""A stream of tokens in a transformer that is told the time: what its blocks are made of.

With c the activated embedding of time and conditioning,

    (b1, g1, a1, b2, g2, a2) = W c + w                           (6 C numbers an example)
    (q, k, v) = qkv((1 + g1) * norm(h) + b1)
    h <- h + a1 * proj(mixed)
    h <- h + a2 * mlp((1 + g2) * norm(h) + b2)

where the block says what is mixed: how q, k and v attend, and to what. W = w = 0 at first.

Source: Peebles and Xie 2023 (arXiv:2212.09748), section 3.2 and Figure 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.nn.layers import Linear, RMSNorm, dropout, layer_norm
from jaxdiff.typing import Array, Key


def gelu(x: Array) -> Array:
    """Return x Phi(x), Phi being the normal distribution function, approximated by a tanh."""
    return jax.nn.gelu(x, approximate=True)


def relu_squared(x: Array) -> Array:
    """Return max(x, 0)^2.

    Source: So et al. 2021 (arXiv:2109.08668).
    """
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "relu_squared": relu_squared}
"""Those of the perceptrons, by name."""


def modulate(x: Array, shift: Array, scale: Array, epsilon: float = 1e-6) -> Array:
    """Return (1 + scale) * norm(x) + shift, for x (B, N, C) and shift, scale (B, 1, C)."""
    return layer_norm(x, epsilon) * (1.0 + scale) + shift


class Modulation(NamedTuple):
    """What one branch of a block is told, each (B, 1, C)."""

    shift: Array
    scale: Array
    gate: Array


class Stream(nnx.Module):
    """What one stream of a block has of its own.

    Args:
        width: C.
        num_heads: a divisor of C.
        mlp_ratio: width of the perceptron's hidden layer over C.
        mlp_epsilon: added to the variance in the normalisation before the perceptron.
        dropout: rate at the end of both branches.
        site: number of the stream within the network, for its dropout.
        query_key_norm: whether queries and keys are normalised.
        activation: of the perceptron, one of `ACTIVATIONS`.
        options: of its layers.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        mlp_ratio: int,
        mlp_epsilon: float,
        dropout: float,
        site: int,
        query_key_norm: bool,
        activation: str,
        **options: Any,
    ) -> None:
        self.num_heads = num_heads
        self.mlp_epsilon = mlp_epsilon
        self.dropout = dropout
        self.site = site
        self.activation = activation
        zeros = nnx.initializers.zeros
        xavier = nnx.initializers.xavier_uniform()
        self.modulation = Linear(width, 6 * width, kernel_init=zeros, **options)
        self.qkv = Linear(width, 3 * width, kernel_init=xavier, **options)
        self.projection = Linear(width, width, kernel_init=xavier, **options)
        self.inner = Linear(width, mlp_ratio * width, kernel_init=xavier, **options)
        self.outer = Linear(mlp_ratio * width, width, kernel_init=xavier, **options)
        norm = {"num_heads": num_heads, "param_dtype": options["param_dtype"]}
        self.query_norm = RMSNorm(width, **norm) if query_key_norm else None
        self.key_norm = RMSNorm(width, **norm) if query_key_norm else None

    def modulations(self, c: Array) -> tuple[Modulation, Modulation]:
        """Return that of attention and that of the perceptron, given c (B, C)."""
        parts = jnp.split(self.modulation(c)[:, jnp.newaxis], 6, axis=-1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def asked(self, h: Array, told: Modulation) -> tuple[Array, Array, Array]:
        """Return queries, keys and values of tokens, each (B, N, C)."""
        parts = self.qkv(modulate(h, told.shift, told.scale))
        query, key, value = jnp.split(parts, 3, axis=-1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def attended(self, h: Array, mixed: Array, told: Modulation, key: Key | None) -> Array:
        """Add to tokens (B, N, C) what attention made of them."""
        return h + told.gate * dropout(self.projection(mixed), self.dropout, key, 2 * self.site)

    def perceived(self, h: Array, told: Modulation, key: Key | None) -> Array:
        """Add to tokens (B, N, C) what the perceptron makes of them."""
        inner = self.inner(modulate(h, told.shift, told.scale, self.mlp_epsilon))
        outer = self.outer(ACTIVATIONS[self.activation](inner))
        return h + told.gate * dropout(outer, self.dropout, key, 2 * self.site + 1)
