"""The one pure update, which every parallel mode runs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from jaxdiff import checks, rows
from jaxdiff.training import ema, judging
from jaxdiff.training.ema import EmaDecay
from jaxdiff.training.state import TrainState, begin, init, without_frozen
from jaxdiff.typing import Array, Batch, Key, LossFn, PyTree

__all__ = [
    "GradientUpdate",
    "LossOf",
    "TrainState",
    "Transferable",
    "Update",
    "init",
    "make_update",
    "scan_steps",
]

Metrics: TypeAlias = dict[str, Array]
"""Scalars by name."""
Update: TypeAlias = Callable[[TrainState, Key, Batch], tuple[TrainState, Metrics]]
"""``(state, key, batch) -> (state, metrics)``, metrics being scalars by name."""
LossOf: TypeAlias = Callable[[TrainState], Callable[[PyTree, Key, Batch], Any]]
"""``state -> loss_fn``, the state being traced."""
Gather: TypeAlias = Callable[[PyTree], PyTree]
"""Arrays that are split over devices -> the same, whole on each."""
_LOSS = "(params, key, batch) -> (loss (B,), metrics)"


@runtime_checkable
class Transferable(Protocol):
    """An update that can be told where it runs, as those of this library can."""

    def __call__(self, state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, Metrics]:
        """Make one step."""

    def over(self, axis_name: str | None) -> "Transferable":
        """Return it for shards of a batch along a mapped axis, or for whole batches."""

    def gathered(self, gather: Gather) -> "Transferable":
        """Return it for states that are split, and that `gather` makes whole for the loss."""

    def in_parts(self, accumulate: int) -> "Transferable":
        """Return it with its gradients taken in so many parts of a batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class GradientUpdate:
    """One step down the gradient of a loss; see :func:`make_update`, which makes it.

    Attributes:
        loss_of: the traced state -> the loss.
        optimizer: of optax.
        ema_decay: of the averages.
        part: which part of `params` it moves, None for all.
        axis_name: the mapped axis over which batches are split.
        accumulate: in how many parts the gradient is taken.
        skip_nonfinite: leave all but `step` where the step is not finite.
        gather: makes whole what the loss sees of a state that is split.
    """

    loss_of: LossOf
    optimizer: optax.GradientTransformation
    ema_decay: EmaDecay
    part: str | None = None
    axis_name: str | None = None
    accumulate: int = 1
    skip_nonfinite: bool = False
    gather: Gather = lambda tree: tree

    def init(self, params: PyTree, frozen: PyTree = (), statistics: PyTree = ()) -> TrainState:
        """Return the state before the first update; see `training.init`.

        With a `part`, `ema` and `opt_state` are dictionaries by part, of this one.

        Raises:
            TypeError: as `training.init`; or if there is a `part` and `params` is no dictionary.
            ValueError: as `training.init`; or if `params` has no such part.
        """
        judging.judge_params(params)
        params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
        own = judging.part_of("params", params, self.part)
        averages, opt_state = ema.start(own, self.ema_decay), self.optimizer.init(own)
        if self.part is not None:
            averages, opt_state = {self.part: averages}, {self.part: opt_state}
        return begin(params, averages, opt_state, frozen, statistics)

    def over(self, axis_name: str | None) -> "GradientUpdate":
        """Return the update of shards of a batch along a mapped axis, or of whole batches."""
        return dataclasses.replace(self, axis_name=axis_name)

    def gathered(self, gather: Gather) -> "GradientUpdate":
        """Return the update of states that are split, and that `gather` makes whole."""
        return dataclasses.replace(self, gather=gather)

    def in_parts(self, accumulate: int) -> "GradientUpdate":
        """Return the update whose gradient is taken in so many parts."""
        return dataclasses.replace(self, accumulate=checks.count("accumulate", accumulate))

    def __call__(self, state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, Metrics]:
        """Make one step; see :func:`make_update`."""
        moved, metrics = self.move(state, key, batch)
        return finish(state, moved, metrics, skip_nonfinite=self.skip_nonfinite), metrics

    def move(self, state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, Metrics]:
        """Return what the step moves, `step` as it was, and the metrics; nothing is skipped.

        Raises:
            TypeError: as the update of :func:`make_update`, when it is traced.
            ValueError: likewise.
        """
        judging.judge_state(state, self.part, self.ema_decay)
        key = jax.random.fold_in(rows.one_key(key), state.step)
        gradients = functools.partial(self._gradients, state)
        grads, metrics, statistics = self._mean_over_parts(gradients, key, batch)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
        if statistics is None:
            statistics = state.statistics
        return self._stepped(state, grads)._replace(statistics=statistics), metrics

    def evaluate(self, state: TrainState, key: Key, batch: Batch) -> Metrics:
        """Return the metrics that :meth:`move` does but for `grad_norm`, without a gradient."""
        key = jax.random.fold_in(rows.one_key(key), state.step)

        def of_part(key: Key, batch: Batch) -> Metrics:
            return self._mean_loss(self._own(state.params), state, key, batch)[1][0]

        return self._mean_over_parts(of_part, key, batch)

    def _own(self, params: PyTree) -> PyTree:
        return params if self.part is None else params[self.part]

    def _with_own(self, tree: PyTree, own: PyTree) -> PyTree:
        return own if self.part is None else {**tree, self.part: own}

    def _mean_loss(
        self, own: PyTree, state: TrainState, key: Key, batch: Batch
    ) -> tuple[Array, tuple[Metrics, PyTree | None]]:
        seen = state._replace(
            params=self.gather(state.params),
            ema=self.gather(state.ema),
            frozen=self.gather(state.frozen),
            statistics=self.gather(state.statistics),
        )
        loss_fn = self.loss_of(seen)
        checks.function("loss_of(state)", loss_fn, _LOSS, takes=3)
        returned = loss_fn(self._with_own(seen.params, self.gather(own)), key, batch)
        loss, metrics, statistics = judging.judged_loss(returned, batch, state.statistics)
        means = {name: jnp.mean(value) for name, value in metrics.items()}
        return jnp.mean(loss), ({"loss": jnp.mean(loss), **means}, statistics)

    def _gradients(
        self, state: TrainState, key: Key, batch: Batch
    ) -> tuple[PyTree, Metrics, PyTree | None]:
        differentiate = jax.value_and_grad(self._mean_loss, has_aux=True)
        (_, aux), grads = differentiate(self._own(state.params), state, key, batch)
        return grads, *aux

    def _mean_over_parts(
        self, fn: Callable[[Key, Batch], PyTree], key: Key, batch: Batch
    ) -> PyTree:
        """Average fn(key, batch), itself a mean over rows, over all parts of the global batch."""
        shard, num_shards = judging.shard(self.axis_name)
        num_rows, count = judging.num_rows(batch), self.accumulate

        def of_part(part: tuple[Array, Batch]) -> PyTree:
            first = shard * num_rows + part[0]
            return fn(rows.part_key(key, first, count, num_shards * num_rows), part[1])

        def add(total: PyTree, part: tuple[Array, Batch]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, of_part(part)), None

        if count == 1 and num_shards == 1:
            mean = fn(key, batch)
        elif count == 1:
            mean = of_part((jnp.zeros((), int), batch))
        else:
            parts = jnp.arange(count), jax.tree.map(_interleaved(count), batch)
            shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            total, _ = jax.lax.scan(add, zero, parts)
            mean = jax.tree.map(lambda x: x / count, total)
        return mean if self.axis_name is None else jax.lax.pmean(mean, self.axis_name)

    def _stepped(self, state: TrainState, grads: PyTree) -> TrainState:
        """Return the state with its parameters, averages and optimizer's state moved."""
        own = self._own(state.params)
        opt_state = judging.part_of("state.opt_state", state.opt_state, self.part)
        try:
            updates, moved = self.optimizer.update(grads, opt_state, own)
        except (AttributeError, TypeError, ValueError):
            judging.judge_opt_state(opt_state, own, self.optimizer)
            raise
        params = optax.apply_updates(own, updates)
        averages = ema.move(self._own(state.ema), params, self.ema_decay, state.step + 1)
        return state._replace(
            params=self._with_own(state.params, params),
            ema=self._with_own(state.ema, averages),
            opt_state=self._with_own(state.opt_state, moved),
        )


def make_update(
    loss_fn: LossFn | None = None,
    optimizer: optax.GradientTransformation | None = None,
    *,
    loss_of: LossOf | None = None,
    ema_decay: EmaDecay,
    part: str | None = None,
    axis_name: str | None = None,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
) -> GradientUpdate:
    """Make the pure function of one training step.

    The randomness of step n is ``fold_in(key, n)``: callers pass the same run key at every step,
    and a run that was restored draws what it would have drawn.

    Args:
        loss_fn: ``(params, key, batch) -> (loss (B,), {name: (B,)})``, as `jaxdiff.losses` makes
            them. It draws per-example noise of its one key through `numerics.normal` and its
            fellows, the same in every mode: under an `axis_name` or `accumulate` its batch is a
            part of the global one and its key knows which (see `jaxdiff.rows`). Noise that it
            draws as ``jax.random.normal(key, x.shape)`` differs by part, and so by mode. It may
            be compiled, vmapped or recomputed (`jax.jit`, `jax.vmap`, `jax.checkpoint`). It may
            return third the new `statistics` of the state, as means over its rows: they are
            averaged over parts as the gradient is.
        optimizer: an optax optimizer.
        loss_of: in place of `loss_fn`: ``state -> loss_fn``, of the traced state, for a loss that
            depends on its `step`, `ema`, `frozen` or `statistics`. The gradient is that with
            respect to the `params` that the loss is given, and no other part of the state.
        ema_decay: the d of ema <- d ema + (1 - d) params, in [0, 1], a `Warmup` to one or a
            `PowerDecay`; a mapping of names to decays keeps one average a name.
        part: the part of `params`, a dictionary by part, that alone is differentiated, optimised
            and averaged; the loss is given all. See `networks.alternate`.
        axis_name: the mapped axis over which batches are split into equal shards (a `jax.pmap` or
            `jax.shard_map` of your own); gradients and metrics are averaged over it, and row i of
            shard j draws the noise of its global number. What `jaxdiff.training.parallel`
            compiles is told its own.
        accumulate: in how many parts the gradient is taken, one after the other, to save memory;
            the update is that of the whole batch up to rounding, for losses whose rows do not
            depend on each other.
        skip_nonfinite: leave all but `step` as it was where the loss or the norm of its gradient
            is NaN or infinite, which the metrics then show.

    Returns:
        ``update(state, key, batch) -> (state, metrics)``, and ``update.init(params, frozen=(),
        statistics=())``, the state before the first; metrics are the batch's means of what
        the loss reports, `loss` and `grad_norm`, shape (). When traced it raises ValueError or
        TypeError for a key that is not one typed key, a state of other averages or parts, a
        `loss_of` that returns no function, a loss that is not (B,), a metric named as one of the
        update's own, statistics of another structure than the state's, a batch that does not
        split into `accumulate` equal parts, or an axis that is mapped and not named, or the other
        way round.

    Raises:
        TypeError: if `loss_fn` or `loss_of` is no function, `optimizer` none of optax,
            `accumulate` no whole number, `skip_nonfinite` no truth value or `part` no text.
        ValueError: if not exactly one of `loss_fn` and `loss_of` is given, a decay is out of its
            range or `accumulate` below 1.
    """
    if loss_fn is not None and loss_of is not None:
        raise ValueError("`loss_fn` and `loss_of` are both given: a loss is one of them.")
    if loss_of is None:
        checks.function("loss_fn", loss_fn, _LOSS, takes=3)
    else:
        checks.function("loss_of", loss_of, f"state -> loss_fn, which is {_LOSS}", takes=1)
    judging.judge_optimizer(optimizer)
    ema.check_decay(ema_decay)
    if part is not None and not isinstance(part, str):
        raise TypeError(f"`part` must name a part of `params`; got {checks.shown(part)}.")
    if not isinstance(skip_nonfinite, bool):
        raise TypeError(f"`skip_nonfinite` must be true or false; got {skip_nonfinite!r}.")
    return GradientUpdate(
        loss_of=loss_of or (lambda state: loss_fn),  # type: ignore[arg-type, return-value]
        optimizer=optimizer,
        ema_decay=ema_decay,
        part=part,
        axis_name=axis_name,
        accumulate=checks.count("accumulate", accumulate),
        skip_nonfinite=skip_nonfinite,
    )


def finish(
    old: TrainState, moved: TrainState, metrics: Metrics, *, skip_nonfinite: bool
) -> TrainState:
    """Return the state after a step: `moved`, or `old` where that is not finite; counted."""
    step = old.step + 1
    if not skip_nonfinite:
        return moved._replace(step=step)
    fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(
        lambda new, before: jnp.where(fine, new, before),
        without_frozen(moved),
        without_frozen(old),
    )
    return kept._replace(step=step, frozen=old.frozen)


def scan_steps(update: Update) -> Update:
    """Make one call of several updates: batches (n, B, ...) in, metrics (n,) out."""

    def updates(state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda state, batch: update(state, key, batch), state, batch)

    return updates


def _interleaved(count: int) -> Callable[[Array], Array]:
    """Cut rows (B, ...) into parts (count, B / count, ...), part j taking rows j, j + count, ...

    Each part is then spread over the devices as the whole is.
    """

    def cut(x: Array) -> Array:
        if x.shape[0] % count:
            raise ValueError(
                f"`accumulate` must divide the batch (of a device); got {count} for {x.shape[0]}."
            )
        return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

    return cut
