"""The training state: what changes, and what a loss sees beside it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdiff.training import ema, judging
from jaxdiff.training.ema import EmaDecay
from jaxdiff.typing import Array, PyTree


class TrainState(NamedTuple):
    """All that training changes, and what is frozen; the networks and optimizers stay outside.

    Attributes:
        step: updates done, int32, shape ().
        params: the parameters.
        ema: their exponential moving average: a tree like `params`, or one a name, in float32 at
            least.
        opt_state: the optimizer's state.
        frozen: arrays that a loss sees and nothing changes, such as other networks' parameters.
            They are placed and split like the rest, and no checkpoint holds them: like the data
            they are an input.
        statistics: floating-point arrays that losses bring forward, such as running means.
    """

    step: Array
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    frozen: PyTree = ()
    statistics: PyTree = ()


def init(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: EmaDecay,
    frozen: PyTree = (),
    statistics: PyTree = (),
) -> TrainState:
    """Return the state before the first update.

    The average starts at a copy of `params`, so that the state may be donated, and is kept in
    float32 at least: steps of 1 - decay are lost in the rounding of 16 bits.

    Args:
        params: initial parameters; copied.
        optimizer: an optax optimizer.
        ema_decay: as for :func:`make_update`.
        frozen: arrays that nothing changes; not copied, and not donated by what
            `jaxdiff.training.parallel` compiles. Large ones are best placed
            (`parallel.place`) and given to the state that `parallel.init` made:
            ``state._replace(frozen=...)``.
        statistics: floating-point arrays; copied.

    Raises:
        TypeError: if a leaf of `params` or `statistics` is not an array of floating-point numbers,
            or one of `frozen` no array.
        ValueError: if there are no parameters, or a decay is out of its range.
    """
    judging.judge_params(params)
    judging.judge_optimizer(optimizer)
    params = _copy(params)
    averages = ema.start(params, ema_decay)
    return begin(params, averages, optimizer.init(params), frozen, statistics)


def begin(
    params: PyTree, averages: PyTree, opt_state: PyTree, frozen: PyTree, statistics: PyTree
) -> TrainState:
    """Return the state at step 0 of its parts, `statistics` copied.

    Raises:
        TypeError: as :func:`init`, of `frozen` and `statistics`.
    """
    judging.judge_floating("statistics", statistics, "Count steps by `state.step`.")
    judging.judge_arrays("frozen", frozen)
    step = jnp.zeros((), jnp.int32)
    frozen = jax.tree.map(jnp.asarray, frozen)
    return TrainState(step, params, averages, opt_state, frozen, _copy(statistics))


def without_frozen(state: Any) -> Any:
    """Return a `TrainState` with nothing frozen, and anything else as it is."""
    return with_frozen(state, ())


def frozen_of(state: Any) -> PyTree:
    """Return what is frozen in a `TrainState`, and nothing of anything else."""
    return state.frozen if isinstance(state, TrainState) else ()


def with_frozen(state: Any, frozen: PyTree) -> Any:
    """Return a `TrainState` with `frozen` in it, and anything else as it is."""
    return state._replace(frozen=frozen) if isinstance(state, TrainState) else state


def stored(state: Any) -> Any:
    """Return what a checkpoint holds of a `TrainState`, by field; of anything else, all."""
    if not isinstance(state, TrainState):
        return state
    fields = state._asdict()
    del fields["frozen"]
    if not jax.tree.leaves(state.statistics):  # as before there were any
        del fields["statistics"]
    return fields


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
