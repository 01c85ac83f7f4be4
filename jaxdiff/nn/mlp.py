r"""A multilayer perceptron for data without structure, such as points in the plane.

    h_0     = W_in x
    h_{k+1} = h_k + W'_k dropout(silu(W_k h_k + V_k silu(c)))
    output  = W_out silu(h_depth)

c is the vector of log-SNR and label. W_out starts at zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff import numerics
from jaxdiff.nn.layers import (
    Conditioning,
    Linear,
    check_input,
    check_options,
    checkpointed,
    dropout,
    output_dtype,
)
from jaxdiff.typing import Array, Key


class MLPBlock(nnx.Module):
    """One residual block; `options` go to its layers."""

    def __init__(self, width: int, *, dropout: float, site: int, **options: Any) -> None:
        self.dropout = dropout
        self.site = site
        self.inner = Linear(width, width, **options)
        self.modulation = Linear(width, width, use_bias=False, **options)
        self.outer = Linear(width, width, **options)

    def __call__(self, h: Array, c: Array, key: Key | None) -> Array:
        """Map (B, width) and activated conditioning (B, width) to (B, width)."""
        inner = jax.nn.silu(self.inner(h) + self.modulation(c))
        return h + self.outer(dropout(inner, self.dropout, key, self.site))


class MLP(nnx.Module):
    """A residual perceptron on vectors.

    Args:
        num_dims: D, the size of x.
        width: of the hidden layers.
        depth: number of residual blocks, each of two layers.
        num_classes: None or 0 for an unconditional network; otherwise labels are integers in
            0..num_classes, num_classes being the null label.
        dropout: rate within the blocks, on when a key is given.
        remat: recompute the blocks in the backward pass, for memory.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: source of the initial parameters, which follow from its seed.

    Raises:
        TypeError: if an option is of another kind.
        ValueError: if a size is below 1 or `dropout` outside [0, 1).
    """

    time = "log_snr"
    """What `t` is; see :func:`jaxdiff.nn.on_log_snr`."""

    def __init__(
        self,
        num_dims: int,
        *,
        width: int = 128,
        depth: int = 3,
        num_classes: int | None = None,
        dropout: float = 0.0,
        remat: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = {"num_dims": num_dims, "width": width, "depth": depth}
        check_options(dropout=dropout, num_classes=num_classes, dtype=dtype, rngs=rngs, **sizes)
        self.num_dims = num_dims
        self.depth = depth
        self.remat = remat
        self.dtype = dtype
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conditioning = Conditioning(width, num_classes=num_classes, **options)
        self.input = Linear(num_dims, width, **options)
        for i in range(depth):
            block = MLPBlock(width, dropout=dropout, site=i, **options)
            setattr(self, f"block_{i:02d}", block)
        self.output = Linear(width, num_dims, kernel_init=nnx.initializers.zeros, **options)

    def __call__(
        self, x: Array, t: Array, cond: Array | None = None, *, key: Key | None = None
    ) -> Array:
        """Evaluate the network.

        Args:
            x: shape (B, D).
            t: log-SNR, shape () or (B,); infinities are allowed.
            cond: integer labels (B,); in evaluation None stands for the null label.
            key: one key or (B,) row keys: training, with dropout; None: evaluation.

        Returns:
            Shape (B, D), in the dtype of the computation but at least float32; 0 at
            initialisation.

        Raises:
            TypeError: if `x` is not one array of real numbers, or labels are no integers.
            ValueError: if a shape is wrong, a concrete label out of range, or `cond` given to
                an unconditional network or missing in the training of another.
        """
        h = self.input(check_input(x, (self.num_dims,), self.dtype))
        rows = None if key is None else numerics.row_keys(key, h.shape[0])
        c = self.conditioning(t, cond, h.shape[0], training=key is not None)
        c = jax.nn.silu(c)
        for i in range(self.depth):
            h = checkpointed(getattr(self, f"block_{i:02d}"), self.remat)(h, c, rows)
        return self.output(jax.nn.silu(h)).astype(output_dtype(self.dtype))
