r"""Several networks, each with a loss and an optimizer of its own, trained in turn.

The parameters are a dictionary by part. Each update differentiates, optimises and averages its own
part and sees all of them, those before it as they have been moved::

    update = networks.alternate(
        critic=make_update(critic_loss, optax.adam(1e-4), ema_decay=0.0, part="critic"),
        generator=make_update(generator_loss, optax.adam(1e-4), ema_decay=0.999, part="generator"),
    )
    state = update.init({"critic": ..., "generator": ...})
    state, metrics = parallel.jit(update)(state, key, batch)

What is trained and what is not: a network that no update moves belongs in `TrainState.frozen`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdiff import checks, rows
from jaxdiff.training import judging
from jaxdiff.training.state import TrainState, begin
from jaxdiff.training.update import Gather, GradientUpdate, Metrics, finish
from jaxdiff.typing import Batch, Key, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Alternation:
    """Updates of parts of the parameters, one after the other; :func:`alternate` makes it.

    Attributes:
        updates: by part, in order.
        every: how often each is made, in steps.
        skip_nonfinite: leave all but `step` where one of them is not finite.
    """

    updates: Mapping[str, GradientUpdate]
    every: Mapping[str, int]
    skip_nonfinite: bool

    def init(self, params: PyTree, frozen: PyTree = (), statistics: PyTree = ()) -> TrainState:
        """Return the state before the first update; see `training.init`.

        Args:
            params: a dictionary by part.
            frozen: arrays that nothing changes; not copied.
            statistics: floating-point arrays; copied.

        Returns:
            The state, with `ema` and `opt_state` by part.

        Raises:
            TypeError: as `training.init`, or if `params` is no dictionary.
            ValueError: as `training.init`, or if it has other parts than the updates.
        """
        self._judge_parts("params", params)
        each = {part: update.init({part: params[part]}) for part, update in self.updates.items()}
        return begin(
            {name: state.params[name] for name, state in each.items()},
            {name: state.ema[name] for name, state in each.items()},
            {name: state.opt_state[name] for name, state in each.items()},
            frozen,
            statistics,
        )

    def over(self, axis_name: str | None) -> "Alternation":
        """Return the updates of shards of a batch along a mapped axis, or of whole batches."""
        updates = {name: update.over(axis_name) for name, update in self.updates.items()}
        return dataclasses.replace(self, updates=updates)

    def gathered(self, gather: Gather) -> "Alternation":
        """Return the updates of states that are split, and that `gather` makes whole."""
        updates = {name: update.gathered(gather) for name, update in self.updates.items()}
        return dataclasses.replace(self, updates=updates)

    def in_parts(self, accumulate: int) -> "Alternation":
        """Return the updates whose gradients are taken in so many parts."""
        updates = {name: update.in_parts(accumulate) for name, update in self.updates.items()}
        return dataclasses.replace(self, updates=updates)

    def __call__(self, state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, Metrics]:
        """Make one step of all; see :func:`alternate`.

        Raises:
            TypeError: as the updates.
            ValueError: likewise, or if the parameters have other parts.
        """
        if isinstance(state, TrainState):
            self._judge_parts("state.params", state.params)
        key = rows.one_key(key)
        metrics: Metrics = {}
        moved, of_each = state, []
        for i, name in enumerate(self.updates):
            moved, found = self._turn(name, moved, jax.random.fold_in(key, i), batch)
            metrics |= {f"{name}_{metric}": value for metric, value in found.items()}
            of_each.append((found["loss"], found["grad_norm"]))
        losses, norms = map(jnp.stack, zip(*of_each, strict=True))
        metrics |= {"loss": jnp.sum(losses), "grad_norm": jnp.sqrt(jnp.sum(norms**2))}
        return finish(state, moved, metrics, skip_nonfinite=self.skip_nonfinite), metrics

    def _turn(
        self, name: str, state: TrainState, key: Key, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        """Make the update of a part where it is due, else take its loss alone."""
        update, every = self.updates[name], self.every.get(name, 1)
        if every == 1:
            return update.move(state, key, batch)

        def made() -> tuple[TrainState, Metrics]:
            moved, metrics = update.move(state, key, batch)
            return moved._replace(frozen=()), metrics

        def waited() -> tuple[TrainState, Metrics]:
            metrics = update.evaluate(state, key, batch)
            norm = jax.eval_shape(optax.tree.norm, state.params[name])
            metrics |= {"grad_norm": jnp.zeros(norm.shape, norm.dtype)}
            return state._replace(frozen=()), metrics

        moved, metrics = jax.lax.cond((state.step + 1) % every == 0, made, waited)
        return moved._replace(frozen=state.frozen), metrics

    def _judge_parts(self, name: str, params: Any) -> None:
        for part in self.updates:
            judging.part_of(name, params, part)
        others = [part for part in params if part not in self.updates]
        if others:
            raise ValueError(
                f"`{name}` must have the parts that are trained, "
                f"{', '.join(map(repr, self.updates))}, alone; got {others[0]!r} too. Give its "
                "update, or it as `frozen`."
            )


def alternate(*, every: Mapping[str, int] | None = None, **updates: GradientUpdate) -> Alternation:
    """Make one update of several, each of its own part of the parameters, in order.

    They are made on the same batch and counted as one step; update i of them folds i into the key.

    Args:
        every: for a part that is not moved at every step, at which: 5 is steps 5, 10, ... On
            the others its loss is taken, without a gradient, so that every step can be logged.
        **updates: by part, of :func:`make_update` with that `part`.

    Returns:
        ``update(state, key, batch) -> (state, metrics)``, with ``update.init(params, frozen=(),
        statistics=())``. Metrics are those of each by part, as `critic_loss`, and of all: `loss`,
        the sum of the losses, and `grad_norm`, the norm of all gradients together. Where
        the updates are made with `skip_nonfinite` the step of all is skipped if one is not finite.

    Raises:
        TypeError: if an update is not of :func:`make_update`, or `every` holds no whole numbers.
        ValueError: if there are none, one is of another part, two differ in `axis_name` or
            `skip_nonfinite`, or `every` names another part.
    """
    if not updates:
        raise ValueError("`alternate` must be given the update of each part by name; got none.")
    for name, update in updates.items():
        if not isinstance(update, GradientUpdate):
            raise TypeError(
                f"`{name}` must be an update of make_update(..., part={name!r}); got "
                f"{checks.shown(update)}."
            )
        if update.part != name:
            raise ValueError(
                f"`{name}` must be the update of the part of that name; its `part` is "
                f"{update.part!r}: make it by make_update(..., part={name!r})."
            )
    for option in ("axis_name", "skip_nonfinite"):
        found = {name: getattr(update, option) for name, update in updates.items()}
        if len(set(found.values())) > 1:
            raise ValueError(f"`{option}` must be the same for all the updates; got {found}.")
    every = {} if every is None else dict(every)
    for name, count in every.items():
        if name not in updates:
            raise ValueError(
                f"`every` must name parts, {', '.join(map(repr, updates))}; got {name!r}."
            )
        checks.count(f"every[{name!r}]", count)
    return Alternation(updates, every, next(iter(updates.values())).skip_nonfinite)
