"""Train a group: all its members under one `jax.vmap`, in one compiled program.

Each member has its own parameters, data order and noise, those that a run of its seed alone would
have. Steps are a loop on the device, called for a part of them at a time, so that a signal is seen
between two calls; how many make a part changes no number.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.ablations.definition import SEED, Group
from experiments.ablations.world import Problem
from experiments.common import fitting
from jaxdiff import training
from jaxdiff.typing import Array, PyTree

SECONDS_A_CALL = 2.0
"""About how long one call takes."""


class Members(NamedTuple):
    """Trained runs side by side.

    Attributes:
        config: what they share.
        numbers: what each has of its own, (M,) by field; traced where they run.
    """

    config: Any
    numbers: dict[str, Array]

    def map(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return `fn(config, *trees)` of all members, compiled; trees have a leading axis of M."""

        def of_one(numbers: dict[str, Array], *trees: PyTree) -> Any:
            return fn(self.of(numbers), *trees)

        mapped = jax.jit(jax.vmap(of_one))
        return lambda *trees: mapped(self.numbers, *trees)

    def map_once(self, compiled: dict[Any, Any], key: Any, fn: Callable[..., Any]) -> Any:
        """Return what :meth:`map` does, kept under a key that says all that `fn` depends on."""
        if key not in compiled:
            compiled[key] = self.map(fn)
        return compiled[key]

    def of(self, numbers: dict[str, Any]) -> Any:
        """Return the config of one member: its numbers, and a key in place of its seed."""
        key = jax.random.key(numbers[SEED])
        return dataclasses.replace(self.config, **{**numbers, SEED: key})


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
    config = dataclasses.replace(config, decay_steps=config.decay_steps or config.num_steps)
    fields = group.members[0]
    numbers = {
        field: jnp.asarray(
            [member[field] for member in group.members],
            jnp.uint32 if field == SEED else jnp.float32,
        )
        for field in fields
    }
    return Members(config, numbers)


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
    concrete = [dataclasses.replace(members.config, **member) for member in group.members]
    tables = jax.tree.map(lambda *rows: np.stack(rows), *map(problem.table, concrete))

    def start(config: Any) -> training.TrainState:
        decays = fitting.ema_decays(config)
        return training.init(problem.init_params(config), build_optimizer(config), ema_decay=decays)

    def advance(
        numbers: dict[str, Array], state: PyTree, table: PyTree, first: Array, last: Array
    ) -> PyTree:
        config = members.of(numbers)
        update = training.make_update(
            problem.loss(config),
            build_optimizer(config),
            ema_decay=fitting.ema_decays(config),
        )

        def body(step: Array, state: PyTree) -> PyTree:
            return update(state, config.seed, problem.batch(config, table, step))[0]

        return jax.lax.fori_loop(first, last, body, state)

    began = time.perf_counter()
    state = members.map(start)()
    mapped = jax.jit(jax.vmap(advance, in_axes=(0, 0, 0, None, None)), donate_argnums=1)
    lowered = mapped.lower(members.numbers, state, tables, 0, 1)
    flops = (lowered.cost_analysis() or {}).get("flops")
    run = lowered.compile()
    compiled = time.perf_counter()
    done, part = 0, 1
    while done < num_steps:
        before = time.perf_counter()
        stop = min(done + part, num_steps)
        state = jax.block_until_ready(run(members.numbers, state, tables, done, stop))
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


def build_optimizer(config: Any) -> optax.GradientTransformation:
    """Make the optimizer of experiments.common.fitting, whose learning rate may be traced."""
    unit = fitting.build_optimizer(dataclasses.replace(config, learning_rate=1.0))
    return optax.chain(unit, optax.scale(config.learning_rate))


def average_of(trained: Trained, average: float | None) -> PyTree:
    """Return the average of a decay, or that of `ema_decay`, of all members (M, ...)."""
    if average is None or average == trained.members.config.ema_decay:
        return fitting.main_average(trained.members.config, trained.ema)
    return trained.ema[f"{average:g}"]
