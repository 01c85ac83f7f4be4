r"""The layers that the networks share.

**Time.** Networks are conditioned on l = log-SNR, clipped to [-20, 20]: beyond it alpha or sigma
is 1 to float32 precision, so nothing is lost, and the infinite log-SNR at the ends of a schedule
is harmless. The embedding is (cos(w_k l), sin(w_k l)) with angular frequencies w_k spaced
geometrically from pi/40 (half a turn over the range) to 8, then a two-layer perceptron.

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

from jaxdiff import checks, numerics
from jaxdiff.typing import Array, Key

MAX_LOG_SNR = 20.0
"""The time embedding clips its argument to [-MAX_LOG_SNR, MAX_LOG_SNR]."""


class Linear(nnx.Linear):
    """A dense layer on the last axis, computed with all other axes flattened into one."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Map (..., in_features) to (..., out_features)."""
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]), out_sharding)
        return flat.reshape(*inputs.shape[:-1], self.out_features)


class Conditioning(nnx.Module):
    """Embeds log-SNR and label as one vector per example.

    Labels are integers in 0..num_classes, the last being the null label of classifier-free
    guidance (Ho and Salimans 2022, arXiv:2207.12598). In evaluation ``cond=None`` means the null
    label; in training it is refused, since there it would be labels that got lost. A label that is
    out of range where it cannot be seen (under jit) gives NaN.

    Args:
        width: size of the vector.
        num_classes: None or 0 makes the network unconditional.
        num_frequencies: half the number of sinusoidal features of the log-SNR.
        dtype: of the computation past the sinusoidal features.
        param_dtype: of the parameters.
        rngs: source of the initial parameters.
    """

    def __init__(
        self,
        width: int,
        *,
        num_classes: int | None = None,
        num_frequencies: int = 32,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_classes = num_classes or 0
        self.num_frequencies = num_frequencies
        options: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "kernel_init": nnx.initializers.xavier_uniform(),
            "rngs": rngs,
        }
        self.time_in = Linear(2 * num_frequencies, width, **options)
        self.time_out = Linear(width, width, **options)
        if self.num_classes:
            shape = (self.num_classes + 1, width)
            initial = nnx.initializers.normal(0.02)(rngs.params(), shape, param_dtype)
            self.labels = nnx.Param(initial)

    def __call__(
        self, t: Array, cond: Array | None, num_rows: int, *, training: bool = False
    ) -> Array:
        """Return the conditioning vectors.

        Args:
            t: log-SNR, shape () or (B,).
            cond: labels (B,), or None.
            num_rows: B.
            training: whether labels must be given where there are classes.

        Returns:
            Shape (B, width).

        Raises:
            ValueError: if `t` or `cond` has another shape, a concrete label is out of range,
                labels are given to an unconditional network, or are missing in training.
            TypeError: if labels are not integers, or times no real numbers.
        """
        checks.real("t", t)
        t = jnp.asarray(t)
        if t.shape not in ((), (num_rows,)):
            raise ValueError(f"`t` must have shape () or ({num_rows},); got {t.shape}.")
        features = embed_log_snr(jnp.broadcast_to(t, (num_rows,)), self.num_frequencies)
        embedding = self.time_out(jax.nn.silu(self.time_in(features)))
        if not self.num_classes:
            if cond is not None:
                raise ValueError("`cond` must be None: the network was built without num_classes.")
            return embedding
        if cond is None and training:
            raise ValueError(
                "`cond` must hold labels: the network was built with num_classes="
                f"{self.num_classes}, and the batch has none. Put them into the batch as "
                f'"cond", or train without classes. The label {self.num_classes} stands for none.'
            )
        labels = _check_labels(cond, self.num_classes, num_rows)
        # A negative index would count from the end, so send it out of range on the other side.
        labels = jnp.where(labels < 0, self.num_classes + 1, labels)
        row = jnp.take(self.labels[...], labels, axis=0, mode="fill", fill_value=jnp.nan)
        return embedding + row.astype(embedding.dtype)


def _check_labels(cond: Any, num_classes: int, num_rows: int) -> Array:
    """Return labels (B,), the null label where there are none."""
    if cond is None:
        return jnp.full((num_rows,), num_classes, jnp.int32)
    dtype = getattr(cond, "dtype", None)
    if dtype is None:
        dtype = np.asarray(cond).dtype if isinstance(cond, list | tuple | int) else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        got = checks.shown(cond) if dtype is None else dtype
        raise TypeError(f"`cond` must hold integer labels; got {got}.")
    labels = jnp.asarray(cond)
    if labels.shape != (num_rows,):
        raise ValueError(f"`cond` must have shape ({num_rows},); got {labels.shape}.")
    known = numerics.concrete(cond)
    if known is not None and known.size and (known.min() < 0 or known.max() > num_classes):
        raise ValueError(
            f"`cond` must hold labels in 0..{num_classes}, {num_classes} being the null label; "
            f"got {known.min()}..{known.max()}."
        )
    return labels


def embed_log_snr(log_snr: Array, num_frequencies: int) -> Array:
    """Embed log-SNR (B,), infinities allowed, as sinusoids (B, 2 num_frequencies) in float32.

    Source: the sinusoids of Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, over the range
    of log-SNR rather than of positions.
    """
    clipped = jnp.clip(log_snr.astype(jnp.float32), -MAX_LOG_SNR, MAX_LOG_SNR)
    frequencies = np.geomspace(math.pi / (2.0 * MAX_LOG_SNR), 8.0, num_frequencies)
    angles = clipped[:, jnp.newaxis] * frequencies[np.newaxis].astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


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


def attention(qkv: Array, num_heads: int) -> Array:
    """Attend from every token to every token of the same example.

    Args:
        qkv: queries, keys and values side by side, (B, N, 3 C).
        num_heads: H, a divisor of C.

    Returns:
        The heads' outputs side by side, (B, N, C), before the output projection.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.2.
    """
    num_rows, num_tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    heads = (num_rows, num_tokens, num_heads, width // num_heads)
    query, key, value = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
    scores = jnp.einsum("bnhd,bmhd->bhnm", query * heads[-1] ** -0.5, key)
    # Not jax.nn.dot_product_attention: its softmax is in float32 whatever the dtype.
    wide = jnp.promote_types(scores.dtype, jnp.float32)
    shares = jax.nn.softmax(scores.astype(wide), axis=-1).astype(value.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", shares, value).reshape(num_rows, num_tokens, width)


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


def checkpointed(block: Callable[..., Array], remat: bool) -> Callable[..., Array]:
    """Recompute the block's activations in the backward pass where `remat` is True."""
    return jax.checkpoint(lambda *args: block(*args)) if remat else block


def check_input(x: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return the input in the dtype of the computation.

    Raises:
        TypeError: if `x` is not one array of real numbers.
        ValueError: if `x` does not have shape (B, *shape).
    """
    checks.real("x", x)
    x = jnp.asarray(x)
    if x.ndim != len(shape) + 1 or x.shape[1:] != shape:
        raise ValueError(f"`x` must have shape (B, {', '.join(map(str, shape))}); got {x.shape}.")
    return x.astype(dtype)


def check_options(
    *, dropout: float, num_classes: int | None, dtype: Any, rngs: Any, **sizes: int
) -> None:
    """Check the options that the networks share.

    Raises:
        TypeError: naming the first option of another kind than it must be.
        ValueError: naming the first option out of its range.
    """
    for name, size in sizes.items():
        checks.count(name, size)
    checks.number("dropout", dropout, 0.0, 1.0, below=True)
    if num_classes is not None:
        checks.count("num_classes", num_classes, 0)
    try:
        known = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise TypeError(f"`dtype` must be a floating-point one; got {checks.shown(dtype)}.")
    if not callable(getattr(rngs, "params", None)):
        raise TypeError(
            f"`rngs` must be a flax.nnx.Rngs, such as nnx.Rngs(0); got {checks.shown(rngs)}."
        )


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


def output_dtype(dtype: Any) -> Any:
    """Return the dtype of a network's output: that of the computation, at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
