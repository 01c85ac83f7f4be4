r"""A network that tells images from reconstructions, patch by patch.

Convolutions of 4 x 4 pixels and leaky rectifiers, of stride 2 but for the last level and the last
convolution, which makes one logit of every patch. All levels but the first are normalised, by
group and so example by example: with statistics of a batch, as published, a row would depend on
the others.

With widths (64, 128, 256, 512) a logit sees 70 x 70 pixels, the published size; with one level less
34 x 34, and with one more 142 x 142.

Source: Isola et al. 2017 (arXiv:1611.07004), section 3.2.2 and appendix 6.1.2, where the widths are
C64-C128-C256-C512; as Rombach et al. 2022 (arXiv:2112.10752), section 3.1, train autoencoders.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff import checks
from jaxdiff.nn.gaussian_latents import check_widths
from jaxdiff.nn.layers import GroupNorm, check_input
from jaxdiff.typing import Array


class PatchDiscriminator(nnx.Module):
    """Logits of patches: high where they are of an image, low where of a reconstruction.

    Args:
        channels: of images.
        widths: channels of each level.
        max_groups: as of :class:`jaxdiff.nn.layers.GroupNorm`.
        slope: of the rectifiers below 0.
        dtype: of the computation; normalisation is in float32 at least.
        param_dtype: of the parameters.
        rngs: source of the initial parameters.

    Raises:
        TypeError: if a size is no whole number, or `slope` no number.
        ValueError: if a size is below 1, there is no level, or `slope` is not in [0, 1].
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        widths: tuple[int, ...] = (64, 128, 256),
        max_groups: int = 32,
        slope: float = 0.2,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.channels = checks.count("channels", channels)
        widths, max_groups = check_widths(widths), checks.count("max_groups", max_groups)
        self.slope = float(checks.number("slope", slope, 0.0, 1.0))
        self.num_levels, self.dtype = len(widths), dtype
        self.least = 3 * 2 ** (len(widths) - 1)
        options: dict[str, Any] = {
            "kernel_init": nnx.initializers.normal(0.02),
            "padding": ((1, 1), (1, 1)),
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        for level, (below, width) in enumerate(zip((channels, *widths), widths, strict=False)):
            strides = 2 if level < len(widths) - 1 else 1
            conv = nnx.Conv(below, width, (4, 4), strides=strides, **options)
            setattr(self, f"conv_{level:02d}", conv)
            if level:
                norm = GroupNorm(width, max_groups=max_groups, param_dtype=param_dtype)
                setattr(self, f"norm_{level:02d}", norm)
        self.conv_out = nnx.Conv(widths[-1], 1, (4, 4), **options)

    def __call__(self, x: Array) -> Array:
        """Return the logits of an image's patches.

        Args:
            x: shape (B, H, W, channels), H and W at least 3 * 2^(levels - 1).

        Returns:
            Shape (B, H', W'), in float32 at least.

        Raises:
            TypeError: if `x` is not one array of real numbers.
            ValueError: if its shape is another.
        """
        h = check_input(x, ("H", "W", self.channels), self.dtype)
        if min(h.shape[1:3]) < self.least:
            raise ValueError(
                f"`x` must have H and W of at least {self.least}, for one patch; got {h.shape}. "
                "Give the discriminator fewer `widths`."
            )
        for level in range(self.num_levels):
            h = getattr(self, f"conv_{level:02d}")(h)
            h = getattr(self, f"norm_{level:02d}")(h) if level else h
            h = jax.nn.leaky_relu(h, self.slope)
        logits = self.conv_out(h)[..., 0]
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
