r"""A multilayer perceptron for data without structure, such as points in the plane.

    h_0     = W_in x
    h_{k+1} = h_k + W'_k dropout(silu(W_k h_k + V_k silu(c)))
    output  = W_out silu(h_depth)

c is the vector of log-SNR and conditioning; of sequences it gets the mean token. W_out starts at
zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.nn.conditioning import Conditions, Context
from jaxdiff.nn.layers import Linear, check_input, checkpointed, dropout, masked_mean
from jaxdiff.nn.network import Conditioning, Network
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


class MLP(Network):
    """A residual perceptron on vectors.

    Args:
        num_dims: D, the size of x.
        width: of the hidden layers.
        depth: number of residual blocks, each of two layers.
        dropout: rate within the blocks.
        conditioning, num_classes, remat, dtype, param_dtype, rngs: what all networks take, see
            :class:`jaxdiff.nn.network.Network`.

    Raises:
        TypeError: if an option is of another kind.
        ValueError: if a size is below 1 or `dropout` outside [0, 1).
    """

    def __init__(
        self,
        num_dims: int,
        *,
        width: int = 128,
        depth: int = 3,
        conditioning: Conditions | None = None,
        num_classes: int | None = None,
        dropout: float = 0.0,
        remat: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = {"num_dims": num_dims, "width": width, "depth": depth}
        super().__init__(dropout=dropout, remat=remat, dtype=dtype, rngs=rngs, **sizes)
        self.num_dims = num_dims
        self.depth = depth
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conditioning = Conditioning(
            width, conditioning=conditioning, num_classes=num_classes, **options
        )
        self.input = Linear(num_dims, width, **options)
        for i in range(depth):
            block = MLPBlock(width, dropout=dropout, site=i, **options)
            setattr(self, f"block_{i:02d}", block)
        self.output = Linear(width, num_dims, kernel_init=nnx.initializers.zeros, **options)

    def check_x(self, x: Any) -> Array:
        """Return x (B, D) in the dtype of the computation.

        Raises:
            TypeError: if it is not one array of real numbers.
            ValueError: if its shape is another.
        """
        return check_input(x, (self.num_dims,), self.dtype)

    def evaluate(self, x: Array, c: Array, context: Context | None, rows: Key | None) -> Array:
        """Return the output (B, D)."""
        h = self.input(x)
        if context is not None:
            c = c + masked_mean(*context)
        c = jax.nn.silu(c)
        for i in range(self.depth):
            h = checkpointed(getattr(self, f"block_{i:02d}"), self.remat)(h, c, rows)
        return self.output(jax.nn.silu(h))
