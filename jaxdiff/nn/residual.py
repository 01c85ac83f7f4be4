r"""The blocks of networks of convolutions: residual blocks, and attention among pixels.

With c an activated vector of conditioning, a residual block is

    h <- shortcut(h) + conv(dropout(silu(norm(conv(silu(norm(h))) + W c + w))))           added
    h <- shortcut(h) + conv(dropout(silu((1 + g) * norm(conv(silu(norm(h)))) + b)))        scaled
    (g, b) = W c + w

or without c; norm is group normalisation. Attention is

    h <- h + proj(attention(qkv(norm(h))))
    h <- h + cross(norm(h), tokens)                    where it is conditioned on sequences

Source: Ho et al. 2020 (arXiv:2006.11239), appendix B, which adds; the scale and shift are those of
Dhariwal and Nichol 2021 (arXiv:2105.05233), section 3.1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.nn.conditioning import Context
from jaxdiff.nn.layers import CrossAttention, GroupNorm, Linear, attention, dropout
from jaxdiff.typing import Array, Key


class ResidualBlock(nnx.Module):
    """One residual block.

    Args:
        in_channels: of what comes in.
        channels: of what goes out.
        cond_width: of the conditioning; None is without.
        added: whether the conditioning is added; else it scales and shifts.
        dropout: rate before the last convolution.
        site: number of its dropout within the network.
        norm: options of its :class:`jaxdiff.nn.layers.GroupNorm`.
        options: of its layers.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        cond_width: int | None = None,
        *,
        added: bool = False,
        dropout: float = 0.0,
        site: int = 0,
        norm: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.added = added
        self.dropout = dropout
        self.site = site
        zeros = nnx.initializers.zeros
        norm_options = {"param_dtype": options["param_dtype"], **(norm or {})}
        self.norm_in = GroupNorm(in_channels, **norm_options)
        self.conv_in = nnx.Conv(in_channels, channels, (3, 3), **options)
        if cond_width is None:
            self.modulation = None
        else:
            num_parts = 1 if added else 2
            self.modulation = Linear(cond_width, num_parts * channels, **options)
        self.norm_out = GroupNorm(channels, **norm_options)
        self.conv_out = nnx.Conv(channels, channels, (3, 3), kernel_init=zeros, **options)
        self.shortcut = (
            None if in_channels == channels else Linear(in_channels, channels, **options)
        )

    def __call__(self, x: Array, c: Array | None = None, key: Key | None = None) -> Array:
        """Map (B, H, W, in) and activated conditioning (B, cond_width) to (B, H, W, channels)."""
        h = self.conv_in(jax.nn.silu(self.norm_in(x)))
        if self.modulation is None or c is None:
            h = self.norm_out(h)
        elif self.added:
            h = self.norm_out(h + self.modulation(c)[:, jnp.newaxis, jnp.newaxis])
        else:
            modulation = self.modulation(c)[:, jnp.newaxis, jnp.newaxis]
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = self.norm_out(h) * (1.0 + scale) + shift
        h = self.conv_out(dropout(jax.nn.silu(h), self.dropout, key, self.site))
        return h + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """Attention among the pixels of an image, then to a context.

    Args:
        channels: C.
        num_heads: a divisor of C.
        context_width: of the tokens of the context; None is without.
        normed: whether there is a normalisation before the first.
        norm: options of its :class:`jaxdiff.nn.layers.GroupNorm`.
        options: of its layers.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        context_width: int | None = None,
        normed: bool = True,
        norm: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.num_heads = num_heads
        norm_options = {"param_dtype": options["param_dtype"], **(norm or {})}
        self.norm = GroupNorm(channels, **norm_options) if normed else None
        self.qkv = Linear(channels, 3 * channels, **options)
        zeros = nnx.initializers.zeros
        self.projection = Linear(channels, channels, kernel_init=zeros, **options)
        if context_width is None:
            self.cross = None
        else:
            self.cross_norm = GroupNorm(channels, **norm_options)
            self.cross = CrossAttention(channels, context_width, num_heads=num_heads, **options)

    def __call__(self, x: Array, context: Context | None = None) -> Array:
        """Map (B, H, W, C) to the same shape."""
        normal = x if self.norm is None else self.norm(x)
        tokens = normal.reshape(x.shape[0], -1, x.shape[-1])
        mixed = attention(self.qkv(tokens), self.num_heads)
        x = x + self.projection(mixed).reshape(x.shape)
        if self.cross is None or context is None:
            return x
        tokens = self.cross_norm(x).reshape(tokens.shape)
        return x + self.cross(tokens, *context).reshape(x.shape)
