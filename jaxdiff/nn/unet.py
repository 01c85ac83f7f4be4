r"""A small U-Net.

Levels l = 0..L-1 work at resolution H / 2^l with channels * multipliers[l] channels. On the way
down each level has `num_blocks` residual blocks, whose outputs are kept, and then halves the
resolution by 2 x 2 means; in the middle stand a block, attention and a block, at the lowest
resolution; on the way up each level takes its kept outputs back, last first, concatenated before a
block, and then doubles the resolution by repetition. Levels of `attention_levels` have attention
after every block, on both ways. With c = silu(embedding of log-SNR and conditioning), a residual
block is

    (g, b) = W c + w
    h <- shortcut(h) + conv(dropout(silu((1 + g) * norm(conv(silu(norm(h)))) + b)))

where norm is group normalisation. Attention is

    h <- h + proj(attention(qkv(norm(h))))
    h <- h + cross(norm(h), tokens)                    where it is conditioned on sequences

The last convolution of a block, the attentions' projections and the output convolution start at
zero, hence so does the network.

Source: Ho et al. 2020 (arXiv:2006.11239), appendix B, with the scale and shift of Dhariwal and
Nichol 2021 (arXiv:2105.05233), section 3.1 (adaptive group normalisation: y_s norm(h) + y_b).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff import checks
from jaxdiff.nn.conditioning import Conditions, Context
from jaxdiff.nn.layers import (
    GroupNorm,
    check_image_shape,
    check_input,
    checkpointed,
    downsample,
    upsample,
)
from jaxdiff.nn.network import Conditioning, Network
from jaxdiff.nn.residual import AttentionBlock, ResidualBlock
from jaxdiff.typing import Array, Key


class UNet(Network):
    """A small convolutional network on images, with skip connections and attention.

    The same parameters serve images of every size whose H and W are multiples of
    2^(len(multipliers) - 1); the number of their channels is fixed.

    On CPU: XLA computes the gradient of a convolution inside `lax.scan` or `lax.while_loop` 5 to
    10 times slower than outside. Do not scan its train steps there; call them one by one.

    Args:
        shape: (H, W, C) of the images. Only C is kept; H and W are held to what every image is
            held to, as are 8, 28 and 32 for the three levels of the default.
        channels: of the first level.
        multipliers: the channels of each level over `channels`.
        num_blocks: residual blocks a level, on each way.
        num_heads: of the attention, a divisor of the channels of the last level and of those
            with attention.
        attention_levels: which levels have attention, counted from 0, the first; the middle has
            it always.
        dropout: rate before the last convolution of a block.
        remat: recompute the residual blocks, not the attention, in the backward pass.
        conditioning, num_classes, dtype, param_dtype, rngs: what all networks take, see
            :class:`jaxdiff.nn.network.Network`.

    Raises:
        TypeError: if an option is of another kind.
        ValueError: if a size is below 1, does not divide as said above, a level is none, or
            `dropout` lies outside [0, 1).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 2),
        num_blocks: int = 1,
        num_heads: int = 4,
        attention_levels: tuple[int, ...] = (),
        conditioning: Conditions | None = None,
        num_classes: int | None = None,
        dropout: float = 0.0,
        remat: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = {"channels": channels, "num_blocks": num_blocks, "num_heads": num_heads}
        super().__init__(dropout=dropout, remat=remat, dtype=dtype, rngs=rngs, **sizes)
        multipliers = _counts("multipliers", multipliers, 1)
        if not multipliers:
            raise ValueError("`multipliers` must hold one number a level; got none.")
        self.num_blocks = num_blocks
        self.num_levels = len(multipliers)
        self.channels = check_image_shape(shape)[2]
        self._check_size("shape", shape)
        widths = [channels * multiplier for multiplier in multipliers]
        self.attention_levels = _check_levels(attention_levels, widths, num_heads)
        cond_width = 4 * channels
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conditioning = Conditioning(
            cond_width, conditioning=conditioning, num_classes=num_classes, **options
        )
        self.conv_in = nnx.Conv(self.channels, channels, (3, 3), **options)
        self._make_blocks(widths, cond_width, num_heads=num_heads, dropout=dropout, **options)
        self.norm_out = GroupNorm(widths[0], param_dtype=param_dtype)
        zeros = nnx.initializers.zeros
        self.conv_out = nnx.Conv(widths[0], self.channels, (3, 3), kernel_init=zeros, **options)

    def _make_blocks(
        self,
        widths: list[int],
        cond_width: int,
        *,
        num_heads: int,
        dropout: float,
        **options: Any,
    ) -> None:
        """Make the blocks in the order in which they are applied."""
        context_width = cond_width if self.conditioning.has_context else None
        num_made = 0

        def block(in_channels: int, out_channels: int) -> ResidualBlock:
            nonlocal num_made
            num_made += 1
            return ResidualBlock(
                in_channels, out_channels, cond_width, dropout=dropout, site=num_made, **options
            )

        def attending(channels: int) -> AttentionBlock:
            return AttentionBlock(
                channels, num_heads=num_heads, context_width=context_width, **options
            )

        current = self.conv_in.out_features
        for level, width in enumerate(widths):
            for i in range(self.num_blocks):
                setattr(self, f"down_{level:02d}_{i:02d}", block(current, width))
                current = width
                if level in self.attention_levels:
                    setattr(self, f"down_attention_{level:02d}_{i:02d}", attending(current))
        self.middle_00 = block(current, current)
        self.attention = attending(current)
        self.middle_01 = block(current, current)
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.num_blocks):
                setattr(self, f"up_{level:02d}_{i:02d}", block(current + width, width))
                current = width
                if level in self.attention_levels:
                    setattr(self, f"up_attention_{level:02d}_{i:02d}", attending(current))

    def check_x(self, x: Any) -> Array:
        """Return images (B, H, W, C) in the dtype of the computation.

        Raises:
            TypeError: if `x` is not one array of real numbers.
            ValueError: if it has other channels or dimensions, or H or W is not divisible.
        """
        x = check_input(x, ("H", "W", self.channels), self.dtype)
        self._check_size("x", x.shape[1:])
        return x

    def evaluate(self, x: Array, c: Array, context: Context | None, rows: Key | None) -> Array:
        """Return the output (B, H, W, C)."""
        h = self.conv_in(x)
        c = jax.nn.silu(c)

        def block(name: str, h: Array) -> Array:
            return checkpointed(getattr(self, name), self.remat)(h, c, rows)

        def level_block(way: str, level: int, i: int, h: Array) -> Array:
            h = block(f"{way}_{level:02d}_{i:02d}", h)
            if level not in self.attention_levels:
                return h
            attend: AttentionBlock = getattr(self, f"{way}_attention_{level:02d}_{i:02d}")
            return attend(h, context)

        kept = []
        for level in range(self.num_levels):
            for i in range(self.num_blocks):
                h = level_block("down", level, i, h)
                kept.append(h)
            if level < self.num_levels - 1:
                h = downsample(h)
        h = block("middle_01", self.attention(block("middle_00", h), context))
        for level in reversed(range(self.num_levels)):
            for i in range(self.num_blocks):
                h = level_block("up", level, i, jnp.concatenate([h, kept.pop()], axis=-1))
            if level:
                h = upsample(h)
        return self.conv_out(jax.nn.silu(self.norm_out(h)))

    def _check_size(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse images (H, W, C) that cannot be halved as often as there are levels."""
        factor = 2 ** (self.num_levels - 1)
        if shape[0] % factor or shape[1] % factor:
            raise ValueError(
                f"`{name}` must have H and W divisible by {factor} for {self.num_levels} levels; "
                f"got {shape}. Give fewer multipliers, or pad the images."
            )


def _counts(name: str, values: Any, least: int) -> tuple[int, ...]:
    """Return whole numbers of at least `least`."""
    if not isinstance(values, tuple | list):
        raise TypeError(f"`{name}` must be a tuple of whole numbers; got {checks.shown(values)}.")
    return tuple(checks.count(name, value, least) for value in values)


def _check_levels(levels: Any, widths: list[int], num_heads: int) -> tuple[int, ...]:
    """Return the levels with attention, whose channels and the last level's the heads divide."""
    levels = _counts("attention_levels", levels, 0)
    if any(level >= len(widths) for level in levels):
        raise ValueError(
            f"`attention_levels` must lie in 0..{len(widths) - 1}, one of the levels that "
            f"`multipliers` has; got {levels}."
        )
    for level in {*levels, len(widths) - 1}:
        if widths[level] % num_heads:
            of = "the last level" if level == len(widths) - 1 else f"level {level}"
            raise ValueError(
                f"`num_heads` must divide the {widths[level]} channels of {of}; got {num_heads}."
            )
    return levels
