"""What losses share: noisy batches, conditioning that is dropped, and weights on an error."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
            TypeError: if it cannot be called so, or does not return an array.
            ValueError: if its shape is not that of x0.
        """
        x_t = self.x_t if x_t is None else x_t
        try:
            output = apply(params, x_t, self.t, self.cond, key=self.key)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise TypeError(
                "`apply` must take (params, x_t, t, cond, *, key): wrap one that takes less, "
                "lambda params, x_t, t, cond=None, *, key=None: network(params, x_t, t). "
                f"It said: {error}"
            ) from error
        return checks.output("apply", output, self.x0, "x0")


class Dropping(NamedTuple):
    """How often conditioning is replaced by none; see :func:`jaxdiff.losses.denoising`."""

    rate: Any = 0.0
    null_cond: PyTree = None

    def check(self) -> None:
        """Judge the rate, and that it has its `null_cond`.

        Raises:
            TypeError: if the rate is no real number.
            ValueError: if it is out of range or lacks its `null_cond`.
        """
        checks.number("drop_cond", self.rate, 0.0, 1.0)
        if self._never():
            return
        if self.null_cond is None:
            raise ValueError("`null_cond` must say what replaces the conditioning that is dropped.")

    def _never(self) -> bool:
        known = numerics.concrete(self.rate)
        return known is not None and float(known) == 0.0

    def drop(self, key: Key, cond: PyTree, num_rows: int) -> PyTree:
        """Replace each row's conditioning by the null one with probability `rate`.

        Raises:
            TypeError: if a null value is of another kind of number than what it replaces.
            ValueError: if there is no conditioning, or it is another pytree or of other shapes.
        """
        if self._never():
            return cond
        if cond is None:
            raise ValueError('`drop_cond` needs conditioning: batch["cond"] is missing.')
        found: Any = jax.tree.structure(self.null_cond)
        if found != jax.tree.structure(cond):
            raise ValueError(
                '`null_cond` must be a pytree like batch["cond"] without its batch axis, '
                f"{jax.tree.structure(cond)}; got {found}."
            )
        dropped = numerics.uniform(key, num_rows) < self.rate

        def choose(value: Array, null: Any) -> Array:
            value, null = _as_alike(value, null)
            mask = dropped.reshape((-1,) + (1,) * (value.ndim - 1))
            return jnp.where(mask, jnp.broadcast_to(null, value.shape), value)

        return jax.tree.map(choose, cond, self.null_cond)


def _as_alike(value: Array, null: Any) -> tuple[Array, Array]:
    """Return conditioning (B, ...) and its null value (...) in a dtype that holds both.

    Raises:
        TypeError: if one holds whole numbers and the other does not.
        ValueError: if the null value has another shape.
    """
    value, null = jnp.asarray(value), numerics.as_array(null, "null_cond")
    if null.ndim > value.ndim - 1 or any(
        mine not in (1, its)
        for mine, its in zip(null.shape[::-1], value.shape[:0:-1], strict=False)
    ):
        raise ValueError(
            f'`null_cond` must have the shape of one row of batch["cond"], {value.shape[1:]}; '
            f"got {null.shape}."
        )
    if jnp.issubdtype(value.dtype, jnp.floating):
        return value, null.astype(value.dtype)
    if value.dtype == null.dtype == jnp.bool_:  # a mask
        return value, null
    if not jnp.issubdtype(null.dtype, jnp.integer) or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f'`null_cond` must be of the kind of batch["cond"], {value.dtype}; got {null.dtype}.'
        )
    known = numerics.concrete(null)
    if known is not None and np.array_equal(known, known.astype(value.dtype)):
        return value, null.astype(value.dtype)
    wide = jnp.promote_types(value.dtype, null.dtype)  # 256 beside labels of uint8, say
    return value.astype(wide), null.astype(wide)


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


def judged_times(times: timesteps.Draw | None) -> timesteps.Draw:
    """Return training times, by default stratified.

    Raises:
        TypeError: if they are no function of (key, process, rows), such as one that makes one.
    """
    if times is None:
        return timesteps.draw_stratified()
    checks.function("times", times, "(key, process, rows) -> (B,)", takes=3)
    return times


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
        if self.weighting.of_kind is not None:
            return self.weighting.of_kind(process, t, self.kind)
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
        TypeError: if `weighting` is no Weighting, such as a function that makes one.
        ValueError: if a kind is unknown.
    """
    predictions.check_kind("prediction", prediction)
    loss_on = prediction if loss_on is None else loss_on
    predictions.check_kind("loss_on", loss_on)
    weighting = weightings.simple() if weighting is None else weighting
    if not isinstance(weighting, weightings.Weighting):
        raise TypeError(
            "`weighting` must be one of jaxdiff.weightings, called: weightings.simple(); "
            f"got {checks.shown(weighting)}."
        )
    return Weight(kind, loss_on, weighting)


def judge_apply(apply: Apply) -> None:
    """Refuse what is no network of (params, x_t, t, cond, *, key).

    Raises:
        TypeError: if it cannot be called so.
        ValueError: if it takes log-SNR or steps for its time and was not told how.
    """
    checks.function("apply", apply, "(params, x_t, t, cond, *, key) -> (B, ...)")
    others = {
        "log_snr": ("log-SNR", "nn.on_log_snr(apply, process.log_snr)"),
        "step": ("steps", "nn.on_steps(apply, process.num_steps)"),
    }
    time = getattr(apply, "time", "t")
    if time in others:
        taken, remedy = others[time]
        raise ValueError(
            f"`apply` is of a network that takes {taken} in place of t: give {remedy}."
        )


def row_mean(x: Array) -> Array:
    """Return the mean over the dimensions of each example, (B,), of x (B, ...)."""
    return jnp.mean(x.reshape(x.shape[0], -1), axis=1)
