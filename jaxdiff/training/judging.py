"""What an update is given, judged while it is traced."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import checks
from jaxdiff.training.ema import EmaDecay
from jaxdiff.typing import Array, Batch, PyTree

UNNAMED = "_internal_pmap_axis_name"
"""The axis of a `jax.pmap` that was given none."""


def judge_params(params: PyTree) -> None:
    """Refuse parameters of which a gradient makes no sense.

    Raises:
        ValueError: if there are none.
        TypeError: if a leaf is not an array of floating-point numbers.
    """
    if not jax.tree.leaves(params):
        raise ValueError("`params` must hold at least one array; got none.")
    remedy = "Close over what is not trained (equinox.partition parts a module so), or give it as "
    judge_floating("params", params, remedy + "`frozen`.")


def judge_floating(name: str, tree: PyTree, remedy: str) -> None:
    """Refuse a tree of which a leaf is not an array of floating-point numbers.

    Raises:
        TypeError: if one is not, saying `remedy`.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        held = isinstance(leaf, float | jax.Array | np.ndarray | np.generic)
        dtype = getattr(leaf, "dtype", np.dtype(float))
        if not held or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`{name}{jax.tree_util.keystr(path)}` must be an array of floating-point "
                f"numbers; got {checks.shown(leaf)}. {remedy}"
            )


def judge_arrays(name: str, tree: PyTree) -> None:
    """Refuse a tree of which a leaf is no array.

    Raises:
        TypeError: if one is none.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, int | float | jax.Array | np.ndarray | np.generic):
            raise TypeError(
                f"`{name}{jax.tree_util.keystr(path)}` must be an array; got "
                f"{checks.shown(leaf)}. Close over functions, and give arrays alone."
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


def judge_state(state: Any, part: str | None, ema_decay: EmaDecay) -> None:
    """Refuse a state whose averages are not those that the update makes.

    Args:
        state: what an update was given.
        part: which part of the parameters it moves, None for all.
        ema_decay: the update's.

    Raises:
        TypeError: if it is no `TrainState`, or as :func:`judge_params` and :func:`part_of`.
        ValueError: if the averages differ, or as :func:`part_of`.
    """
    fields = ("step", "params", "ema", "opt_state", "frozen", "statistics")
    if not all(hasattr(state, name) for name in fields):
        raise TypeError(
            f"`state` must be a TrainState of training.init; got {checks.shown(state)}."
        )
    judge_params(state.params)
    params = part_of("state.params", state.params, part)
    found: Any = jax.tree.structure(part_of("state.ema", state.ema, part))
    names = tuple(ema_decay) if isinstance(ema_decay, Mapping) else None
    averages: PyTree = params if names is None else dict.fromkeys(names, params)
    if found != jax.tree.structure(averages):
        raise ValueError(
            "`state.ema` must hold the averages of this update's `ema_decay`, "
            f"{'one, without a name' if names is None else ', '.join(names)}: "
            "make both with the same one, or the state by `update.init`."
        )


def part_of(name: str, tree: PyTree, part: str | None) -> PyTree:
    """Return one part of a dictionary by part, or all where `part` is None.

    Args:
        name: of the tree, as a refusal says it.
        tree: a dictionary by part.
        part: the name of one.

    Raises:
        TypeError: if there is a `part` and `tree` is no dictionary.
        ValueError: if it has no such part.
    """
    if part is None:
        return tree
    if not isinstance(tree, dict):
        raise TypeError(
            f"`{name}` must be a dictionary by part for an update of `part` {part!r}; got "
            f"{checks.shown(tree)}. Make the state by `update.init`."
        )
    if part not in tree:
        raise ValueError(
            f"`{name}` must have the part {part!r} of this update; it has "
            f"{', '.join(map(repr, tree)) or 'none'}. Give make_update one of them as `part`, and "
            "make the state by `update.init`."
        )
    return tree[part]


def judge_opt_state(opt_state: PyTree, params: PyTree, optimizer: Any) -> None:
    """Refuse the state of another optimizer.

    Raises:
        ValueError: if it is one.
    """
    made: Any = jax.tree.structure(jax.eval_shape(optimizer.init, params))
    if made != jax.tree.structure(opt_state):
        raise ValueError(
            "`state.opt_state` must be of this update's `optimizer`; it is another's: give "
            "training.init and make_update the same one, or make the state by `update.init`."
        )


def judged_loss(
    returned: Any, batch: Batch, statistics: PyTree
) -> tuple[Array, dict[str, Array], PyTree | None]:
    """Return what a loss returned, if it is a loss an example and metrics with names of their own.

    A metric "loss", which the losses of this library report, is the loss and nothing else.

    Args:
        returned: (loss, metrics) or (loss, metrics, new statistics).
        batch: what the loss was given.
        statistics: those of the state.

    Returns:
        The loss (B,), the metrics by name, the new statistics or None where there are none.

    Raises:
        TypeError: if it is neither.
        ValueError: if the loss has another shape than (B,), a metric a name that is taken, or the
            new statistics are not of the structure and shapes of the old.
    """
    if not (isinstance(returned, tuple | list) and len(returned) in (2, 3)):
        raise TypeError(
            "`loss_fn` must return (loss (B,), {name: values}), and third, if it keeps any, the "
            f"new statistics; got {checks.shown(returned)}."
        )
    loss, metrics = returned[:2]
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
    taken = [name for name in ("grad_norm", "skipped", "step") if name in metrics]
    if taken:
        raise ValueError(f"`loss_fn` must not name a metric {taken[0]!r}: it is the update's own.")
    metrics = {name: value for name, value in metrics.items() if name != "loss"}
    return loss, metrics, _judged_statistics(returned[2], statistics) if returned[2:] else None


def _judged_statistics(new: PyTree, old: PyTree) -> PyTree:
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (new, old)]
    structure: Any = jax.tree.structure(new)
    if structure != jax.tree.structure(old) or shapes[0] != shapes[1]:
        raise ValueError(
            "`loss_fn` must return third the new `state.statistics`, of their structure and "
            f"shapes {shapes[1]}; got {shapes[0]}. They are means over the batch's rows; give "
            "`update.init` the first ones."
        )
    judge_floating("statistics", new, "Count steps by `state.step`.")
    return jax.tree.map(lambda n, o: jnp.asarray(n, o.dtype), new, old)


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
            devices are mapped: in `jax.pmap` or `jax.shard_map`.
    """
    if axis_name is not None:
        try:
            return jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
        except NameError:
            raise ValueError(
                f"`axis_name` is {axis_name!r}, and no such axis is mapped here: compile this "
                "update by `jaxdiff.training.parallel`, which sets the axis, or make it without "
                "an `axis_name`."
            ) from None
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    if mapped:
        named = mapped[0] if mapped[0] != UNNAMED else "of yours"
        raise ValueError(
            f"`axis_name` must be {named!r} for an update that is mapped over devices here, or "
            "their gradients would not be averaged: make it by make_update(..., axis_name=...), "
            "or give the update itself to parallel.pmap, which sets it."
        )
    return 0, 1
