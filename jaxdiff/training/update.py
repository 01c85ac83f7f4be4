"""The training state and the one pure update, which every parallel mode runs."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import checks, rows
from jaxdiff.training.ema import EmaDecay, PowerDecay, check_decay, decay_at
from jaxdiff.training.placement import AXIS
from jaxdiff.typing import Array, Batch, Key, LossFn, PyTree


class TrainState(NamedTuple):
    """All that training changes; the network and the optimizer stay outside.

    Attributes:
        step: updates done, int32, shape ().
        params: the parameters.
        ema: their exponential moving average: a tree like `params`, or one a name.
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

    The average starts at a copy of `params`, so that the state may be donated.

    Args:
        params: initial parameters; copied.
        optimizer: an optax optimizer.
        ema_decay: as for :func:`make_update`.

    Raises:
        TypeError: if a leaf of `params` is not an array of floating-point numbers.
        ValueError: if there are no parameters, or a decay is out of its range.
    """
    _judge_params(params)
    params = _copy(params)
    names = check_decay(ema_decay)
    ema = _copy(params) if names is None else {name: _copy(params) for name in names}
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
        TypeError: if `loss_fn` is no function or `accumulate` no whole number.
        ValueError: if a decay is out of its range or `accumulate` below 1.
    """
    checks.function("loss_fn", loss_fn, "(params, key, batch) -> (loss (B,), metrics)")
    names = check_decay(ema_decay)
    accumulate = checks.count("accumulate", accumulate)

    def mean_loss(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        loss, metrics = _judged_loss(loss_fn(_gather.get()(params), key, batch), batch)
        means = {name: jnp.mean(value) for name, value in metrics.items()}
        return jnp.mean(loss), {"loss": jnp.mean(loss), **means}

    def gradients(params: PyTree, key: Key, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        (_, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, key, batch)
        return grads, metrics

    def in_parts(params: PyTree, key: Key, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        shard, num_shards = _shard(axis_name)
        num_rows = _num_rows(batch)
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
        key = jax.random.fold_in(rows.one_key(key), state.step)
        _judge_state(state, names)
        grads, metrics = in_parts(state.params, key, batch)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        step = state.step + 1
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
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


# --- What an update is given, judged when it is traced ---------------------------------------


def _judge_params(params: PyTree) -> None:
    """Refuse parameters of which a gradient makes no sense.

    Raises:
        ValueError: if there are none.
        TypeError: if a leaf is not an array of floating-point numbers.
    """
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise ValueError("`params` must hold at least one array; got none.")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`params{jax.tree_util.keystr(path)}` must be an array of floating-point "
                f"numbers; got {checks.shown(leaf)}. Close over what is not trained "
                "(equinox.partition parts a module so)."
            )


def _judge_state(state: TrainState, names: Mapping[str, Any] | None) -> None:
    """Refuse a state whose averages are not those that the update makes.

    Raises:
        TypeError: if it is no `TrainState`, or as :func:`_judge_params`.
        ValueError: if the averages differ.
    """
    if not isinstance(state, TrainState):
        raise TypeError(
            f"`state` must be a TrainState of training.init; got {checks.shown(state)}."
        )
    _judge_params(state.params)
    averages: PyTree = state.params if names is None else dict.fromkeys(names, state.params)
    found: Any = jax.tree.structure(state.ema)
    if found != jax.tree.structure(averages):
        raise ValueError(
            "`state.ema` must hold the averages of this update's `ema_decay`, "
            f"{'one, without a name' if names is None else ', '.join(names)}: "
            "make both with the same one."
        )


def _judged_loss(returned: Any, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """Return what a loss returned, if it is a loss an example and metrics with names of their own.

    Raises:
        TypeError: if it is no such pair.
        ValueError: if the loss has another shape than (B,), or a metric a name that is taken.
    """
    if not (isinstance(returned, tuple | list) and len(returned) == 2):
        raise TypeError(
            f"`loss_fn` must return (loss (B,), {{name: values}}); got {checks.shown(returned)}."
        )
    loss, metrics = returned
    num_rows = _num_rows(batch)
    if jnp.shape(loss) != (num_rows,):
        raise ValueError(
            f"`loss_fn` must return one loss an example, shape ({num_rows},); got "
            f"{jnp.shape(loss)}. Means over the batch are the update's."
        )
    if not isinstance(metrics, Mapping):
        raise TypeError(f"`loss_fn` must return metrics by name; got {checks.shown(metrics)}.")
    taken = [name for name in ("grad_norm", "step") if name in metrics]
    if "loss" in metrics and metrics["loss"] is not loss:
        taken.append("loss")
    if taken:
        raise ValueError(f"`loss_fn` must not name a metric {taken[0]!r}: it is the update's own.")
    return loss, {name: value for name, value in metrics.items() if name != "loss"}


def _num_rows(batch: Batch) -> int:
    """Return the number of rows of a batch, the size of its leaves' first axis.

    Raises:
        ValueError: if it has no leaves, or they differ.
    """
    leaves = jax.tree.leaves_with_path(batch)
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else None for _, leaf in leaves}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        found = ", ".join(f"batch{jax.tree_util.keystr(p)} {np.shape(x)}" for p, x in leaves)
        raise ValueError(
            f"`batch` must hold arrays with one leading axis of examples; got {found or 'nothing'}."
        )
    return int(sizes.pop() or 0)


def _shard(axis_name: str | None) -> tuple[Any, int]:
    """Return which shard of how many a batch is.

    Raises:
        ValueError: if `axis_name` is not mapped where the update is traced, or is None where
            `parallel.pmap` runs it.
    """
    try:
        name = AXIS if axis_name is None else axis_name
        shard = jax.lax.axis_index(name), jax.lax.axis_size(name)
    except NameError:
        if axis_name is None:
            return 0, 1
        raise ValueError(
            f"`axis_name` is {axis_name!r}, and no such axis is mapped here: compile this update "
            "by parallel.pmap, or make it without an `axis_name`."
        ) from None
    if axis_name is None:
        raise ValueError(
            f"`axis_name` must be {AXIS!r} for an update that parallel.pmap runs: make it by "
            "make_update(..., axis_name=parallel.AXIS)."
        )
    return shard


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
