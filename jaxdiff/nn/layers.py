r"""The layers that the networks share.

**Speed on CPU.** XLA:CPU is far slower where a matrix product contracts over a (B, N, C) array in
its gradient than where it sees (B N, C), and where a mean is a reduction over the fastest axis
than where it is a product with a column of ones. :class:`Linear` and :func:`layer_norm` are
written accordingly (the DiT's docstring has the numbers); the values are the same.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff import checks
from jaxdiff.typing import Array, Key


class Linear(nnx.Linear):
    """A dense layer on the last axis, computed with all other axes flattened into one."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Map (..., in_features) to (..., out_features)."""
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]), out_sharding)
        return flat.reshape(*inputs.shape[:-1], self.out_features)


def layer_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """Normalise (..., C) to mean 0 and variance 1 over the last axis, without parameters.

    The statistics are taken in float32 at least, in two passes, so that they do not cancel.

    Source: Ba et al. 2016 (arXiv:1607.06450), eq. 3.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(-1, x.shape[-1])
    column = jnp.full((x.shape[-1], 1), 1.0 / x.shape[-1], wide.dtype)
    centred = wide - jnp.matmul(wide, column, precision="highest")
    variance = jnp.matmul(centred * centred, column, precision="highest")
    return (centred * jax.lax.rsqrt(variance + epsilon)).reshape(x.shape).astype(x.dtype)


class LayerNorm(nnx.Module):
    """:func:`layer_norm` with a learned scale and shift, in float32 at least.

    Args:
        channels: C.
        epsilon: added to the variance.
        param_dtype: of the parameters.
    """

    def __init__(self, channels: int, *, epsilon: float = 1e-6, param_dtype: Any) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: Array) -> Array:
        """Normalise (..., C) over the last axis."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(-1, x.shape[-1])
        normal = layer_norm(wide, self.epsilon)
        scaled = normal * self.scale[...][jnp.newaxis] + self.bias[...][jnp.newaxis]
        return scaled.reshape(x.shape).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS normalisation over channels, or over those of each head, with a learned scale.

    Of queries and keys, scores then stay bounded by the scales, however long both would be.

    Args:
        width: C.
        num_heads: a divisor of C; each head is normalised by itself and has C / H scales.
        epsilon: added to the mean square.
        param_dtype: of the parameters.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4; of heads in the place where Henry et
    al. 2020 (arXiv:2010.04245) and Dehghani et al. 2023 (arXiv:2302.05442), section 2, normalise
    otherwise.
    """

    def __init__(
        self, width: int, *, num_heads: int = 1, epsilon: float = 1e-6, param_dtype: Any
    ) -> None:
        self.head = width // num_heads
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x: Array) -> Array:
        """Normalise (..., C), statistics in float32 at least."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(-1, self.head)
        column = jnp.full((self.head, 1), 1.0 / self.head, wide.dtype)
        square = jnp.matmul(wide * wide, column, precision="highest")
        normal = (wide * jax.lax.rsqrt(square + self.epsilon)).reshape(-1, x.shape[-1])
        return (normal * self.scale[...][jnp.newaxis]).reshape(x.shape).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation with a learned scale and shift, statistics in float32 at least.

    Args:
        channels: C.
        max_groups: the number of groups where it divides C, else the greatest divisor in common.
        epsilon: added to the variance.
        param_dtype: of the parameters.

    Source: Wu and He 2018 (arXiv:1803.08494), section 3.
    """

    def __init__(
        self, channels: int, *, max_groups: int = 8, epsilon: float = 1e-6, param_dtype: Any
    ) -> None:
        self.num_groups = math.gcd(channels, max_groups)
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: Array) -> Array:
        """Normalise (B, ..., C) over pixels and the channels of a group."""
        num_rows, channels = x.shape[0], x.shape[-1]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        groups = wide.reshape(num_rows, -1, self.num_groups, channels // self.num_groups)
        centred = groups - groups.mean(axis=(1, 3), keepdims=True)
        variance = jnp.mean(centred * centred, axis=(1, 3), keepdims=True)
        normal = (centred * jax.lax.rsqrt(variance + self.epsilon)).reshape(-1, channels)
        scaled = normal * self.scale[...][jnp.newaxis] + self.bias[...][jnp.newaxis]
        return scaled.reshape(x.shape).astype(x.dtype)


def attention(qkv: Array, num_heads: int, mask: Array | None = None) -> Array:
    """Attend from every token to every token of the same example.

    Args:
        qkv: queries, keys and values side by side, (B, N, 3 C).
        num_heads: H, a divisor of C.
        mask: as of :func:`attend`.

    Returns:
        The heads' outputs side by side, (B, N, C), before the output projection.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.2.
    """
    query, key, value = jnp.split(qkv, 3, axis=-1)
    return attend(query, key, value, num_heads, mask)


def attend(
    query: Array,
    key: Array,
    value: Array,
    num_heads: int,
    mask: Array | None = None,
    *,
    wide: bool = False,
) -> Array:
    """Attend from N tokens to M others of the same example.

    Args:
        query: shape (B, N, C).
        key: shape (B, M, C).
        value: shape (B, M, C), finite everywhere.
        num_heads: H, a divisor of C.
        mask: which of the M may be attended to, (B, M), or by which of the N, (B, N, M) or
            (1, N, M); None is all. A token behind the mask adds exactly nothing; where there is
            none else, the output is 0.
        wide: whether the scores are summed in float32 at least; else in the dtype of the query.

    Returns:
        The heads' outputs side by side, (B, N, C), before the output projection.

    Source: as :func:`attention`.
    """
    shape, head = query.shape, query.shape[-1] // num_heads
    query, key, value = (
        part.reshape(*part.shape[:2], num_heads, head) for part in (query, key, value)
    )
    least = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum(
        "bnhd,bmhd->bhnm",
        query * head**-0.5,
        key,
        preferred_element_type=least if wide else None,
    )
    # Not jax.nn.dot_product_attention: its softmax is in float32 whatever the dtype.
    scores = scores.astype(least)
    if mask is None:
        shares = jax.nn.softmax(scores, axis=-1)
    else:
        shown = jnp.expand_dims(mask, (1, 2) if mask.ndim == 2 else 1)
        # The least number, not -inf: a row of nothing else would be NaN.
        shares = jax.nn.softmax(jnp.where(shown, scores, jnp.finfo(scores.dtype).min), axis=-1)
        shares = jnp.where(shown, shares, 0.0)
    return jnp.einsum("bhnm,bmhd->bnhd", shares.astype(value.dtype), value).reshape(shape)


class CrossAttention(nnx.Module):
    """Attends from tokens to those of a context; it adds nothing at first.

    Args:
        width: C, of the tokens that ask.
        context_width: of those that are asked.
        num_heads: a divisor of C.
        biased: whether queries, keys and values have biases.
        wide: as of :func:`attend`.
        query_key_norm: whether queries and keys are normalised by :class:`RMSNorm`.
        options: go to its layers.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.3; the projection that starts at
    zero is that of Chen et al. 2024 (arXiv:2310.00426), section 2.3.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        *,
        num_heads: int,
        biased: bool = True,
        wide: bool = False,
        query_key_norm: bool = False,
        **options: Any,
    ) -> None:
        self.num_heads = num_heads
        self.wide = wide
        xavier, zeros = nnx.initializers.xavier_uniform(), nnx.initializers.zeros
        asking = {"kernel_init": xavier, "use_bias": biased, **options}
        self.query = Linear(width, width, **asking)
        self.key_value = Linear(context_width, 2 * width, **asking)
        self.projection = Linear(width, width, kernel_init=zeros, **options)
        norm = {"num_heads": num_heads, "param_dtype": options["param_dtype"]}
        self.query_norm = RMSNorm(width, **norm) if query_key_norm else None
        self.key_norm = RMSNorm(width, **norm) if query_key_norm else None

    def __call__(self, h: Array, tokens: Array, mask: Array | None = None) -> Array:
        """Map (B, N, C), with tokens (B, L, context_width) and their mask (B, L), to (B, N, C)."""
        query = self.query(h)
        key, value = jnp.split(self.key_value(tokens), 2, axis=-1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        mixed = attend(query, key, value, self.num_heads, mask, wide=self.wide)
        return self.projection(mixed)


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


def waves(x: Array, frequencies: np.ndarray, *, cosines_first: bool = True) -> Array:
    """Return cosines and sines (B, 2 N) of x (B,) at frequencies (N,), in the dtype of x."""
    angles = x[:, jnp.newaxis] * frequencies[np.newaxis].astype(x.dtype)
    parts = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(parts if cosines_first else parts[::-1], axis=-1)


def sinusoidal(
    t: Array, width: int, *, flip: bool = False, shift: float = 0.0, max_period: float = 10000.0
) -> Array:
    """Embed step numbers by waves of frequencies max_period^(-k / (width / 2 - shift)).

    Args:
        t: shape (B,); of T steps 0, ..., T - 1, or between them.
        width: even; half of it sines, half cosines, k = 0, ..., width / 2 - 1.
        flip: cosines first, not sines.
        shift: 1 makes the last frequency that of `max_period` exactly.
        max_period: of the slowest wave, over 2 pi.

    Returns:
        Shape (B, width), in float32 at least. Angles of hundreds of turns keep few digits in
        float32: rounded as the published networks round them, they agree with theirs.

    Raises:
        ValueError: if `width` is odd.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, as Ho et al. 2020
    (arXiv:2006.11239) use it: sines first, shift 1.
    """
    if width % 2:
        raise ValueError(f"`width` must be even; got {width}.")
    t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
    real, half = t.dtype.type, width // 2
    exponents = real(-math.log(max_period)) * np.arange(half, dtype=t.dtype) / real(half - shift)
    return waves(t, np.exp(exponents), cosines_first=flip)


def masked_mean(x: Array, mask: Array) -> Array:
    """Return the mean (B, C) of the rows of x (B, L, C) that the mask (B, L) shows; 0 of none."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    shown = jnp.where(mask[..., jnp.newaxis], wide, 0.0)
    count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    return (jnp.sum(shown, axis=1) / count.astype(wide.dtype)).astype(x.dtype)


def dropout(x: Array, rate: float, key: Key | None, site: int) -> Array:
    """Zero a fraction `rate` of each example's entries and scale up the others.

    Args:
        x: shape (B, ...).
        rate: in [0, 1).
        key: row keys (B,), or None for no dropout; the mask of example i follows from its own
            key alone, so it does not depend on the batch.
        site: number of this call within the network, so that one key serves them all.

    Returns:
        An array like `x`.

    Source: Srivastava et al. 2014 (JMLR 15:1929), with the factor 1 / (1 - rate) in training.
    """
    if key is None or rate == 0.0:
        return x

    def keep(row: Key) -> Array:
        row = jax.random.fold_in(row, site)
        return jax.random.uniform(row, x.shape[1:], jnp.float32) >= rate

    return jnp.where(jax.vmap(keep)(key), x / (1.0 - rate), jnp.zeros_like(x))


def checkpointed(block: Callable[..., Any], remat: bool) -> Callable[..., Any]:
    """Recompute the block's activations in the backward pass where `remat` is True."""
    return jax.checkpoint(lambda *args: block(*args)) if remat else block


def check_input(x: Any, shape: tuple[int | str, ...], dtype: Any, name: str = "x") -> Array:
    """Return the input in the dtype of the computation.

    Args:
        x: what was given.
        shape: its sizes but the first; a text stands for any of at least 1.
        dtype: of the computation.
        name: of the argument.

    Raises:
        TypeError: if `x` is not one array of real numbers.
        ValueError: if `x` does not have shape (B, *shape).
    """
    checks.real(name, x)
    x = jnp.asarray(x)
    wanted = tuple(
        max(size, 1) if isinstance(want, str) else want
        for want, size in zip(shape, x.shape[1:], strict=False)
    )
    if x.ndim != len(shape) + 1 or x.shape[1:] != wanted:
        form = ", ".join(map(str, ("B", *shape)))
        raise ValueError(f"`{name}` must have shape ({form}); got {x.shape}.")
    return x.astype(dtype)


def check_image_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return (H, W, C) as a tuple of ints.

    Raises:
        TypeError: if a size is no whole number.
        ValueError: if there are not three positive sizes.
    """
    if np.ndim(shape) != 1 or len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"`shape` must be (H, W, C), each at least 1; got {shape}.")
    height, width, channels = (checks.count("shape", size) for size in shape)
    return height, width, channels
