"""What losses share: noisy batches, conditioning that is dropped, and weights on an error."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff import forward, numerics, predictions, timesteps, weightings
from jaxdiff.processes import Process
from jaxdiff.typing import Apply, Array, Batch, Key, PyTree

Couple = Callable[[Array, Array], Array]
"""(x0 (B, ...), eps (B, ...)) -> the rows of eps in the order in which they go with x0."""


class Noised(NamedTuple):
    """A batch after the forward process.

    Attributes:
        x0: clean data (B, ...), at least float32.
        x_t: noisy data (B, ...).
        eps: its noise (B, ...).
        t: times (B,).
        cond: conditioning, or None.
        key: what the network may draw from.
    """

    x0: Array
    x_t: Array
    eps: Array
    t: Array
    cond: PyTree
    key: Key

    def evaluate(self, apply: Apply, params: PyTree, x_t: Array | None = None) -> Array:
        """Return the network's output (B, ...) at x_t, or at another point.

        Raises:
            ValueError: if its shape is not that of x0.
        """
        x_t = self.x_t if x_t is None else x_t
        output = apply(params, x_t, self.t, self.cond, key=self.key)
        if output.shape != self.x0.shape:
            raise ValueError(
                f"`apply` must return the shape of x0, {self.x0.shape}; got {output.shape}."
            )
        return output.astype(self.x0.dtype)


class Dropping(NamedTuple):
    """How often conditioning is replaced by none; see :func:`jaxdiff.losses.denoising`."""

    rate: float = 0.0
    null_cond: PyTree = None

    def check(self) -> None:
        """Raise ValueError if the rate is out of range or lacks its `null_cond`."""
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"`drop_cond` must lie in [0, 1]; got {self.rate}.")
        if self.rate > 0.0 and self.null_cond is None:
            raise ValueError("`null_cond` must say what replaces the conditioning that is dropped.")

    def drop(self, key: Key, cond: PyTree, num_rows: int) -> PyTree:
        """Replace each row's conditioning by the null one with probability `rate`.

        Raises:
            ValueError: if there is none.
        """
        if self.rate == 0.0:
            return cond
        if cond is None:
            raise ValueError('`drop_cond` needs conditioning: batch["cond"] is missing.')
        dropped = numerics.uniform(key, num_rows) < self.rate

        def choose(value: Array, null: Array) -> Array:
            mask = dropped.reshape((-1,) + (1,) * (value.ndim - 1))
            return jnp.where(mask, jnp.asarray(null, value.dtype), value)

        return jax.tree.map(choose, cond, self.null_cond)


def add_noise(
    key: Key,
    process: Process,
    batch: Batch,
    times: timesteps.Draw,
    dropping: Dropping = Dropping(),  # noqa: B008
    couple: Couple | None = None,
) -> Noised:
    """Draw times and noise for a batch.

    Raises:
        TypeError: if ``batch["x0"]`` holds integers.
        ValueError: if conditioning is to be dropped and there is none.
    """
    x0 = numerics.as_float(batch["x0"], "x0")
    num_rows = x0.shape[0]
    key_time, key_eps, key_drop, key_network = jax.random.split(key, 4)
    t = times(key_time, process, num_rows).astype(x0.dtype)
    x_t, eps = forward.perturb(key_eps, process, x0, t)
    if couple is not None:
        eps = couple(x0, eps)
        x_t = numerics.expand_like(process.alpha(t), x0) * x0
        x_t += numerics.expand_like(process.sigma(t), x0) * eps
    cond = dropping.drop(key_drop, batch.get("cond"), num_rows)
    return Noised(x0, x_t, eps, t, cond, key_network)


class Weight(NamedTuple):
    """The weight of a squared error of one kind of prediction.

    Attributes:
        kind: of the error that is at hand.
        loss_on: the kind whose squared error a weighting without one of its own is on.
        weighting: see `jaxdiff.weightings`.
    """

    kind: str
    loss_on: str
    weighting: weightings.Weighting

    def at(self, process: Process, t: Array) -> Array:
        """Return the weight at times (B,)."""
        on = self.loss_on if self.weighting.on is None else self.weighting.on
        ratio = predictions.error_ratio(process, on, self.kind, t)
        return self.weighting.weight(process, t) * ratio**2


def weight(
    kind: str, prediction: str, loss_on: str | None, weighting: weightings.Weighting | None
) -> Weight:
    """Make a Weight of a loss's options.

    Args:
        kind: of the error that is at hand.
        prediction: what the network predicts.
        loss_on: by default `prediction`.
        weighting: by default `weightings.simple()`.

    Raises:
        ValueError: if a kind is unknown.
    """
    predictions.check_kind("prediction", prediction)
    loss_on = prediction if loss_on is None else loss_on
    predictions.check_kind("loss_on", loss_on)
    return Weight(kind, loss_on, weightings.simple() if weighting is None else weighting)


def row_mean(x: Array) -> Array:
    """Return the mean over the dimensions of each example, (B,), of x (B, ...)."""
    return jnp.mean(x.reshape(x.shape[0], -1), axis=1)
