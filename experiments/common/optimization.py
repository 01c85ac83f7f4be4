"""How every experiment that trains moves its parameters: optimizer, schedule, averages."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import optax

from experiments.common.evaluations import MAIN
from jaxdiff import training
from jaxdiff.training import ema
from jaxdiff.typing import LossFn, PyTree

JUDGING = ("eval_examples", "eval_points", "eval_tolerance", "mixture_components") + (
    "sampler",
    "sample_steps",
    "grid_size",
)
"""Fields of configs that say how a run is judged."""
FREE = ("num_steps", "data_dir", "checkpoint_every", "log_every", "remat", *JUDGING)
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
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def log_every(self) -> int: ...  # noqa: D102
    @property
    def checkpoint_every(self) -> int: ...  # noqa: D102


INITIAL_SHARE = 0.05
"""How much of an average may be the initial parameters before it is said."""
FEW_STEPS = 100
"""Runs of fewer steps try the way out, and no average of them is meant."""


def build_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW with warm-up, the schedule that the config names, and clipped gradients."""
    return adamw(build_schedule(config), config.clip_norm, config.weight_decay)


def adamw(
    schedule: optax.Schedule, clip_norm: Any, weight_decay: Any
) -> optax.GradientTransformation:
    """AdamW of clipped gradients, whose numbers may be traced."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b2=0.99, weight_decay=weight_decay),
    )


def build_schedule(config: TrainingConfig, peak: float | None = None) -> optax.Schedule:
    """The learning rate by step; a config without a `schedule` falls by a cosine.

    Its peak is the config's unless one is given.
    """
    decay_steps = config.decay_steps or config.num_steps
    peak = config.learning_rate if peak is None else peak
    warmup = min(config.warmup_steps, decay_steps - 1)
    rise, name = max(warmup, 1), getattr(config, "schedule", "cosine")
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay_steps, 0.01 * peak)
    after = {
        "linear": optax.linear_schedule(peak, 0.01 * peak, decay_steps - warmup),
        "constant": optax.constant_schedule(peak),
        "inverse_sqrt": lambda count: peak * jnp.sqrt(rise / (rise + jnp.maximum(count, 0))),
    }[name]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), after], [warmup])


def build_update(
    config: TrainingConfig, loss_fn: LossFn, *, skip_nonfinite: bool = False
) -> training.GradientUpdate:
    """Make the update of a loss, as a config says it."""
    return training.make_update(
        loss_fn,
        build_optimizer(config),
        ema_decay=ema_decays(config),
        skip_nonfinite=skip_nonfinite,
    )


def cadence(config: TrainingConfig) -> training.Cadence:
    """Return when a run logs and saves."""
    return training.Cadence(log=config.log_every, save=config.checkpoint_every)


def ema_decays(config: TrainingConfig, main: float | None = None) -> ema.EmaDecay:
    """The decay of a config, or by name all those that it keeps.

    The first of them is the config's `ema_decay` unless given.
    """
    main = config.ema_decay if main is None else main
    more = {f"{decay:g}": decay for decay in getattr(config, "more_ema_decays", ())}
    wide = {f"std_{std:g}": ema.PowerDecay(std) for std in getattr(config, "ema_stds", ())}
    return {MAIN: main, **more, **wide} if more or wide else main


def warn_of_start(averages: Iterable[tuple[ema.Decay, int]]) -> None:
    """Say on stderr which averages still hold much of the initial parameters at the end of a run.

    Args:
        averages: (decay, number of steps) of each.
    """
    told = {
        (decay, num_steps): ema.initial_share(decay, num_steps) for decay, num_steps in averages
    }
    for (decay, num_steps), share in told.items():
        if share > INITIAL_SHARE and num_steps >= FEW_STEPS:
            print(
                f"warning: after {num_steps} steps {share:.0%} of the average of decay {decay:g} "
                "is still the initial parameters. Train longer, or take a decay of at most "
                f"{max(0.0, 1.0 - 10.0 / num_steps):.4g} (1 - 10 / steps).",
                file=sys.stderr,
                flush=True,
            )


def warn_of_config(config: TrainingConfig) -> None:
    """Say on stderr which averages of a run still hold much of the initial parameters."""
    decays = ema_decays(config)
    named = decays if isinstance(decays, Mapping) else {MAIN: decays}
    warn_of_start((decay, config.num_steps) for decay in named.values())


def main_average(config: TrainingConfig, averages: PyTree) -> PyTree:
    """The average of `ema_decay`, of what a state of this config has as `ema`."""
    return averages[MAIN] if isinstance(ema_decays(config), Mapping) else averages
