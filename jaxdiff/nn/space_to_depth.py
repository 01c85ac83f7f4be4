r"""A small autoencoder of space-to-depth convolutions, which trains in minutes on a CPU.

A level of the encoder folds 2 x 2 pixels into channels, convolves them to the level's width and
adds residual blocks

    h <- h + conv(relu(norm(conv(relu(norm(h))))))

through two thirds of the channels, the norms dividing by the root of the mean square over channels;
a convolution of relu(norm(h)) makes mean and log-variance of the latents. The decoder mirrors it: a
convolution, then per level the blocks, a convolution to four times the channels of the level below
and the unfolding of them into 2 x 2 pixels. All convolutions are of 3 x 3 pixels.

Sources: the folding is that of Shi et al. 2016 (arXiv:1609.05158), there only of the way back; the
norm is that of Zhang and Sennrich 2019 (arXiv:1910.07467); the blocks' order is that of He et al.
2016 (arXiv:1603.05027).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff import checks
from jaxdiff.nn.gaussian_latents import GaussianAutoencoder, check_widths
from jaxdiff.nn.layers import RMSNorm
from jaxdiff.typing import Array


def space_to_depth(x: Array) -> Array:
    """Fold 2 x 2 pixels into channels: (B, 2H, 2W, C) to (B, H, W, 4 C)."""
    num_rows, height, width, channels = x.shape
    x = x.reshape(num_rows, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(num_rows, height // 2, width // 2, 4 * channels)


def depth_to_space(x: Array) -> Array:
    """Undo :func:`space_to_depth`: (B, H, W, 4 C) to (B, 2H, 2W, C)."""
    num_rows, height, width, channels = x.shape
    x = x.reshape(num_rows, height, width, 2, 2, channels // 4)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(num_rows, 2 * height, 2 * width, channels // 4)


class Block(nnx.Module):
    """One residual block of C channels, which adds nothing at first.

    Args:
        channels: C; within it 2 C / 3.
        options: of its layers.
    """

    def __init__(self, channels: int, **options: Any) -> None:
        hidden, param_dtype = max(1, 2 * channels // 3), options["param_dtype"]
        zeros = nnx.initializers.zeros
        self.norm_in = RMSNorm(channels, param_dtype=param_dtype)
        self.conv_in = nnx.Conv(channels, hidden, (3, 3), **options)
        self.norm_out = RMSNorm(hidden, param_dtype=param_dtype)
        self.conv_out = nnx.Conv(hidden, channels, (3, 3), kernel_init=zeros, **options)

    def __call__(self, h: Array) -> Array:
        """Map (B, H, W, C) to the same shape."""
        inner = self.conv_in(jax.nn.relu(self.norm_in(h)))
        return h + self.conv_out(jax.nn.relu(self.norm_out(inner)))


class Blocks(nnx.Module):
    """Residual blocks of one level; arguments as of :class:`SpaceToDepthAutoencoder`."""

    def __init__(self, channels: int, num_blocks: int, **options: Any) -> None:
        self.num_blocks = num_blocks
        for i in range(num_blocks):
            setattr(self, f"block_{i:02d}", Block(channels, **options))

    def __call__(self, h: Array) -> Array:
        """Map (B, H, W, C) to the same shape."""
        for i in range(self.num_blocks):
            h = getattr(self, f"block_{i:02d}")(h)
        return h


class Encoder(nnx.Module):
    """From images to twice the channels of latents."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: tuple[int, ...],
        *,
        num_blocks: int,
        **options: Any,
    ) -> None:
        self.num_levels = len(widths)
        for level, (below, width) in enumerate(zip((in_channels, *widths), widths, strict=False)):
            setattr(self, f"conv_{level:02d}", nnx.Conv(4 * below, width, (3, 3), **options))
            setattr(self, f"blocks_{level:02d}", Blocks(width, num_blocks, **options))
        self.norm_out = RMSNorm(widths[-1], param_dtype=options["param_dtype"])
        self.conv_out = nnx.Conv(widths[-1], out_channels, (3, 3), **options)

    def __call__(self, x: Array) -> Array:
        """Map (B, H, W, in_channels) to (B, H', W', out_channels)."""
        for level in range(self.num_levels):
            x = getattr(self, f"conv_{level:02d}")(space_to_depth(x))
            x = getattr(self, f"blocks_{level:02d}")(x)
        return self.conv_out(jax.nn.relu(self.norm_out(x)))


class Decoder(nnx.Module):
    """From latents to images; `widths` as of the encoder, which is mirrored."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: tuple[int, ...],
        *,
        num_blocks: int,
        **options: Any,
    ) -> None:
        self.num_levels = len(widths)
        self.conv_in = nnx.Conv(in_channels, widths[-1], (3, 3), **options)
        for level in reversed(range(self.num_levels)):
            width, below = widths[level], widths[level - 1] if level else out_channels
            setattr(self, f"blocks_{level:02d}", Blocks(width, num_blocks, **options))
            if level == 0:
                self.norm_out = RMSNorm(width, param_dtype=options["param_dtype"])
            setattr(self, f"conv_{level:02d}", nnx.Conv(width, 4 * below, (3, 3), **options))

    def __call__(self, z: Array) -> Array:
        """Map (B, H', W', in_channels) to (B, H, W, out_channels)."""
        h = self.conv_in(z)
        for level in reversed(range(self.num_levels)):
            h = getattr(self, f"blocks_{level:02d}")(h)
            h = h if level else jax.nn.relu(self.norm_out(h))
            h = depth_to_space(getattr(self, f"conv_{level:02d}")(h))
        return h


class SpaceToDepthAutoencoder(GaussianAutoencoder):
    """Encodes images as Gaussians of latents, and decodes latents; small, and fast on a CPU.

    As it stands it has 163,220 parameters, and images of 32 x 32 pixels have latents of 8 x 8 x 4.
    Its methods are pure functions of the parameters as those of :class:`Autoencoder` are.

    Args:
        channels: of images.
        latent_channels: C, of latents.
        widths: channels of each level, half the resolution of the images first.
        num_blocks: residual blocks a level, of encoder and decoder each; 0 is none.
        scale: of the latents.
        shift: of the latents.
        dtype: of the computation; normalisation is in float32 at least.
        param_dtype: of the parameters.
        rngs: source of the initial parameters.

    Raises:
        TypeError: if a size is no whole number, or `scale` or `shift` no number.
        ValueError: if a size is out of range, there is no level, or `scale` is not above 0.
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        latent_channels: int = 4,
        widths: tuple[int, ...] = (24, 48),
        num_blocks: int = 1,
        scale: float = 1.0,
        shift: float = 0.0,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        widths = check_widths(widths)
        super().__init__(
            channels,
            latent_channels=latent_channels,
            factor=2 ** len(widths),
            scale=scale,
            shift=shift,
            dtype=dtype,
        )
        options: dict[str, Any] = {
            "num_blocks": checks.count("num_blocks", num_blocks, 0),
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.encoder = Encoder(channels, 2 * latent_channels, widths, **options)
        self.decoder = Decoder(latent_channels, channels, widths, **options)

    def _moments(self, x: Array) -> Array:
        return self.encoder(x)

    def _images(self, z: Array) -> Array:
        return self.decoder(z)
