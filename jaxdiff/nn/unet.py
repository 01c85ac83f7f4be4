r"""A small U-Net.

Levels l = 0..L-1 work at resolution H / 2^l with channels * multipliers[l] channels. On the way
down each level has `num_blocks` residual blocks, whose outputs are kept, and then halves the
resolution by 2 x 2 means; in the middle stand a block, attention and a block, at the lowest
resolution; on the way up each level takes its kept outputs back, last first, concatenated before a
block, and then doubles the resolution by repetition. With c = silu(time and label embedding), a
residual block is

    (g, b) = W c + w
    h <- shortcut(h) + conv(dropout(silu((1 + g) * norm(conv(silu(norm(h)))) + b)))

where norm is group normalisation. The last convolution of a block, the attention's projection and
the output convolution start at zero, hence so does the network.

Source: Ho et al. 2020 (arXiv:2006.11239), appendix B, with the scale and shift of Dhariwal and
Nichol 2021 (arXiv:2105.05233), section 3.1 (adaptive group normalisation: y_s norm(h) + y_b).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff import numerics
from jaxdiff.nn.layers import (
    Conditioning,
    Linear,
    attention,
    check_image_shape,
    check_input,
    check_options,
    checkpointed,
    dropout,
    output_dtype,
)
from jaxdiff.typing import Array, Key


def downsample(x: Array) -> Array:
    """Average over 2 x 2 pixels: (B, H, W, C) to (B, H/2, W/2, C)."""
    num_rows, height, width, channels = x.shape
    return x.reshape(num_rows, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def upsample(x: Array) -> Array:
    """Repeat every pixel 2 x 2 times: (B, H, W, C) to (B, 2H, 2W, C)."""
    num_rows, height, width, channels = x.shape
    x = x[:, :, jnp.newaxis, :, jnp.newaxis]
    x = jnp.broadcast_to(x, (num_rows, height, 2, width, 2, channels))
    return x.reshape(num_rows, 2 * height, 2 * width, channels)


class GroupNorm(nnx.Module):
    """Group normalisation with a learned scale and shift, statistics in float32 at least.

    Source: Wu and He 2018 (arXiv:1803.08494), section 3.
    """

    def __init__(self, channels: int, *, max_groups: int = 8, param_dtype: Any) -> None:
        self.num_groups = math.gcd(channels, max_groups)
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: Array) -> Array:
        """Normalise (B, H, W, C) over pixels and the channels of a group."""
        num_rows, channels = x.shape[0], x.shape[-1]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        groups = wide.reshape(num_rows, -1, self.num_groups, channels // self.num_groups)
        centred = groups - groups.mean(axis=(1, 3), keepdims=True)
        variance = jnp.mean(centred * centred, axis=(1, 3), keepdims=True)
        normal = (centred * jax.lax.rsqrt(variance + 1e-6)).reshape(-1, channels)
        scaled = normal * self.scale[...][jnp.newaxis] + self.bias[...][jnp.newaxis]
        return scaled.reshape(x.shape).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """One residual block; `options` go to its layers."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        cond_width: int,
        *,
        dropout: float,
        site: int,
        **options: Any,
    ) -> None:
        self.dropout = dropout
        self.site = site
        zeros = nnx.initializers.zeros
        norm_options = {"param_dtype": options["param_dtype"]}
        self.norm_in = GroupNorm(in_channels, **norm_options)
        self.conv_in = nnx.Conv(in_channels, channels, (3, 3), **options)
        self.modulation = Linear(cond_width, 2 * channels, **options)
        self.norm_out = GroupNorm(channels, **norm_options)
        self.conv_out = nnx.Conv(channels, channels, (3, 3), kernel_init=zeros, **options)
        self.shortcut = (
            None if in_channels == channels else Linear(in_channels, channels, **options)
        )

    def __call__(self, x: Array, c: Array, key: Key | None) -> Array:
        """Map (B, H, W, in) and activated conditioning (B, cond_width) to (B, H, W, channels)."""
        h = self.conv_in(jax.nn.silu(self.norm_in(x)))
        modulation = self.modulation(c)[:, jnp.newaxis, jnp.newaxis]
        scale, shift = jnp.split(modulation, 2, axis=-1)
        h = jax.nn.silu(self.norm_out(h) * (1.0 + scale) + shift)
        h = self.conv_out(dropout(h, self.dropout, key, self.site))
        return h + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """Self-attention among the pixels of an image; `options` go to its layers."""

    def __init__(self, channels: int, *, num_heads: int, **options: Any) -> None:
        self.num_heads = num_heads
        self.norm = GroupNorm(channels, param_dtype=options["param_dtype"])
        self.qkv = Linear(channels, 3 * channels, **options)
        zeros = nnx.initializers.zeros
        self.projection = Linear(channels, channels, kernel_init=zeros, **options)

    def __call__(self, x: Array) -> Array:
        """Map (B, H, W, C) to the same shape."""
        tokens = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        mixed = attention(self.qkv(tokens), self.num_heads)
        return x + self.projection(mixed).reshape(x.shape)


class UNet(nnx.Module):
    """A small convolutional network on images, with skip connections and one attention layer.

    On CPU: XLA computes the gradient of a convolution inside `lax.scan` or `lax.while_loop` 5 to
    10 times slower than outside. Do not scan its train steps there; call them one by one.

    Args:
        shape: (H, W, C) of the images; H and W divisible by 2^(len(multipliers) - 1), as
            are 8, 28 and 32 for the three levels of the default.
        channels: of the first level.
        multipliers: the channels of each level over `channels`.
        num_blocks: residual blocks a level, on each way.
        num_heads: of the attention, a divisor of the last level's channels.
        num_classes: None or 0 for an unconditional network; otherwise labels are integers in
            0..num_classes, num_classes being the null label.
        dropout: rate before the last convolution of a block, on when a key is given.
        remat: recompute the residual blocks in the backward pass, for memory.
        dtype: of the computation; normalisation and softmax are in float32 at least.
        param_dtype: of the parameters.
        rngs: source of the initial parameters, which follow from its seed.

    Raises:
        TypeError: if an option is of another kind.
        ValueError: if a size is below 1, does not divide as said above, or `dropout` lies
            outside [0, 1).
    """

    time = "log_snr"
    """What `t` is; see :func:`jaxdiff.nn.on_log_snr`."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 2),
        num_blocks: int = 1,
        num_heads: int = 4,
        num_classes: int | None = None,
        dropout: float = 0.0,
        remat: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.shape = check_image_shape(shape)
        sizes = {"channels": channels, "num_blocks": num_blocks, "num_heads": num_heads}
        sizes["multipliers"] = min(multipliers, default=0)
        check_options(dropout=dropout, num_classes=num_classes, dtype=dtype, rngs=rngs, **sizes)
        self.num_levels = len(multipliers)
        factor = 2 ** (self.num_levels - 1)
        if self.shape[0] % factor or self.shape[1] % factor:
            raise ValueError(
                f"`shape` must have H and W divisible by {factor} for {self.num_levels} levels; "
                f"got {self.shape}. Give fewer multipliers, or pad the images."
            )
        widths = [channels * multiplier for multiplier in multipliers]
        if widths[-1] % num_heads:
            raise ValueError(
                f"`num_heads` must divide the last level's {widths[-1]} channels; got {num_heads}."
            )
        self.num_blocks = num_blocks
        self.remat = remat
        self.dtype = dtype
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        cond_width = 4 * channels
        num_made = 0

        def block(in_channels: int, out_channels: int) -> ResidualBlock:
            nonlocal num_made
            num_made += 1
            return ResidualBlock(
                in_channels, out_channels, cond_width, dropout=dropout, site=num_made, **options
            )

        self.conditioning = Conditioning(cond_width, num_classes=num_classes, **options)
        self.conv_in = nnx.Conv(self.shape[2], channels, (3, 3), **options)
        current = channels
        for level, width in enumerate(widths):
            for i in range(num_blocks):
                setattr(self, f"down_{level:02d}_{i:02d}", block(current, width))
                current = width
        self.middle_00 = block(current, current)
        self.attention = AttentionBlock(current, num_heads=num_heads, **options)
        self.middle_01 = block(current, current)
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_blocks):
                setattr(self, f"up_{level:02d}_{i:02d}", block(current + width, width))
                current = width
        self.norm_out = GroupNorm(current, param_dtype=param_dtype)
        zeros = nnx.initializers.zeros
        self.conv_out = nnx.Conv(current, self.shape[2], (3, 3), kernel_init=zeros, **options)

    def __call__(
        self, x: Array, t: Array, cond: Array | None = None, *, key: Key | None = None
    ) -> Array:
        """Evaluate the network.

        Args:
            x: images, shape (B, H, W, C).
            t: log-SNR, shape () or (B,); infinities are allowed.
            cond: integer labels (B,); in evaluation None stands for the null label.
            key: one key or (B,) row keys: training, with dropout; None: evaluation.

        Returns:
            Shape (B, H, W, C), in the dtype of the computation but at least float32; 0 at
            initialisation.

        Raises:
            TypeError: if `x` is not one array of real numbers, or labels are no integers.
            ValueError: if a shape is wrong, a concrete label out of range, or `cond` given to
                an unconditional network or missing in the training of another.
        """
        h = self.conv_in(check_input(x, self.shape, self.dtype))
        rows = None if key is None else numerics.row_keys(key, h.shape[0])
        c = self.conditioning(t, cond, h.shape[0], training=key is not None)
        c = jax.nn.silu(c)

        def block(name: str, h: Array) -> Array:
            return checkpointed(getattr(self, name), self.remat)(h, c, rows)

        kept = []
        for level in range(self.num_levels):
            for i in range(self.num_blocks):
                h = block(f"down_{level:02d}_{i:02d}", h)
                kept.append(h)
            if level < self.num_levels - 1:
                h = downsample(h)
        h = block("middle_01", self.attention(block("middle_00", h)))
        for level in reversed(range(self.num_levels)):
            for i in range(self.num_blocks):
                h = block(f"up_{level:02d}_{i:02d}", jnp.concatenate([h, kept.pop()], axis=-1))
            if level:
                h = upsample(h)
        output = self.conv_out(jax.nn.silu(self.norm_out(h)))
        return output.astype(output_dtype(self.dtype))
