r"""The vision transformer of DINOv2, which makes features of images.

The image is cut into patches, each of which becomes a token; a class token stands first, registers
may follow it. Every block is

    h <- h + s1 * proj(attention(qkv(norm(h))))
    h <- h + s2 * mlp(norm(h))

with learned scales s1 and s2 (C,), and the feature is the normalised class token. The perceptron
is of two layers with gelu between, or outer(silu(g) * u) with (g, u) = inner(h).

Positions are learned on one grid. On another they are interpolated, bicubically: row i of n reads
the m learned rows at m / (n + offset) * (i + 1/2) - 1/2.

Source: Oquab et al. 2023 (arXiv:2304.07193), appendix B; the transformer is that of Dosovitskiy et
al. 2021 (arXiv:2010.11929), the scales those of Touvron et al. 2021 (arXiv:2103.17239), eq. 1, the
gated perceptron that of Shazeer 2020 (arXiv:2002.05202), the registers those of Darcet et al. 2024
(arXiv:2309.16588).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff import checks
from jaxdiff.nn.dit import patchify
from jaxdiff.nn.layers import LayerNorm, Linear, attention, check_input
from jaxdiff.typing import Array


class VisionBlock(nnx.Module):
    """One block; `options` go to its layers."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        hidden: int,
        gated: bool,
        epsilon: float,
        **options: Any,
    ) -> None:
        self.num_heads = num_heads
        self.gated = gated
        param_dtype = options["param_dtype"]
        self.attention_norm = LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype)
        self.qkv = Linear(width, 3 * width, **options)
        self.projection = Linear(width, width, **options)
        self.attention_scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.mlp_norm = LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype)
        self.inner = Linear(width, 2 * hidden if gated else hidden, **options)
        self.outer = Linear(hidden, width, **options)
        self.mlp_scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, h: Array) -> Array:
        """Map tokens (B, N, C) to the same shape."""
        mixed = self.projection(attention(self.qkv(self.attention_norm(h)), self.num_heads))
        h = h + mixed * self._row(self.attention_scale, h)
        inner = self.inner(self.mlp_norm(h))
        if self.gated:
            gate, inner = jnp.split(inner, 2, axis=-1)
            inner = jax.nn.silu(gate) * inner
        else:
            inner = jax.nn.gelu(inner, approximate=False)
        return h + self.outer(inner) * self._row(self.mlp_scale, h)

    @staticmethod
    def _row(scale: nnx.Param, h: Array) -> Array:
        return scale[...][jnp.newaxis, jnp.newaxis].astype(h.dtype)


class VisionTransformer(nnx.Module):
    """Makes features of images, of any size that the patches divide.

    Args:
        image_size: height and width of the images whose positions are learned, a multiple of
            `patch_size`.
        patch_size: p.
        num_channels: of the images.
        width: C, a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: of the attention.
        hidden: width of the perceptrons' hidden layer.
        gated: whether the perceptrons are gated.
        num_registers: how many tokens there are beside those of class and patches.
        offset: added to a grid's size where positions are interpolated.
        antialias: smooth the positions where they are interpolated to fewer.
        epsilon: added to the variance in the normalisations.
        dtype: of the computation; normalisation, softmax and interpolation are in float32 at least.
        param_dtype: of the parameters.
        rngs: source of the initial parameters.

    Raises:
        TypeError: if a size is no whole number.
        ValueError: if a size is below 1 or does not divide as said above.
    """

    def __init__(
        self,
        image_size: int,
        *,
        patch_size: int,
        num_channels: int = 3,
        width: int,
        depth: int,
        num_heads: int,
        hidden: int,
        gated: bool = False,
        num_registers: int = 0,
        offset: float = 0.0,
        antialias: bool = False,
        epsilon: float = 1e-6,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = {"image_size": image_size, "patch_size": patch_size, "num_channels": num_channels}
        sizes |= {"width": width, "depth": depth, "num_heads": num_heads, "hidden": hidden}
        for name, size in sizes.items():
            checks.count(name, size)
        checks.count("num_registers", num_registers, 0)
        if image_size % patch_size or width % num_heads:
            raise ValueError(
                "`patch_size` must divide `image_size`, and `num_heads` `width`; "
                f"got {patch_size} for {image_size} and {num_heads} for {width}."
            )
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.depth = depth
        self.grid = image_size // patch_size
        self.offset = offset
        self.antialias = antialias
        self.dtype = dtype
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        small = nnx.initializers.normal(0.02)

        def tokens(*shape: int) -> nnx.Param:
            return nnx.Param(small(rngs.params(), shape, param_dtype))

        self.input = Linear(patch_size**2 * num_channels, width, **options)
        self.class_token = tokens(width)
        self.registers = tokens(num_registers, width) if num_registers else None
        self.positions = tokens(1 + self.grid**2, width)
        for i in range(depth):
            block = VisionBlock(
                width, num_heads=num_heads, hidden=hidden, gated=gated, epsilon=epsilon, **options
            )
            setattr(self, f"block_{i:02d}", block)
        self.norm = LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype)

    def __call__(self, x: Array) -> Array:
        """Make features.

        Args:
            x: images (B, H, W, num_channels), normalised as the network wants them.

        Returns:
            Shape (B, C), in the dtype of the computation but at least float32.

        Raises:
            TypeError: if `x` is not one array of real numbers.
            ValueError: if its shape is another, or the patches do not divide H and W.
        """
        h, _ = self._encoded(x)
        return self._normalised(h[:, 0])

    def patches(self, x: Array) -> Array:
        """Make features of each patch.

        Args:
            x: as above.

        Returns:
            Shape (B, H / p, W / p, C), in the dtype of the computation but at least float32.

        Raises:
            TypeError: as above.
            ValueError: likewise.
        """
        h, (rows, columns) = self._encoded(x)
        h = self._normalised(h[:, -rows * columns :])
        return h.reshape(h.shape[0], rows, columns, -1)

    def _normalised(self, h: Array) -> Array:
        return self.norm(h).astype(jnp.promote_types(h.dtype, jnp.float32))

    def _encoded(self, x: Array) -> tuple[Array, tuple[int, int]]:
        """Return all tokens, those of the patches last, and the rows and columns of patches."""
        x = check_input(x, ("H", "W", self.num_channels), self.dtype)
        rows, columns = x.shape[1] // self.patch_size, x.shape[2] // self.patch_size
        if (rows * self.patch_size, columns * self.patch_size) != x.shape[1:3]:
            raise ValueError(
                f"`x` must have H and W divisible by {self.patch_size}, the size of a patch; "
                f"got {x.shape}. Resize or crop the images."
            )
        h = self.input(patchify(x, self.patch_size))
        first = jnp.broadcast_to(self.class_token[...].astype(h.dtype), (h.shape[0], 1, h.shape[2]))
        h = jnp.concatenate([first, h], axis=1)
        h = h + self._positions(rows, columns).astype(h.dtype)[jnp.newaxis]
        if self.registers is not None:
            registers = self.registers[...].astype(h.dtype)[jnp.newaxis]
            registers = jnp.broadcast_to(registers, (h.shape[0], *registers.shape[1:]))
            h = jnp.concatenate([h[:, :1], registers, h[:, 1:]], axis=1)
        for i in range(self.depth):
            h = getattr(self, f"block_{i:02d}")(h)
        return h, (rows, columns)

    def _positions(self, rows: int, columns: int) -> Array:
        """Return the positions (1 + rows * columns, C) of the class and of a grid."""
        positions = self.positions[...]
        if rows == columns == self.grid:
            return positions
        positions = positions.astype(jnp.promote_types(positions.dtype, jnp.float32))
        grid = positions[1:].reshape(self.grid, self.grid, -1)
        down, across = (
            jnp.asarray(
                bicubic(self.grid, size, offset=self.offset, antialias=self.antialias),
                grid.dtype,
            )
            for size in (rows, columns)
        )
        grid = jnp.einsum("im,jn,mnc->ijc", down, across, grid, precision="highest")
        return jnp.concatenate([positions[:1], grid.reshape(rows * columns, -1)])


def bicubic(old: int, new: int, *, offset: float = 0.0, antialias: bool = False) -> np.ndarray:
    """Return the matrix (new, old) that interpolates `old` numbers at `new` places.

    Args:
        old: how many there are.
        new: how many there shall be.
        offset: added to `new` in the scale.
        antialias: widen the kernel where there are fewer places than numbers, leave out what it
            reaches beyond the ends, and take -1/2 for its parameter, not -3/4; without, the
            outermost numbers are repeated there.

    Source: Keys 1981 (doi:10.1109/TASSP.1981.1163711), eq. 4 with a parameter; as torch has it.
    """
    scale = old / (new + offset)
    stretch = max(scale, 1.0) if antialias else 1.0
    centres = scale * (np.arange(new) + 0.5) - 0.5
    reach = int(np.ceil(2.0 * stretch)) + 1
    places = np.floor(centres)[:, np.newaxis] + np.arange(-reach, reach + 1)[np.newaxis]
    weights = _cubic((places - centres[:, np.newaxis]) / stretch, -0.5 if antialias else -0.75)
    if antialias:
        weights *= (places >= 0) & (places < old)
        weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((new, old))
    index = np.clip(places, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new)[:, np.newaxis], index), weights)
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Return the cubic convolution kernel, which is 0 from |x| = 2 on."""
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x**2 + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
