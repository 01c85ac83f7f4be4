"""How every experiment that trains moves its parameters: optimizer, schedule, averages."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from experiments.common.evaluations import MAIN
from jaxdiff import checks, training
from jaxdiff.training import ema
from jaxdiff.typing import Array, LossFn, PyTree

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
MUON_LEARNING_RATE = 0.02
"""The peak of a config with Muon that says no other."""
MUON_MOMENTUM = 0.95


ENDS = ("input", "output", "conv_in", "conv_out")
"""Layers that come first or last in a network, or are so called within a block of it."""


def build_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """The optimizer of clipped gradients that the config names, with warm-up and its schedule.

    A config without an `optimizer` has AdamW. Muon has a rate of its own, `muon_learning_rate`,
    0.02 unless the config says another; what it leaves to AdamW has the config's.

    Raises:
        ValueError: if it names another.
    """
    name = getattr(config, "optimizer", "adamw")
    checks.choice("optimizer", name, ("adamw", "muon"))
    schedule = build_schedule(config)
    if name == "adamw":
        return adamw(schedule, config.clip_norm, config.weight_decay)
    faster = build_schedule(config, getattr(config, "muon_learning_rate", MUON_LEARNING_RATE))
    return muon(faster, schedule, config.clip_norm, config.weight_decay)


def adamw(
    schedule: optax.Schedule, clip_norm: Any, weight_decay: Any
) -> optax.GradientTransformation:
    """AdamW of clipped gradients, whose numbers may be traced."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b2=0.99, weight_decay=weight_decay),
    )


def muon(
    schedule: optax.Schedule, adam_schedule: optax.Schedule, clip_norm: Any, weight_decay: Any
) -> optax.GradientTransformation:
    """Muon of clipped gradients on the matrices of inner layers, AdamW on what else there is.

    A step is about that of the nearest orthogonal matrix to Nesterov's momentum. A convolution is
    the matrix from all it reads to its channels.

    Args:
        schedule: the rate of Muon.
        adam_schedule: that of AdamW.
        clip_norm: the global norm that gradients are scaled down to.
        weight_decay: of both.

    Source: Jordan et al. 2024 (github.com/KellerJordan/Muon), and Bernstein and Newhouse 2024
    (arXiv:2409.20325), story II.
    """
    orthogonalized = optax.chain(
        optax.trace(MUON_MOMENTUM, nesterov=True),
        optax.stateless(lambda updates, params: jax.tree.map(_orthogonalized, updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    others = optax.adamw(adam_schedule, b2=0.99, weight_decay=weight_decay)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.partition({"muon": orthogonalized, "adamw": others}, _by_optimizer),
    )


def _orthogonalized(kernel: Array) -> Array:
    """Bring the singular values of a kernel (..., in, out) to between 0.7 and 1.2, about.

    Five Newton-Schulz steps of Jordan's quintic, plain matrices throughout: as a batch of one each,
    which `optax.contrib.muon` makes of them, they take twice the time on a CPU. A kernel that
    leads to more channels than it reads is scaled up, as the source does.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    matrix = kernel.reshape(-1, kernel.shape[-1])
    fan_in, fan_out = matrix.shape
    x = matrix if fan_in <= fan_out else matrix.T
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * (square @ square)) @ x
    x = x if fan_in <= fan_out else x.T
    return max(1.0, fan_out / fan_in) ** 0.5 * x.reshape(kernel.shape)


def _by_optimizer(params: PyTree) -> PyTree:
    """Say of each parameter whether it is a matrix of an inner layer, for "muon", or "adamw".

    Such is what a dense layer or a convolution between others multiplies by: tables of embeddings
    and positions, biases and scales of this library's networks have other names than "kernel".
    """
    paths = [_names(path) for path, _ in jax.tree.leaves_with_path(params)]
    with_ends = {names[:i] for names in paths for i, name in enumerate(names) if name in ENDS}

    def kind(path: Any, leaf: Any) -> str:
        names = _names(path)
        outermost = next((i for i in range(len(names)) if names[:i] in with_ends), None)
        is_end = outermost is not None and names[outermost] in ENDS
        is_matrix = names[-1:] == ("kernel",) and leaf.ndim in (2, 4)
        return "muon" if is_matrix and not is_end else "adamw"

    return jax.tree.map_with_path(kind, params)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def build_schedule(config: TrainingConfig, peak: float | None = None) -> optax.Schedule:
    """The learning rate by step; a config without a `schedule` falls by a cosine.

    "constant_linear" stays at its peak until the last half and then falls to 0. The peak is the
    config's unless one is given.
    """
    decay_steps = config.decay_steps or config.num_steps
    peak = config.learning_rate if peak is None else peak
    warmup = min(config.warmup_steps, decay_steps - 1)
    rise, name = max(warmup, 1), getattr(config, "schedule", "cosine")
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay_steps, 0.01 * peak)
    half = max(decay_steps - decay_steps // 2, warmup)
    after = {
        "constant_linear": optax.linear_schedule(
            peak, 0.0, decay_steps - half, transition_begin=half - warmup
        ),
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
