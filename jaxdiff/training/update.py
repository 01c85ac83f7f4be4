"""The training state and the one pure update, which every parallel mode runs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxdiff import numerics
from jaxdiff.typing import Array, Batch, Key, LossFn, PyTree

EmaDecay: TypeAlias = float | Mapping[str, float]
"""One decay, or several by name."""


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
        ValueError: if a decay is outside [0, 1].
    """
    params = _copy(params)
    names = _check_decay(ema_decay)
    ema = _copy(params) if names is None else {name: _copy(params) for name in names}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: EmaDecay,
    axis_name: str | None = None,
) -> Update:
    """Make the pure function of one training step.

    The randomness of step n is ``fold_in(key, n)``: callers pass the same run key at every step,
    and a run that was restored draws what it would have drawn.

    Args:
        loss_fn: ``(params, key, batch) -> (loss (B,), {name: (B,)})``, as `jaxdiff.losses` makes
            them. It draws per-example noise from its one key through `numerics.normal` and its
            fellows. Under an `axis_name` a loss that calls ``jax.random.normal(key, x.shape)``
            itself draws the same noise on every shard.
        optimizer: an optax optimizer.
        ema_decay: the d of ema <- d ema + (1 - d) params, in [0, 1]; a mapping of names to decays
            keeps one average a name.
        axis_name: the mapped axis over which batches are split into equal shards (`jax.pmap`,
            `jax.shard_map`); gradients and metrics are averaged over it, and row i of shard j
            draws the noise of its global number. None for `jax.jit`, on one device or a mesh.

    Returns:
        ``update(state, key, batch) -> (state, metrics)``; metrics are the batch's means of what
        the loss reports, `loss` and `grad_norm`, shape ().

    Raises:
        ValueError: if a decay is outside [0, 1].
    """
    names = _check_decay(ema_decay)

    def mean_loss(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        loss, metrics = loss_fn(params, key, batch)
        metrics = {"loss": loss, **metrics}
        return jnp.mean(loss), {name: jnp.mean(value) for name, value in metrics.items()}

    def gradients(params: PyTree, key: Key, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        (_, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, key, batch)
        return grads, metrics

    def update(state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        if axis_name is None:
            grads, metrics = gradients(state.params, key, batch)
        else:
            shard = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
            with numerics.shard_rows(*shard):
                grads, metrics = gradients(state.params, key, batch)
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if names is None:
            ema = _average(state.ema, params, ema_decay)
        else:
            ema = {name: _average(state.ema[name], params, names[name]) for name in names}
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return update


def _average(ema: PyTree, params: PyTree, decay: Any) -> PyTree:
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p.astype(e.dtype), ema, params)


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def _check_decay(ema_decay: EmaDecay) -> Mapping[str, float] | None:
    """Check the decays; return them if they are named."""
    named = ema_decay if isinstance(ema_decay, Mapping) else {"": ema_decay}
    for name, decay in named.items():
        known = numerics.concrete(decay)
        if known is not None and not 0.0 <= known <= 1.0:
            which = f"`ema_decay[{name!r}]`" if name else "`ema_decay`"
            raise ValueError(f"{which} must lie in [0, 1]; got {decay}.")
    return named if isinstance(ema_decay, Mapping) else None
