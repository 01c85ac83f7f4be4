"""What an update is given, judged while it is traced."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import checks
from jaxdiff.training.placement import AXIS
from jaxdiff.typing import Array, Batch, PyTree


def judge_params(params: PyTree) -> None:
    """Refuse parameters of which a gradient makes no sense.

    Raises:
        ValueError: if there are none.
        TypeError: if a leaf is not an array of floating-point numbers.
    """
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise ValueError("`params` must hold at least one array; got none.")
    for path, leaf in leaves:
        held = isinstance(leaf, float | jax.Array | np.ndarray | np.generic)
        dtype = getattr(leaf, "dtype", np.dtype(float))
        if not held or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`params{jax.tree_util.keystr(path)}` must be an array of floating-point "
                f"numbers; got {checks.shown(leaf)}. Close over what is not trained "
                "(equinox.partition parts a module so)."
            )


def judge_optimizer(optimizer: Any) -> None:
    """Refuse what is no optimizer of optax, such as a function that makes one.

    Raises:
        TypeError: if it is none.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "`optimizer` must be one of optax, called: optax.adamw(1e-3); "
            f"got {checks.shown(optimizer)}."
        )


def judge_state(state: Any, names: Mapping[str, Any] | None) -> None:
    """Refuse a state whose averages are not those that the update makes.

    Raises:
        TypeError: if it is no `TrainState`, or as :func:`judge_params`.
        ValueError: if the averages differ.
    """
    fields = ("step", "params", "ema", "opt_state")
    if not all(hasattr(state, name) for name in fields):
        raise TypeError(
            f"`state` must be a TrainState of training.init; got {checks.shown(state)}."
        )
    judge_params(state.params)
    averages: PyTree = state.params if names is None else dict.fromkeys(names, state.params)
    found: Any = jax.tree.structure(state.ema)
    if found != jax.tree.structure(averages):
        raise ValueError(
            "`state.ema` must hold the averages of this update's `ema_decay`, "
            f"{'one, without a name' if names is None else ', '.join(names)}: "
            "make both with the same one."
        )


def judge_opt_state(state: Any, optimizer: Any) -> None:
    """Refuse a state of another optimizer.

    Raises:
        ValueError: if it is one.
    """
    made: Any = jax.tree.structure(jax.eval_shape(optimizer.init, state.params))
    if made != jax.tree.structure(state.opt_state):
        raise ValueError(
            "`state.opt_state` must be of this update's `optimizer`; it is another's: give "
            "training.init and make_update the same one."
        )


def judged_loss(returned: Any, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """Return what a loss returned, if it is a loss an example and metrics with names of their own.

    A metric "loss", which the losses of this library report, is the loss and nothing else.

    Raises:
        TypeError: if it is no such pair.
        ValueError: if the loss has another shape than (B,), or a metric a name that is taken.
    """
    if not (isinstance(returned, tuple | list) and len(returned) == 2):
        raise TypeError(
            f"`loss_fn` must return (loss (B,), {{name: values}}); got {checks.shown(returned)}."
        )
    loss, metrics = returned
    wanted = (num_rows(batch),)
    if jnp.shape(loss) != wanted:
        raise ValueError(
            f"`loss_fn` must return one loss an example, shape {wanted}; got "
            f"{jnp.shape(loss)}. Means over the batch are the update's."
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(
            f"`loss_fn` must return a loss of floating-point numbers; got {jnp.result_type(loss)}."
        )
    if not isinstance(metrics, Mapping):
        raise TypeError(f"`loss_fn` must return metrics by name; got {checks.shown(metrics)}.")
    taken = [name for name in ("grad_norm", "step") if name in metrics]
    if taken:
        raise ValueError(f"`loss_fn` must not name a metric {taken[0]!r}: it is the update's own.")
    return loss, {name: value for name, value in metrics.items() if name != "loss"}


def num_rows(batch: Batch) -> int:
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


def shard(axis_name: str | None) -> tuple[Any, int]:
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
