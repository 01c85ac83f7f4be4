"""What every experiment that trains shares: the optimizer, and a run that a crash cannot hurt."""

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.command import refusing
from experiments.common.devices import Running
from experiments.common.evaluations import MAIN
from jaxdiff import files, training
from jaxdiff.training import distributed, ema, lock, loop, parallel, throughput
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.typing import Batch, LossFn, PyTree

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
NONFINITE = "nonfinite.json"


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


def build_schedule(config: TrainingConfig) -> optax.Schedule:
    """The learning rate by step; a config without a `schedule` falls by a cosine."""
    decay_steps = config.decay_steps or config.num_steps
    peak, warmup = config.learning_rate, min(config.warmup_steps, decay_steps - 1)
    rise, name = max(warmup, 1), getattr(config, "schedule", "cosine")
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay_steps, 0.01 * peak)
    after = {
        "linear": optax.linear_schedule(peak, 0.01 * peak, decay_steps - warmup),
        "constant": optax.constant_schedule(peak),
        "inverse_sqrt": lambda count: peak * jnp.sqrt(rise / (rise + jnp.maximum(count, 0))),
    }[name]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), after], [warmup])


def ema_decays(config: TrainingConfig) -> ema.EmaDecay:
    """The decay of a config, or by name all those that it keeps."""
    more = {f"{decay:g}": decay for decay in getattr(config, "more_ema_decays", ())}
    wide = {f"std_{std:g}": ema.PowerDecay(std) for std in getattr(config, "ema_stds", ())}
    return {MAIN: config.ema_decay, **more, **wide} if more or wide else config.ema_decay


def warn_of_start(averages: Iterable[tuple[float | ema.PowerDecay, int]]) -> None:
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


def main_average(config: TrainingConfig, averages: PyTree) -> PyTree:
    """The average of `ema_decay`, of what a state of this config has as `ema`."""
    return averages[MAIN] if isinstance(ema_decays(config), Mapping) else averages


def open_checkpoints(
    directory: Path, running: Running | None = None, config: Mapping[str, Any] | None = None
) -> Checkpoints:
    """Name the run's checkpoints; touches nothing.

    Args:
        directory: of the run.
        running: says which are kept.
        config: the run's, where its folder does not say it yet.
    """
    running = Running() if running is None else running
    if config is None:
        config = (runs.read_record(directory) or {}).get("config")
    return Checkpoints(
        directory / runs.CHECKPOINTS,
        keep_last=running.keep_last,
        keep_every=running.keep_every,
        keep_best="loss" if running.keep_best else None,
        config=config,
        free=FREE,
    )


def fit(
    directory: Path,
    config: TrainingConfig,
    record: Mapping[str, Any],
    init_params: Callable[[], PyTree],
    loss_fn: LossFn,
    batches_from: Callable[[int], Iterator[Batch]],
    *,
    report: str,
    progress: bool,
    running: Running | None = None,
    indices_of: Callable[[int], np.ndarray] | None = None,
    also: Mapping[str, Any] | None = None,
) -> PyTree:
    """Train what is left of a run; return the averaged parameters, whole in every process.

    Args:
        directory: of the run.
        config: what training reads.
        record: the whole config, as JSON holds it.
        init_params: makes the initial parameters; traced.
        loss_fn: see `jaxdiff.losses`.
        batches_from: step -> this process's batches from that step on.
        report: the file that says the run is finished; removed where steps are left.
        progress: show a progress bar if stderr is a terminal.
        running: how it is carried out; by default on one device.
        indices_of: step -> which examples its batch holds, for the report of one that fails.
        also: what else the run's record says.
    """
    running = Running() if running is None else running
    mode, optimizer, decays = running.mode(), build_optimizer(config), ema_decays(config)
    running.check_batch(config.batch_size, mode)
    key = jax.random.key(config.seed)

    def make() -> training.TrainState:
        return training.init(init_params(), optimizer, ema_decay=decays)

    with refusing(ValueError, say="--distributed: "):
        distributed.agree(
            config=json.dumps({**record, "data_dir": None}, sort_keys=True),  # each host's own
            running=json.dumps(running.shared()),
        )
    shapes = jax.eval_shape(make)
    places = mode.shardings(shapes)
    with (
        lock.writing(directory),
        contextlib.closing(open_checkpoints(directory, running, record)) as checkpoints,
    ):
        runs.check_random(directory)
        restored = checkpoints.restore(
            target=jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                shapes,
                places,
            )
        )
        if restored is None:
            state = jax.jit(make, out_shardings=places)()
        else:
            state = jax.tree.map(jnp.copy, restored.state)  # the loop may donate copies
            del restored
        start = int(state.step)
        if start >= config.num_steps:
            return distributed.gather(main_average(config, state.ema))
        if distributed.is_main():
            named = decays if isinstance(decays, Mapping) else {MAIN: decays}
            warn_of_start((decay, config.num_steps) for decay in named.values())
        batches = batches_from(start)

        def update_of(axis_name: str | None, accumulate: int) -> training.Update:
            return training.make_update(
                loss_fn,
                optimizer,
                ema_decay=decays,
                axis_name=axis_name,
                accumulate=accumulate,
                skip_nonfinite=running.nonfinite == "skip",
            )

        first = next(batches)
        update = update_of(mode.axis_name, running.accumulate)
        compiled = mode.compile(update, donate=True)
        scanned = mode.compile(update, donate=True, scanned=True)
        log: runs.MetricsLog | runs.NoLog = runs.NoLog()
        if distributed.is_main():
            # First what may be found wrong: until then the record says what it said.
            board = directory / "tensorboard" if running.tensorboard else None
            log = runs.MetricsLog(directory / runs.METRICS, after=start, tensorboard=board)
            more = {"running": running.record(), **(also or {})}
            runs.write_record(directory, record, free=FREE, also=more)
            (directory / report).unlink(missing_ok=True)  # that of fewer steps

        def repeat(step: int) -> dict[str, Any]:
            drawn = jax.random.key_data(jax.random.fold_in(key, step - 1)).tolist()
            indices = {} if indices_of is None else {"indices": indices_of(step - 1).tolist()}
            return {"seed": config.seed, "key_data": drawn, **indices}

        with contextlib.closing(log):
            try:
                state = loop.fit(
                    state,
                    compiled,
                    parallel.everywhere(key, mode.whole),
                    itertools.chain([first], batches),
                    num_steps=config.num_steps,
                    checkpoints=checkpoints,
                    config=record,
                    log=log,
                    log_every=config.log_every,
                    checkpoint_every=config.checkpoint_every,
                    scan_fn=scanned,
                    steps_per_call=running.steps_per_call,
                    place=mode.place_batch,
                    work=work_of(config, update_of(None, 1), shapes, key, first, mode.num_shards),
                    skip_nonfinite=running.nonfinite == "skip",
                    repeat=repeat,
                    profile=(
                        (directory / "profile", running.profile_steps)
                        if running.profile_steps and distributed.is_main()
                        else None
                    ),
                    progress=progress and distributed.is_main(),
                )
            except loop.NotFinite as error:
                if distributed.is_main():
                    files.write_text(
                        directory / NONFINITE, json.dumps(error.details, indent=2) + "\n"
                    )
                raise
    return distributed.gather(main_average(config, state.ema))


def work_of(
    config: TrainingConfig,
    update: training.Update,
    state: PyTree,
    key: Any,
    batch: Batch,
    num_devices: int,
) -> throughput.Work:
    """Say what a step is: the examples and operations of the whole batch, and the devices' peak."""

    def of_all(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = (np.shape(leaf)[0] * jax.process_count(), *np.shape(leaf)[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    flops = throughput.count_flops(update, state, key, jax.tree.map(of_all, batch))
    peak = throughput.peak_flops(jax.devices()[0])
    return throughput.Work(config.batch_size, flops, None if peak is None else peak * num_devices)
