"""Train a group: all its members under one `jax.vmap`, in one compiled program.

Each member has its own parameters, data order and noise, those that a run of its seed alone would
have. Steps are a loop on the device, called for a part of them at a time, so that a signal is seen
between two calls; how many make a part changes no number.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.ablations.definition import SEED, Group
from experiments.ablations.fields import replaced
from experiments.ablations.world import Member, Problem, RunConfig, Shared, member_of
from experiments.common import optimization
from jaxdiff import training
from jaxdiff.typing import Array, PyTree

SECONDS_A_CALL = 2.0
"""About how long one call takes."""


class Members(NamedTuple):
    """Trained runs side by side.

    Attributes:
        config: what they share.
        own: what each has of its own, (M,) by field, the seed among them.
    """

    config: RunConfig
    own: dict[str, Array]

    def map(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Return ``mapped(config, *trees)``, that is `fn(member, *trees)` of all members.

        Trees have a leading axis of M. A program is made for each config, and for nothing less: a
        field that configs gain cannot be given the program of another value.
        """

        @functools.partial(jax.jit, static_argnums=0)
        def mapped(config: RunConfig, own: dict[str, Array], trees: tuple[PyTree, ...]) -> PyTree:
            def of_one(own: dict[str, Array], trees: tuple[PyTree, ...]) -> PyTree:
                return fn(member_of(config, own), *trees)

            return jax.vmap(of_one)(own, trees)

        return lambda config, *trees: mapped(config, self.own, trees)


class Trained(NamedTuple):
    """What a group's training leaves.

    Attributes:
        members: the runs.
        ema: their averages, (M, ...) each; by name where several are kept.
        finite: whether each stayed finite, (M,).
        flops: operations of a member's training as XLA counts them, None where it does not.
        seconds: of compilation and of the steps.
    """

    members: Members
    ema: PyTree
    finite: np.ndarray
    flops: float | None
    seconds: dict[str, float]


def members_of(group: Group) -> Members:
    """Return the members of a group."""
    config = group.config
    config = replaced(config, {"decay_steps": config.decay_steps or config.num_steps})
    own = {
        field: jnp.asarray(
            [member[field] for member in group.members],
            jnp.uint32 if field == SEED else jnp.float32,
        )
        for field in group.members[0]
    }
    return Members(config, own)


def train(
    problem: Problem, group: Group, tick: Callable[[int], None] = lambda count: None
) -> Trained:
    """Train all members of a group.

    Args:
        problem: of the group's config.
        group: what to train.
        tick: told how many steps each call has made.
    """
    members = members_of(group)
    num_steps = members.config.num_steps
    whole = [replaced(members.config, member) for member in group.members]
    tables, axes = _stacked([problem.table(config) for config in whole])

    def start(member: Member[RunConfig]) -> training.TrainState:
        decays = optimization.ema_decays(member.config, member.numbers["ema_decay"])
        return training.init(problem.init_params(member), build_optimizer(member), ema_decay=decays)

    began = time.perf_counter()
    state = members.map(start)(members.config)
    mapped = jax.jit(
        jax.vmap(_advance(problem, members.config), in_axes=(0, 0, axes, None, None)),
        donate_argnums=1,
    )
    lowered = mapped.lower(members.own, state, tables, 0, 1)
    flops = (lowered.cost_analysis() or {}).get("flops")
    run = lowered.compile()
    compiled = time.perf_counter()
    done, part = 0, 1
    while done < num_steps:
        before = time.perf_counter()
        stop = min(done + part, num_steps)
        state = jax.block_until_ready(run(members.own, state, tables, done, stop))
        tick(stop - done)
        rate = (stop - done) / (time.perf_counter() - before)
        done, part = stop, max(1, int(SECONDS_A_CALL * rate))
    leaves = jax.tree.leaves(state.ema)
    finite = np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in leaves], axis=0)
    return Trained(
        members,
        state.ema,
        finite,
        None if flops is None else flops / len(group.members) * num_steps,
        {"compile": compiled - began, "train": time.perf_counter() - compiled},
    )


def _stacked(tables: Sequence[PyTree]) -> tuple[PyTree, PyTree]:
    """Return the members' tables side by side, and the axis of each array over which they lie."""

    def is_shared(leaf: Any) -> bool:
        return isinstance(leaf, Shared)

    def stack(*rows: Any) -> Any:
        return rows[0] if is_shared(rows[0]) else np.stack(rows)

    stacked = jax.tree.map(stack, *tables, is_leaf=is_shared)
    axes = jax.tree.map(lambda leaf: None if is_shared(leaf) else 0, stacked, is_leaf=is_shared)
    return stacked, axes


def _advance(problem: Problem, config: RunConfig) -> Callable[..., PyTree]:
    """Return what takes a member's state from one step to another."""

    def advance(
        own: dict[str, Array], state: PyTree, table: PyTree, first: Array, last: Array
    ) -> PyTree:
        member = member_of(config, own)
        update = training.make_update(
            problem.loss(member),
            build_optimizer(member),
            ema_decay=optimization.ema_decays(member.config, member.numbers["ema_decay"]),
        )

        def body(step: Array, state: PyTree) -> PyTree:
            return update(state, member.key, problem.batch(member, table, step))[0]

        return jax.lax.fori_loop(first, last, body, state)

    return advance


def build_optimizer(member: Member[RunConfig]) -> optax.GradientTransformation:
    """Make the optimizer of experiments.common.optimization, of a member's own numbers."""
    config, numbers = member.config, member.numbers
    schedule = optimization.build_schedule(config, peak=1.0)
    own = numbers["clip_norm"], numbers["weight_decay"]
    if getattr(config, "optimizer", "adamw") == "adamw":
        unit = optimization.adamw(schedule, *own)
        return optax.chain(unit, optax.scale(numbers["learning_rate"]))

    def falling_from(peak: Any) -> optax.Schedule:
        return lambda count: peak * schedule(count)

    faster = falling_from(numbers.get("muon_learning_rate", optimization.MUON_LEARNING_RATE))
    return optimization.muon(faster, falling_from(numbers["learning_rate"]), *own)


def average_of(trained: Trained, average: float | None) -> PyTree:
    """Return the average of a decay, or that of `ema_decay`, of all members (M, ...)."""
    if average is None or average == trained.members.config.ema_decay:
        return optimization.main_average(trained.members.config, trained.ema)
    return trained.ema[f"{average:g}"]
