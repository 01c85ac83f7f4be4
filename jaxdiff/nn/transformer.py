r"""The transformer of latent diffusion: what stands at a level of its U-Net.

    h <- x + proj(blocks(proj(norm(x))))

among the pixels of an image x, norm being group normalisation, and a block, with the tokens of a
context,

    h <- h + proj(attention(qkv(norm(h))))
    h <- h + cross(norm(h), tokens)
    h <- h + outer(a * gelu(b)),        (a, b) = inner(norm(h))

with layer normalisation. Queries, keys and values have no biases.

Source: Rombach et al. 2022 (arXiv:2112.10752), section 3.3 and appendix E.2.1; the gated unit is
that of Shazeer 2020 (arXiv:2002.05202).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.nn.layers import CrossAttention, GroupNorm, LayerNorm, Linear, attend
from jaxdiff.typing import Array


class TransformerBlock(nnx.Module):
    """One block; `options` go to its layers."""

    def __init__(self, width: int, context_width: int, *, num_heads: int, **options: Any) -> None:
        self.num_heads = num_heads
        norm = {"epsilon": 1e-5, "param_dtype": options["param_dtype"]}
        self.norm_self = LayerNorm(width, **norm)
        self.qkv = Linear(width, 3 * width, use_bias=False, **options)
        self.projection = Linear(width, width, **options)
        self.norm_cross = LayerNorm(width, **norm)
        self.cross = CrossAttention(
            width, context_width, num_heads=num_heads, biased=False, wide=True, **options
        )
        self.norm_gated = LayerNorm(width, **norm)
        self.inner = Linear(width, 8 * width, **options)
        self.outer = Linear(4 * width, width, **options)

    def __call__(self, h: Array, tokens: Array) -> Array:
        """Map (B, N, C) to the same shape, given tokens (B, L, context_width)."""
        query, key, value = jnp.split(self.qkv(self.norm_self(h)), 3, axis=-1)
        h = h + self.projection(attend(query, key, value, self.num_heads, wide=True))
        h = h + self.cross(self.norm_cross(h), tokens)
        value, gate = jnp.split(self.inner(self.norm_gated(h)), 2, axis=-1)
        return h + self.outer(value * jax.nn.gelu(gate, approximate=False))


class Transformer(nnx.Module):
    """Blocks among the pixels of an image, which adds what they make.

    Args:
        channels: C.
        context_width: of the tokens of the context.
        num_heads: a divisor of C.
        depth: number of blocks.
        max_groups: as of :class:`jaxdiff.nn.layers.GroupNorm`.
        options: of its layers.
    """

    def __init__(
        self,
        channels: int,
        context_width: int,
        *,
        num_heads: int,
        depth: int,
        max_groups: int,
        **options: Any,
    ) -> None:
        self.depth = depth
        norm = {"max_groups": max_groups, "epsilon": 1e-6, "param_dtype": options["param_dtype"]}
        self.norm = GroupNorm(channels, **norm)
        self.input = Linear(channels, channels, **options)
        for i in range(depth):
            block = TransformerBlock(channels, context_width, num_heads=num_heads, **options)
            setattr(self, f"block_{i:02d}", block)
        self.output = Linear(channels, channels, **options)

    def __call__(self, x: Array, tokens: Array) -> Array:
        """Map (B, H, W, C) to the same shape, given tokens (B, L, context_width)."""
        h = self.input(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))
        for i in range(self.depth):
            h = getattr(self, f"block_{i:02d}")(h, tokens)
        return x + self.output(h).reshape(x.shape)
