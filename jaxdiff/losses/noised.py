"""What losses share: noisy batches, conditioning that is dropped, and weights on an error."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import checks, forward, numerics, predictions, rows, timesteps, weightings
from jaxdiff.processes import Process
from jaxdiff.rows import Rows
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
        key: what the network may draw from: one key, or row keys where the batch has rows.
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


BATCH_KEYS = ("x0", "cond", "rows")


def clean(batch: Batch) -> tuple[Array, Rows | None]:
    """Judge a batch; return its clean data (B, ...), at least float32, and what rows it says.

    Raises:
        TypeError: if it is no dictionary, or ``batch["x0"]`` holds no floating-point numbers.
        ValueError: if it has no "x0" or a key that no loss reads, if a leaf has another number of
            rows or none, or, where its numbers are known, if x0 holds the levels 0..255.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f'`batch` must be a dictionary with "x0"; got {checks.shown(batch)}.')
    unread = sorted(str(key) for key in batch if key not in BATCH_KEYS)
    if "x0" not in batch or unread:
        raise ValueError(
            '`batch` must hold clean data as "x0" and, if there is any, conditioning as "cond"; '
            f"got {', '.join(map(repr, batch)) or 'nothing'}."
        )
    x0 = numerics.as_float(batch["x0"], "x0")
    if x0.ndim == 0 or x0.shape[0] == 0:
        raise ValueError(f'batch["x0"] must have shape (B, ...) with B >= 1; got {x0.shape}.')
    for path, leaf in jax.tree.leaves_with_path(batch.get("cond")):
        if np.shape(leaf)[:1] != x0.shape[:1]:
            raise ValueError(
                f'batch["cond"]{jax.tree_util.keystr(path)} must have the {x0.shape[0]} rows of '
                f'batch["x0"]; got shape {np.shape(leaf)}.'
            )
    refuse_levels(x0)
    return x0, rows.of_batch(batch, x0.shape[0])


def refuse_levels(x0: Array) -> None:
    """Refuse data that are the levels 0..255 of images written as floats, where they are known.

    Raises:
        ValueError: if they are.
    """
    known = numerics.concrete(x0)
    if known is None or known.size == 0:
        return
    if known.max() > 16 and known.min() >= 0 and (known == np.round(known)).all():
        raise ValueError(
            f'batch["x0"] holds whole numbers from {known.min():g} to {known.max():g}: levels, it '
            "seems. Scale them to [-1, 1], by jaxdiff.data.dequantize or jaxdiff.data.centers."
        )


def by_row(key: Key, numbers: Rows | None) -> Key:
    """Return row keys where a batch says which rows it holds; else the key, for rows 0..B-1."""
    return key if numbers is None else rows.keys(key, numbers)


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
        TypeError: as :func:`clean`.
        ValueError: as :func:`clean`, or if conditioning is to be dropped and there is none, or
            `times` returns another shape than (B,).
    """
    x0, numbers = clean(batch)
    num_rows = x0.shape[0]
    key_time, key_eps, key_drop, key_network = jax.random.split(rows.one_key(key), 4)
    t = times(key_time, process, num_rows if numbers is None else numbers)
    if jnp.shape(t) != (num_rows,):
        raise ValueError(f"`times` must return shape ({num_rows},); got {jnp.shape(t)}.")
    t = t.astype(x0.dtype)
    x_t, eps = forward.perturb(by_row(key_eps, numbers), process, x0, t)
    if couple is not None:
        eps = couple(x0, eps)
        x_t = numerics.expand_like(process.alpha(t), x0) * x0
        x_t += numerics.expand_like(process.sigma(t), x0) * eps
    cond = dropping.drop(by_row(key_drop, numbers), batch.get("cond"), num_rows)
    return Noised(x0, x_t, eps, t, cond, by_row(key_network, numbers))


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
