"""What autoencoders share whose latents are Gaussian: their two methods, scale and shift.

A denoising network sees latents z = scale (z' - shift), z' being those of the encoder, by which
they have mean about 0 and variance about 1. That is in here: what is encoded, and decoded, is z.

Source: Rombach et al. 2022 (arXiv:2112.10752), sections 3.1 and D.1 (scale); the shift is that of
Esser et al. 2024 (arXiv:2403.03206).
"""

import abc
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxdiff import checks
from jaxdiff.nn.layers import check_input
from jaxdiff.typing import Array

MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0
"""Between which the log-variance of latents is kept."""


class GaussianAutoencoder(nnx.Module, abc.ABC):
    """Encodes images as Gaussians of latents, and decodes latents; a subclass has the networks.

    It defines ``_moments``, from images (B, H, W, channels) to means and log-variances side by side
    (B, H / factor, W / factor, 2 C), and ``_images``, from latents (B, H', W', C) to images.

    Args:
        channels: of images.
        latent_channels: C, of latents.
        factor: by which latents are smaller than images.
        scale: of the latents.
        shift: of the latents.
        dtype: of the computation.

    Raises:
        TypeError: if a size is no whole number, or `scale` or `shift` no number.
        ValueError: if a size is below 1, or `scale` is not above 0.
    """

    def __init__(
        self,
        channels: int,
        *,
        latent_channels: int,
        factor: int,
        scale: float,
        shift: float,
        dtype: Any,
    ) -> None:
        self.channels = checks.count("channels", channels)
        self.latent_channels = checks.count("latent_channels", latent_channels)
        self.scale = float(checks.number("scale", scale, 0.0, above=True))
        self.shift = float(checks.number("shift", shift))
        self.factor, self.dtype = factor, dtype

    @abc.abstractmethod
    def _moments(self, x: Array) -> Array:
        """Return means and log-variances of the latents of images."""

    @abc.abstractmethod
    def _images(self, z: Array) -> Array:
        """Return the images of latents."""

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Encode images.

        Args:
            x: shape (B, H, W, channels), in [-1, 1]; H and W are multiples of `factor`.

        Returns:
            Mean and standard deviation of the latents, (B, H', W', C), in float32 at least.

        Raises:
            TypeError: if `x` is not one array of real numbers.
            ValueError: if its shape is another.
        """
        x = check_input(x, ("H", "W", self.channels), self.dtype)
        if x.shape[1] % self.factor or x.shape[2] % self.factor:
            raise ValueError(
                f"`x` must have H and W divisible by {self.factor}; got {x.shape}. Resize, crop or "
                "pad the images."
            )
        h = self._moments(x)
        h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
        mean, log_variance = jnp.split(h, 2, axis=-1)
        log_variance = jnp.clip(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
        return self.scale * (mean - self.shift), self.scale * jnp.exp(0.5 * log_variance)

    def decode(self, z: Array) -> Array:
        """Decode latents.

        Args:
            z: shape (B, H', W', C).

        Returns:
            Images (B, H, W, channels of what is decoded), about [-1, 1], in float32 at least.

        Raises:
            TypeError: if `z` is not one array of real numbers.
            ValueError: if its shape is another.
        """
        wide = jnp.promote_types(self.dtype, jnp.float32)
        z = check_input(z, ("H", "W", self.latent_channels), wide, name="z")
        x = self._images((z / self.scale + self.shift).astype(self.dtype))
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_widths(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the channels of each level.

    Raises:
        TypeError: if one is no whole number.
        ValueError: if one is below 1, or there is none.
    """
    widths = tuple(checks.count("widths", width) for width in widths)
    if not widths:
        raise ValueError("`widths` must hold one number a level; got none.")
    return widths
