"""Learn a distribution in the plane and measure how far the model is from it, exactly.

    python -m experiments.toy2d --target mixture --run-dir runs/toy2d
    python -m experiments.toy2d --target pinwheel --loss sliced --run-dir runs/pinwheel

Any loss, process and prediction. The likelihood is that of the probability flow with the exact
divergence; where the target's density is known, the gap to it is taken point by point.
"""

import dataclasses
import sys
from functools import partial
from typing import Literal

import jax
import tyro

from experiments.common import command, evaluations, optimization
from experiments.common.command import Refusal
from experiments.common.devices import Running
from experiments.toy2d import report as toy2d_report
from experiments.toy2d.model import (
    PRESETS,
    Config,
    Model,
    asked_again,
    batches,
    build_loss,
    build_model,
    check,
    from_record,
)
from jaxdiff import files, training
from jaxdiff.metrics.c2st import MIN_ROWS
from jaxdiff.training import distributed
from jaxdiff.training import run as runs
from jaxdiff.typing import PyTree


def check_judging(config: Config) -> None:
    """Refuse what a run could not be judged by at its end."""
    if config.eval_points < MIN_ROWS:
        raise Refusal(
            f"--eval-points must be at least {MIN_ROWS}, or no classifier can be trained to tell "
            f"samples from draws; got {config.eval_points}."
        )
    if config.grid_size < 2:
        raise Refusal(f"--grid-size must be at least 2; got {config.grid_size}.")


def fit(
    config: Config, model: Model, directory: files.Path, preset: str, *, progress: bool
) -> PyTree:
    """Train what is left of a run; return the averaged parameters."""
    update, running = optimization.build_update(config, build_loss(config, model)), Running()

    def begun() -> None:
        optimization.warn_of_config(config)
        evaluations.outdate(directory)

    state = training.fit(
        directory,
        lambda: update.init(model.init_params()),
        update,
        partial(batches, config, model.target),
        key=jax.random.key(config.seed),
        num_steps=config.num_steps,
        cadence=optimization.cadence(config),
        record=training.Record(
            dataclasses.asdict(config),
            optimization.FREE,
            also={"running": running.record(), **command.begun_by("toy2d", preset)},
        ),
        keep=running.keep(),
        report=running.report(
            progress=progress, begun=begun, repeat=lambda step: {"seed": config.seed}
        ),
    )
    return distributed.gather(state.ema)


@command.writes
def main_command(
    run_dir: str,
    config: tyro.conf.OmitArgPrefixes[Config],
    preset: Literal["full", "smoke"] = "full",
    quiet: bool = False,
) -> None:
    """Train a model of a distribution in the plane, or resume it, then judge and draw it.

    Args:
        run_dir: Folder of the run. On one that is there, options that are not given are as its
            record says: its folder alone resumes it, with a larger --num-steps extends it.
        config: What the run is.
        preset: What options that are not given are set to; given for a run that is there, all of
            it counts as given. smoke runs all in a minute.
        quiet: Show no progress bar.
    """
    check(config)
    check_judging(config)
    directory = command.claim(run_dir)
    asked = dataclasses.asdict(config)
    record = runs.reconcile(directory, asked, free=optimization.FREE, grows="num_steps")
    config = from_record(record)
    with command.compiling_for(preset):
        model = build_model(config)
        params = fit(config, model, directory, preset, progress=not quiet)
        if not (
            evaluations.is_judged(directory, config.num_steps)
            and not evaluations.differing(directory, toy2d_report.settings(config))
        ):
            toy2d_report.write(config, model, params, directory, progress=not quiet)
    print(f"Report: {directory / command.REPORT}")


def main(argv: list[str]) -> int:
    """Run the command line."""
    config, preset = command.defaults_of(argv, PRESETS, asked_again)
    return command.run("toy2d", partial(main_command, config=config, preset=preset), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
