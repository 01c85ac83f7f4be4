"""What every experiment that trains shares: the optimizer, and a run that a crash cannot hurt."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxdiff import training
from jaxdiff.training import loop, parallel
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.typing import Batch, LossFn, PyTree

FREE = ("num_steps", "data_dir", "checkpoint_every", "log_every")
"""Fields of configs that stand outside their hash."""


class TrainingConfig(Protocol):
    """The fields of a config that training reads."""

    @property
    def num_steps(self) -> int: ...  # noqa: D102
    @property
    def decay_steps(self) -> int | None: ...  # noqa: D102
    @property
    def warmup_steps(self) -> int: ...  # noqa: D102
    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    @property
    def weight_decay(self) -> float: ...  # noqa: D102
    @property
    def clip_norm(self) -> float: ...  # noqa: D102
    @property
    def ema_decay(self) -> float: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def log_every(self) -> int: ...  # noqa: D102
    @property
    def checkpoint_every(self) -> int: ...  # noqa: D102


def build_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay to a hundredth, and clipped gradients."""
    decay_steps = config.decay_steps or config.num_steps
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup_steps, decay_steps - 1),
        decay_steps,
        0.01 * config.learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay),
    )


def open_checkpoints(directory: Path) -> Checkpoints:
    """Name the run's checkpoints; touches nothing."""
    return Checkpoints(directory / runs.CHECKPOINTS)


def fit(
    directory: Path,
    config: TrainingConfig,
    record: Mapping[str, Any],
    params: PyTree,
    loss_fn: LossFn,
    batches_from: Callable[[int], Iterator[Batch]],
    *,
    report: str,
    progress: bool,
) -> PyTree:
    """Train what is left of a run; return the averaged parameters.

    Args:
        directory: of the run.
        config: what training reads.
        record: the whole config, as JSON holds it.
        params: initial parameters.
        loss_fn: see `jaxdiff.losses`.
        batches_from: step -> the batches from that step on.
        report: the file that says the run is finished; removed where steps are left.
        progress: show a progress bar if stderr is a terminal.
    """
    optimizer = build_optimizer(config)
    state = training.init(params, optimizer, ema_decay=config.ema_decay)
    with contextlib.closing(open_checkpoints(directory)) as checkpoints:
        restored = checkpoints.restore(target=state)
        if restored is not None:
            state = jax.tree.map(jnp.array, restored.state)  # copies, which the loop may donate
        start = int(state.step)
        if start >= config.num_steps:
            return state.ema
        batches = batches_from(start)
        update = training.make_update(loss_fn, optimizer, ema_decay=config.ema_decay)
        runs.write_record(directory, record, free=FREE)
        (directory / report).unlink(missing_ok=True)  # that of fewer steps
        with contextlib.closing(runs.MetricsLog(directory / runs.METRICS, after=start)) as log:
            state = loop.fit(
                state,
                parallel.jit(update, donate=True),
                jax.random.key(config.seed),
                batches,
                num_steps=config.num_steps,
                checkpoints=checkpoints,
                config=record,
                log=log,
                log_every=config.log_every,
                checkpoint_every=config.checkpoint_every,
                progress=progress,
            )
    return state.ema
