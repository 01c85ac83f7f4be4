"""The training state and the one pure update, which every parallel mode runs."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxdiff import checks, rows
from jaxdiff.training import judging
from jaxdiff.training.ema import EmaDecay, PowerDecay, check_decay, decay_at
from jaxdiff.typing import Array, Batch, Key, LossFn, PyTree


class TrainState(NamedTuple):
    """All that training changes; the network and the optimizer stay outside.

    Attributes:
        step: updates done, int32, shape ().
        params: the parameters.
        ema: their exponential moving average: a tree like `params`, or one a name, in float32 at
            least.
        opt_state: the optimizer's state.
    """

    step: Array
    params: PyTree
    ema: PyTree
    opt_state: PyTree


Update: TypeAlias = Callable[[TrainState, Key, Batch], tuple[TrainState, dict[str, Array]]]
"""``(state, key, batch) -> (state, metrics)``, metrics being scalars by name."""


def init(
    params: PyTree, optimizer: optax.GradientTransformation, *, ema_decay: EmaDecay
) -> TrainState:
    """Return the state before the first update.

    The average starts at a copy of `params`, so that the state may be donated, and is kept in
    float32 at least: steps of 1 - decay are lost in the rounding of 16 bits.

    Args:
        params: initial parameters; copied.
        optimizer: an optax optimizer.
        ema_decay: as for :func:`make_update`.

    Raises:
        TypeError: if a leaf of `params` is not an array of floating-point numbers.
        ValueError: if there are no parameters, or a decay is out of its range.
    """
    judging.judge_params(params)
    judging.judge_optimizer(optimizer)
    params = _copy(params)
    names = check_decay(ema_decay)
    ema = _average_of(params) if names is None else {name: _average_of(params) for name in names}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: EmaDecay,
    axis_name: str | None = None,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
) -> Update:
    """Make the pure function of one training step.

    The randomness of step n is ``fold_in(key, n)``: callers pass the same run key at every step,
    and a run that was restored draws what it would have drawn.

    Args:
        loss_fn: ``(params, key, batch) -> (loss (B,), {name: (B,)})``, as `jaxdiff.losses` makes
            them. It draws per-example noise of its one key through `numerics.normal` and its
            fellows, the same in every mode: under an `axis_name` or `accumulate` its batch is a
            part of the global one and its key knows which (see `jaxdiff.rows`). Noise that it
            draws as ``jax.random.normal(key, x.shape)`` differs by part, and so by mode. It may
            be compiled, vmapped or recomputed (`jax.jit`, `jax.vmap`, `jax.checkpoint`).
        optimizer: an optax optimizer.
        ema_decay: the d of ema <- d ema + (1 - d) params, in [0, 1], or a `PowerDecay`; a mapping
            of names to decays keeps one average a name.
        axis_name: the mapped axis over which batches are split into equal shards (`jax.pmap`,
            `jax.shard_map`); gradients and metrics are averaged over it, and row i of shard j
            draws the noise of its global number. None for `jax.jit`, on one device or a mesh.
        accumulate: in how many parts the gradient is taken, one after the other, to save memory;
            the update is that of the whole batch up to rounding, for losses whose rows do not
            depend on each other.
        skip_nonfinite: leave all but `step` as it was where the loss or the norm of its gradient
            is NaN or infinite, which the metrics then show.

    Returns:
        ``update(state, key, batch) -> (state, metrics)``; metrics are the batch's means of what
        the loss reports, `loss` and `grad_norm`, shape (). When traced it raises ValueError or
        TypeError for a key that is not one typed key, a state of other averages, a loss that is
        not (B,), a metric named as one of the update's own, a batch that does not split into
        `accumulate` equal parts, or an axis that is mapped and not named, or the other way round.

    Raises:
        TypeError: if `loss_fn` is no function, `optimizer` none of optax, `accumulate` no whole
            number or `skip_nonfinite` no truth value.
        ValueError: if a decay is out of its range or `accumulate` below 1.
    """
    checks.function("loss_fn", loss_fn, "(params, key, batch) -> (loss (B,), metrics)", takes=3)
    judging.judge_optimizer(optimizer)
    names = check_decay(ema_decay)
    accumulate = checks.count("accumulate", accumulate)
    if not isinstance(skip_nonfinite, bool):
        raise TypeError(f"`skip_nonfinite` must be true or false; got {skip_nonfinite!r}.")

    def mean_loss(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        loss, metrics = judging.judged_loss(loss_fn(_gather.get()(params), key, batch), batch)
        means = {name: jnp.mean(value) for name, value in metrics.items()}
        return jnp.mean(loss), {"loss": jnp.mean(loss), **means}

    def gradients(params: PyTree, key: Key, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        (_, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, key, batch)
        return grads, metrics

    def in_parts(params: PyTree, key: Key, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        shard, num_shards = judging.shard(axis_name)
        num_rows = judging.num_rows(batch)
        if accumulate == 1 and num_shards == 1:
            return gradients(params, key, batch)

        def of_part(part: tuple[Array, Batch]) -> tuple[PyTree, dict[str, Array]]:
            first = shard * num_rows + part[0]
            numbered = rows.part_key(key, first, accumulate, num_shards * num_rows)
            return gradients(params, numbered, part[1])

        if accumulate == 1:
            return of_part((jnp.zeros((), int), batch))

        def add(total: PyTree, part: tuple[Array, Batch]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, of_part(part)), None

        parts = jnp.arange(accumulate), jax.tree.map(_interleaved(accumulate), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, first))
        total, _ = jax.lax.scan(add, zero, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    def update(state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        judging.judge_state(state, names)
        key = jax.random.fold_in(rows.one_key(key), state.step)
        grads, metrics = in_parts(state.params, key, batch)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        step = state.step + 1
        try:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        except (AttributeError, TypeError, ValueError):
            judging.judge_opt_state(state, optimizer)
            raise
        params = optax.apply_updates(state.params, updates)
        if names is None:
            ema = _average(state.ema, params, ema_decay, step)  # type: ignore[arg-type]
        else:
            ema = {
                name: _average(state.ema[name], params, decay, step)
                for name, decay in names.items()
            }
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
        new = TrainState(step, params, ema, opt_state)
        if skip_nonfinite:
            fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            new = jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, state)
            new = new._replace(step=step)
        return new, metrics

    return update


_gather: contextvars.ContextVar[Callable[[PyTree], PyTree]] = contextvars.ContextVar(
    "gather", default=lambda params: params
)


@contextlib.contextmanager
def gathering(gather: Callable[[PyTree], PyTree]) -> Iterator[None]:
    """While tracing, say how parameters that are split over devices are made whole for the loss.

    A mesh enters it; updates need not know.
    """
    token = _gather.set(gather)
    try:
        yield
    finally:
        _gather.reset(token)


def scan_steps(update: Update) -> Update:
    """Make one call of several updates: batches (n, B, ...) in, metrics (n,) out."""

    def updates(state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return jax.lax.scan(lambda state, batch: update(state, key, batch), state, batch)

    return updates


def _average(ema: PyTree, params: PyTree, decay: float | PowerDecay, step: Array) -> PyTree:
    d = decay_at(decay, step)

    def of_leaf(e: Array, p: Array) -> Array:
        return (d * e + (1.0 - d) * p.astype(e.dtype)).astype(e.dtype)

    return jax.tree.map(of_leaf, ema, params)


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


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def _average_of(params: PyTree) -> PyTree:
    def wide(leaf: Array) -> Array:
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True)

    return jax.tree.map(wide, params)
