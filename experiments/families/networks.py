"""What the families with networks share: perceptrons, standardised pixels, and what a family is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.families.config import Config
from jaxdiff import data, nn, numerics
from jaxdiff.nn.layers import dropout
from jaxdiff.training import TrainState
from jaxdiff.training.update import Update
from jaxdiff.typing import Array, Batch, Key, LossFn, PyTree

Rows = Callable[[PyTree, Key, Array], Array]
"""(params, key, x (B, D)) -> nats (B,)."""


class Family(NamedTuple):
    """A family of models with a network.

    Attributes:
        num_steps: updates of its training.
        state: before the first update.
        update: of the training.
        draw: (params, key) -> samples (N, D) in [-1, 1], unclipped.
        calls: evaluations of a network a sample; None where the samples decide.
        log_prob: the exact log-likelihood, if there is one.
        elbo: an estimate of a bound of it, if there is one.
        fine_elbo: that of a chain in equal steps of log-SNR, if there is one.
        log_weight: the log of an unbiased estimate of the likelihood, to be averaged over many.
    """

    num_steps: int
    state: TrainState
    update: Update
    draw: Callable[[PyTree, Key], Array]
    calls: int | None
    log_prob: Rows | None = None
    elbo: Rows | None = None
    fine_elbo: Rows | None = None
    log_weight: Rows | None = None

    @property
    def num_params(self) -> int:
        """Parameters of all its networks."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def training_flops(self, batch_size: int, num_dims: int) -> float:
        """Return the floating-point operations of its training, as XLA counts an update's."""
        batch = {"x0": jax.ShapeDtypeStruct((batch_size, num_dims), jnp.uint8)}
        lowered = jax.jit(self.update).lower(self.state, jax.random.key(0), batch)
        costs: Any = lowered.cost_analysis()
        return float(costs["flops"]) * self.num_steps


# --- Networks -------------------------------------------------------------------------------


class Perceptron(nnx.Module):
    """A residual perceptron, that of `nn.MLP` without time; `options` go to its layers."""

    def __init__(
        self, num_in: int, num_out: int, *, width: int, depth: int, dropout: float, rngs: nnx.Rngs
    ) -> None:
        self.depth = depth
        self.dropout = dropout
        self.input = nnx.Linear(num_in, width, rngs=rngs)
        for i in range(depth):
            setattr(self, f"inner_{i:02d}", nnx.Linear(width, width, rngs=rngs))
            setattr(self, f"outer_{i:02d}", nnx.Linear(width, width, rngs=rngs))
        self.output = nnx.Linear(width, num_out, rngs=rngs)

    def __call__(self, x: Array, *, key: Key | None = None) -> Array:
        """Map (B, num_in) to (B, num_out); one key or (B,) row keys turn dropout on."""
        h = self.input(x)
        rows = None if key is None else numerics.row_keys(key, h.shape[0])
        for i in range(self.depth):
            inner = jax.nn.silu(getattr(self, f"inner_{i:02d}")(h))
            inner = dropout(inner, self.dropout, rows, i)
            h = h + getattr(self, f"outer_{i:02d}")(inner)
        return self.output(jax.nn.silu(h))


def perceptron(config: Config, num_in: int, num_out: int, rngs: nnx.Rngs) -> tuple[PyTree, Any]:
    """Make half a model: its parameters and ``apply(params, x, key=None)``."""
    module = Perceptron(
        num_in,
        num_out,
        width=config.half_width,
        depth=config.half_depth,
        dropout=config.dropout,
        rngs=rngs,
    )
    params, network = nn.functional(module)

    def apply(params: PyTree, x: Array, key: Key | None = None) -> Array:
        return network(params, x, key=key)

    return params, apply


class Pixels(NamedTuple):
    """What the networks are told of the data: how each pixel is standardised.

    A pixel that is hardly ever dark would else need a network that resolves hundredths.

    Attributes:
        num_levels: L.
        mean: of each pixel of the dequantised training images, (1, D).
        std: their standard deviations, but at least the width of a bin, (1, D).
    """

    num_levels: int
    mean: Array
    std: Array

    @property
    def num_dims(self) -> int:
        """Return D."""
        return self.mean.shape[1]

    def loss(self, loss_fn: LossFn) -> LossFn:
        """Turn a loss of standardised pixels into one of levels."""

        def of_levels(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
            key_data, key_loss = jax.random.split(key)
            x = data.dequantize(key_data, batch["x0"], self.num_levels)
            return loss_fn(params, key_loss, {"x0": self.standardize(x)})

        return of_levels

    def log_density(self, log_prob: Rows) -> Rows:
        """Turn a log-density of standardised pixels into one of pixels in [-1, 1]."""

        def of_pixels(params: PyTree, key: Key, x: Array) -> Array:
            return log_prob(params, key, self.standardize(x)) - jnp.sum(jnp.log(self.std))

        return of_pixels

    def standardize(self, x: Array) -> Array:
        """Take pixels (B, D) from [-1, 1] to mean 0 and variance 1."""
        return (x - self.mean) / self.std

    def restore(self, y: Array) -> Array:
        """Take standardised pixels (B, D) back."""
        return self.mean + self.std * y


def describe(levels: Any, num_levels: int) -> Pixels:
    """Return what the networks are told of training images, levels (N, D)."""
    x = data.centers(jnp.asarray(levels), num_levels)
    width = data.bin_width(num_levels)
    std = jnp.sqrt(jnp.var(x, axis=0, keepdims=True) + width**2 / 12.0)
    return Pixels(num_levels, jnp.mean(x, axis=0, keepdims=True), jnp.maximum(std, width))
