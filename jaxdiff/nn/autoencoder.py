r"""The autoencoder of latent diffusion, whose latents are Gaussian.

The encoder is a convolution; levels of residual blocks, each but the last ending with a convolution
of stride 2; in the middle a block, attention and a block; and a convolution to 2 C channels, mean
and log-variance of the latents. The decoder is a convolution from C channels; the middle; levels,
one block more each, all but the last ending with repetition and a convolution; and a convolution.
See `residual` for the blocks; both end with conv(silu(norm(h))).

Latents are scaled and shifted: see `gaussian_latents`.

Source: Rombach et al. 2022 (arXiv:2112.10752), sections 3.1 and D.1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff import checks
from jaxdiff.nn.gaussian_latents import GaussianAutoencoder, check_widths
from jaxdiff.nn.layers import GroupNorm, Linear, upsample
from jaxdiff.nn.residual import AttentionBlock, ResidualBlock
from jaxdiff.typing import Array


class Levels(nnx.Module):
    """Residual blocks at one resolution after the other.

    Args:
        channels: of what comes in.
        widths: channels of the levels.
        num_blocks: of a level.
        doubling: whether a level has twice the resolution of the last, or half of it.
        norm: options of the normalisations.
        options: of the layers.
    """

    def __init__(
        self,
        channels: int,
        widths: tuple[int, ...],
        *,
        num_blocks: int,
        doubling: bool,
        norm: dict[str, Any],
        **options: Any,
    ) -> None:
        self.num_levels, self.num_blocks, self.doubling = len(widths), num_blocks, doubling
        # Halving sees one more row and column at the far sides alone.
        how = {"padding": "SAME"} if doubling else {"padding": ((0, 1), (0, 1)), "strides": 2}
        for level, width in enumerate(widths):
            for i in range(num_blocks):
                block = ResidualBlock(channels, width, norm=norm, **options)
                setattr(self, f"block_{level:02d}_{i:02d}", block)
                channels = width
            if level < len(widths) - 1:
                resize = nnx.Conv(width, width, (3, 3), **how, **options)
                setattr(self, f"resize_{level:02d}", resize)

    def __call__(self, h: Array) -> Array:
        """Map (B, H, W, channels) to (B, H', W', widths[-1])."""
        for level in range(self.num_levels):
            for i in range(self.num_blocks):
                h = getattr(self, f"block_{level:02d}_{i:02d}")(h)
            if level < self.num_levels - 1:
                h = getattr(self, f"resize_{level:02d}")(upsample(h) if self.doubling else h)
        return h


class Middle(nnx.Module):
    """A block, attention of one head where `attends` says so, and a block, of C channels."""

    def __init__(
        self, channels: int, *, attends: bool, norm: dict[str, Any], **options: Any
    ) -> None:
        self.block_00 = ResidualBlock(channels, channels, norm=norm, **options)
        self.attention = (
            AttentionBlock(channels, num_heads=1, norm=norm, **options) if attends else None
        )
        self.block_01 = ResidualBlock(channels, channels, norm=norm, **options)

    def __call__(self, h: Array) -> Array:
        """Map (B, H, W, C) to the same shape."""
        h = self.block_00(h)
        return self.block_01(h if self.attention is None else self.attention(h))


class Way(nnx.Module):
    """From images to twice the channels of latents, or back; arguments as of :class:`Autoencoder`.

    Args:
        in_channels: of what comes in.
        out_channels: of what goes out.
        widths: channels of the levels, in the order in which they are gone through.
        num_blocks: of a level.
        doubling: whether it is the way back: the middle first, then levels of rising resolution.
        attends: whether there is attention in the middle.
        norm: options of the normalisations.
        options: of the layers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: tuple[int, ...],
        *,
        num_blocks: int,
        doubling: bool,
        attends: bool,
        norm: dict[str, Any],
        **options: Any,
    ) -> None:
        self.doubling = doubling
        self.conv_in = nnx.Conv(in_channels, widths[0], (3, 3), **options)
        deepest = widths[0] if doubling else widths[-1]

        def middle() -> Middle:
            return Middle(deepest, attends=attends, norm=norm, **options)

        if doubling:  # made in the order in which they are gone through
            self.middle = middle()
        self.levels = Levels(
            widths[0], widths, num_blocks=num_blocks, doubling=doubling, norm=norm, **options
        )
        if not doubling:
            self.middle = middle()
        self.norm_out = GroupNorm(widths[-1], param_dtype=options["param_dtype"], **norm)
        self.conv_out = nnx.Conv(widths[-1], out_channels, (3, 3), **options)

    def __call__(self, x: Array) -> Array:
        """Map (B, H, W, in_channels) to (B, H', W', out_channels)."""
        h = self.conv_in(x)
        h = self.levels(self.middle(h)) if self.doubling else self.middle(self.levels(h))
        return self.conv_out(jax.nn.silu(self.norm_out(h)))


class Autoencoder(GaussianAutoencoder):
    """Encodes images as Gaussians of latents, and decodes latents.

    Its methods are pure functions of the parameters by name:

        params, encode = nn.functional(autoencoder, "encode")
        _, decode = nn.functional(autoencoder, "decode")

    Args:
        channels: of images.
        out_channels: of what is decoded; None is `channels`.
        latent_channels: C, of latents.
        widths: channels of each level, the full resolution first.
        num_blocks: residual blocks a level of the encoder; the decoder has one more.
        attends: whether there is attention in the middle.
        mixes: whether latents are mixed by a matrix each at the end of the encoder (2 C x 2 C) and
            at the beginning of the decoder (C x C).
        scale: of the latents.
        shift: of the latents.
        max_groups: as of :class:`jaxdiff.nn.layers.GroupNorm`.
        epsilon: likewise.
        dtype: of the computation; normalisation and softmax are in float32 at least.
        param_dtype: of the parameters.
        rngs: source of the initial parameters.

    Raises:
        TypeError: if a size is no whole number, or `scale` or `shift` no number.
        ValueError: if a size is below 1, there is no level, or `scale` is not above 0.
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        out_channels: int | None = None,
        latent_channels: int = 4,
        widths: tuple[int, ...] = (128, 256, 512, 512),
        num_blocks: int = 2,
        attends: bool = True,
        mixes: tuple[bool, bool] = (True, True),
        scale: float = 1.0,
        shift: float = 0.0,
        max_groups: int = 32,
        epsilon: float = 1e-6,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        out_channels = channels if out_channels is None else out_channels
        sizes = {"channels": channels, "out_channels": out_channels, "num_blocks": num_blocks}
        sizes |= {"max_groups": max_groups}
        for name, size in sizes.items():
            checks.count(name, size)
        widths = check_widths(widths)
        super().__init__(
            channels,
            latent_channels=latent_channels,
            factor=2 ** (len(widths) - 1),
            scale=scale,
            shift=shift,
            dtype=dtype,
        )
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared = {
            "attends": attends,
            "norm": {"max_groups": max_groups, "epsilon": epsilon},
            **options,
        }
        wide = 2 * latent_channels
        self.encoder = Way(channels, wide, widths, num_blocks=num_blocks, doubling=False, **shared)
        self.decoder = Way(
            latent_channels,
            out_channels,
            widths[::-1],
            num_blocks=num_blocks + 1,
            doubling=True,
            **shared,
        )
        last, first = mixes
        self.mix_out = Linear(wide, wide, **options) if last else None
        self.mix_in = Linear(latent_channels, latent_channels, **options) if first else None

    def _moments(self, x: Array) -> Array:
        h = self.encoder(x)
        return h if self.mix_out is None else self.mix_out(h)

    def _images(self, z: Array) -> Array:
        return self.decoder(z if self.mix_in is None else self.mix_in(z))
