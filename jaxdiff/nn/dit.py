r"""The diffusion transformer with adaLN-Zero blocks.

The image is cut into N = (H / p)(W / p) patches of p x p pixels; each becomes a token of C
numbers. With c = silu(embedding of time and conditioning), every block is

    (b1, g1, a1, b2, g2, a2) = W c + w                           (6 C numbers an example)
    h <- h + a1 * proj(attention(qkv((1 + g1) * norm(h) + b1)))
    h <- h + a2 * mlp((1 + g2) * norm(h) + b2)

with W = w = 0 at first, so that each block starts as the identity; the output layer starts at
zero too, hence so does the network. Where it is conditioned on sequences,

    h <- h + cross(norm(h), tokens)

stands between the two, cross being cross-attention whose projection starts at zero.

Source: Peebles and Xie 2023 (arXiv:2212.09748), section 3.2 and Figure 3; for cross-attention Chen
et al. 2024 (arXiv:2310.00426), section 2.3, with the normalisation, which they do without. Instead
the tokens of the context may be a second stream: see :class:`jaxdiff.nn.joint.JointBlock`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff import checks
from jaxdiff.nn.conditioning import Conditions, Context
from jaxdiff.nn.joint import JointBlock
from jaxdiff.nn.layers import (
    CrossAttention,
    Linear,
    attend,
    check_image_shape,
    check_input,
    checkpointed,
    layer_norm,
)
from jaxdiff.nn.network import Conditioning, Network
from jaxdiff.nn.streams import ACTIVATIONS, Stream, modulate
from jaxdiff.nn.times import LogSNR, Time
from jaxdiff.typing import Array, Key


def patchify(x: Array, patch_size: int) -> Array:
    """Cut images (B, H, W, C) into tokens (B, N, p p C), row by row."""
    num_rows, height, width, channels = x.shape
    p = patch_size
    x = x.reshape(num_rows, height // p, p, width // p, p, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(num_rows, -1, p * p * channels)


def unpatchify(tokens: Array, patch_size: int, shape: tuple[int, int, int]) -> Array:
    """Undo :func:`patchify`: tokens (B, N, p p C) to images (B, H, W, C)."""
    height, width, channels = shape
    p = patch_size
    x = tokens.reshape(-1, height // p, width // p, p, p, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *shape)


def sincos_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Return fixed position embeddings (rows * columns, width), in float32.

    The first half encodes the column, the second the row, each as sines then cosines with
    frequencies 10000^(-4 k / width), k = 0..width/4 - 1.

    Source: the 2-D form of Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, that Peebles
    and Xie use.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [np.outer(position, frequencies) for position in (column, row)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


class DiTBlock(Stream):
    """One adaLN-Zero block; `cross` is whether it attends to a context, the rest as a Stream's."""

    def __init__(self, width: int, *, cross: bool, **given: Any) -> None:
        super().__init__(width, **given)
        names = ("num_heads", "query_key_norm", "dtype", "param_dtype", "rngs")
        asking = {name: given[name] for name in names}
        self.cross = CrossAttention(width, width, **asking) if cross else None

    def __call__(self, h: Array, c: Array, context: Context | None, key: Key | None) -> Array:
        """Map tokens (B, N, C) to the same shape, given activated conditioning (B, C)."""
        first, second = self.modulations(c)
        mixed = attend(*self.asked(h, first), self.num_heads)
        h = self.attended(h, mixed, first, key)
        if self.cross is not None and context is not None:
            h = h + self.cross(layer_norm(h), *context)
        return self.perceived(h, second, key)


class DiT(Network):
    """A diffusion transformer on images of one size, as its positions are fixed.

    Speed on CPU, one adamw step of 128 images of 8 x 8 x 1 at the default sizes, all variants
    interleaved on two loaded cores: dense layers on flattened tokens 1.35 times as fast as on
    (B, N, C), normalisation by products 1.16 times as fast as the one-pass variance, and with
    plain attention 2.6 times in all. relu would gain another 12%; attention by einsum or
    `jax.nn.dot_product_attention`, one modulation layer for all blocks, tokens first, a
    narrower conditioning and silu for gelu change it by less than the noise.

    Args:
        shape: (H, W, C) of the images.
        patch_size: p, a divisor of H and W.
        width: of the tokens, a multiple of 4 and of `num_heads`.
        depth: number of blocks.
        num_heads: of the attention.
        mlp_ratio: width of the perceptrons' hidden layer over `width`.
        learned_positions: learn the position embedding, starting from the fixed one.
        dropout: rate at the end of both branches of a block.
        time: what the time of the network is; ``nn.Steps()`` is that of the published ones.
        extra_channels: how many channels the output has beyond C. They are left out, as the
            learned variance of published weights is.
        mlp_epsilon: added to the variance in the normalisation before the perceptrons.
        text_attention: how tokens of the conditioning are attended to: by cross-attention, or
            jointly with those of the image in one attention, as a second stream.
        query_key_norm: normalise queries and keys by :class:`jaxdiff.nn.layers.RMSNorm`.
        activation: of the blocks' perceptrons.
        conditioning, num_classes, remat, dtype, param_dtype, rngs: what all networks take, see
            :class:`jaxdiff.nn.network.Network`.

    Raises:
        TypeError: if an option is of another kind.
        ValueError: if a size is below 1, does not divide as said above, `dropout` lies outside
            [0, 1), or a choice is none.

    Source: Peebles and Xie 2023 (arXiv:2212.09748), with log-SNR for the time step unless told
    otherwise, and dropout, which they do not use. Joint attention is that of Esser et al. 2024
    (arXiv:2403.03206), section 4 and Figure 2; the squared relu that of So et al. 2021
    (arXiv:2109.08668).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        patch_size: int = 2,
        width: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: int = 4,
        learned_positions: bool = False,
        conditioning: Conditions | None = None,
        num_classes: int | None = None,
        dropout: float = 0.0,
        time: Time = LogSNR(),  # noqa: B008 - frozen
        extra_channels: int = 0,
        mlp_epsilon: float = 1e-6,
        text_attention: Literal["cross", "joint"] = "cross",
        query_key_norm: bool = False,
        activation: Literal["gelu", "relu_squared"] = "gelu",
        remat: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.shape = check_image_shape(shape)
        sizes = {"patch_size": patch_size, "width": width, "depth": depth, "num_heads": num_heads}
        sizes["mlp_ratio"] = mlp_ratio
        super().__init__(dropout=dropout, remat=remat, dtype=dtype, rngs=rngs, **sizes)
        if self.shape[0] % patch_size or self.shape[1] % patch_size:
            raise ValueError(
                f"`patch_size` must divide H and W; got {patch_size} for {self.shape[:2]}."
            )
        if width % 4 or width % num_heads:
            raise ValueError(
                f"`width` must be a multiple of 4 and of num_heads = {num_heads}; got {width}."
            )
        checks.choice("text_attention", text_attention, ("cross", "joint"))
        checks.choice("activation", activation, tuple(ACTIVATIONS))
        self.extra_channels = checks.count("extra_channels", extra_channels, 0)
        self.patch_size = patch_size
        self.width = width
        self.depth = depth
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        zeros = nnx.initializers.zeros
        patch_dims, extra_dims = (patch_size**2 * n for n in (self.shape[2], extra_channels))
        self.conditioning = Conditioning(
            width, conditioning=conditioning, num_classes=num_classes, time=time, **options
        )
        self.time = time.name
        self.input = Linear(
            patch_dims, width, kernel_init=nnx.initializers.xavier_uniform(), **options
        )
        self.positions = (
            nnx.Param(jnp.asarray(self._fixed_positions(), param_dtype))
            if learned_positions
            else None
        )
        self.joint = text_attention == "joint" and self.conditioning.has_context
        block_options = {
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "mlp_epsilon": mlp_epsilon,
            "dropout": dropout,
            "query_key_norm": query_key_norm,
            "activation": activation,
            **options,
        }
        for i in range(depth):
            block = (
                JointBlock(width, site=i, depth=depth, **block_options)
                if self.joint
                else DiTBlock(width, site=i, cross=self.conditioning.has_context, **block_options)
            )
            setattr(self, f"block_{i:02d}", block)
        self.final_modulation = Linear(width, 2 * width, kernel_init=zeros, **options)
        self.output = Linear(width, patch_dims + extra_dims, kernel_init=zeros, **options)

    def check_x(self, x: Any) -> Array:
        """Return images (B, H, W, C) in the dtype of the computation.

        Raises:
            TypeError: if `x` is not one array of real numbers.
            ValueError: if its shape is another.
        """
        return check_input(x, self.shape, self.dtype)

    def evaluate(self, x: Array, c: Array, context: Context | None, rows: Key | None) -> Array:
        """Return the output (B, H, W, C)."""
        positions = self._fixed_positions() if self.positions is None else self.positions[...]
        h = self.input(patchify(x, self.patch_size))
        h = h + jnp.asarray(positions, self.dtype)[jnp.newaxis]
        c = jax.nn.silu(c)
        for i in range(self.depth):
            block = checkpointed(getattr(self, f"block_{i:02d}"), self.remat)
            if self.joint:
                h, context = block(h, c, context, rows)
            else:
                h = block(h, c, context, rows)
        shift, scale = jnp.split(self.final_modulation(c)[:, jnp.newaxis], 2, axis=-1)
        output = self.output(modulate(h, shift, scale))
        if not self.extra_channels:
            return unpatchify(output, self.patch_size, self.shape)
        height, width, channels = self.shape
        whole = (height, width, channels + self.extra_channels)
        return unpatchify(output, self.patch_size, whole)[..., :channels]

    def _fixed_positions(self) -> np.ndarray:
        height, width, _ = self.shape
        return sincos_positions(height // self.patch_size, width // self.patch_size, self.width)
