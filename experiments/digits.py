"""Train, sample and judge a diffusion model of images: handwritten digits unless told otherwise.

    python -m experiments.digits train    --run-dir runs/digits
    python -m experiments.digits sample   --run-dir runs/digits --num 64 --out samples.png
    python -m experiments.digits sample   --run-dir runs/digits --num 50000 --out samples
    python -m experiments.digits evaluate --run-dir runs/digits
    python -m experiments.digits export   --run-dir runs/digits --out params.npz

A class-conditional network learns the reverse of a forward process. The likelihood that judges it
is that of the probability-flow ODE, in bits per dimension, beside a Gaussian mixture fitted by EM
to the same images.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tyro

from experiments.common import command, evaluations, optimization, options
from experiments.common.averages import Average
from experiments.common.batches import batches_of, repeating
from experiments.common.command import Refusal, refusing
from experiments.common.devices import Devices, Running
from experiments.common.methods import MethodName
from experiments.images import data as image_data
from experiments.images import report as digits_report
from experiments.images import sample_folders as streaming
from experiments.images import sources as image_sources
from experiments.images.generator import make_generator
from experiments.images.guided import Guidance, Weaker, guided_by
from experiments.images.judging import Judging
from experiments.images.model import (
    PRESETS,
    Config,
    PresetName,
    asked_again,
    build_loss,
    build_model,
    check,
    defaults,
    from_record,
    open_images,
    pixels,
    to_record,
)
from experiments.images.trained import describe as describe
from experiments.images.trained import restore as restore
from jaxdiff import data, files, training
from jaxdiff.training import distributed
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import Restored
from jaxdiff.training.export import export_params
from jaxdiff.typing import PyTree


@command.writes
def train(
    run_dir: str,
    config: tyro.conf.OmitArgPrefixes[Config],
    running: tyro.conf.OmitArgPrefixes[Running],
    preset: PresetName = "full",
    evaluate: bool = True,
    eval_split: str | None = None,
    quiet: bool = False,
) -> None:
    """Train a run or resume it, then evaluate and draw it.

    Args:
        run_dir: Folder of the run. On one that is there, options that are not given are as its
            record says: its folder alone resumes it, with a larger --num-steps extends it. How it
            is carried out is not recorded.
        config: What the run is.
        running: How it is carried out.
        preset: What options that are not given are set to; given for a run that is there, all of
            it counts as given. smoke runs all in a minute, and edm is the design of EDM in
            process, preconditioning, weighting and times.
        evaluate: Judge the run at its end, unless a report of its last step is there.
        eval_split: The split that judges, such as validation; test unless given.
        quiet: Show no progress.
    """
    running.start()
    check(config)
    config = image_sources.placed(config)
    directory = command.claim(run_dir)
    record = runs.read_record(directory)
    moved = config.data_dir in (None, (record or {"config": {}})["config"].get("data_dir"))
    asked = to_record(resolved(config, record))
    reconciled = runs.reconcile(
        directory, asked, free=optimization.FREE, grows="num_steps", defaults=defaults()
    )
    config = from_record(reconciled)
    split = eval_split or image_data.recorded_split(record)
    images = open_images(config, "train", recorded=moved)
    image_data.check_same(record, images, directory)
    held_out = open_images(config, split, "--eval-split", recorded=moved) if evaluate else None
    image_data.check(config, images, held_out)
    with command.compiling_for(preset):
        also = image_data.record(images, split) | command.begun_by("digits", preset)
        params = fit(config, images, directory, running, also=also, progress=not quiet)
        if held_out is not None and distributed.any_of(not is_judged(config, directory, held_out)):
            with refusing(OSError, say=f"--run-dir {directory} cannot be written: "):
                digits_report.write(
                    config,
                    params,
                    directory,
                    images,
                    held_out,
                    step=config.num_steps,
                    devices=running.local(),
                    progress=not quiet,
                )
    if distributed.is_main() and evaluate:
        print(f"Report: {directory / command.REPORT}")


def resolved(config: Config, record: Mapping[str, Any] | None) -> Config:
    """Return a config as its record holds it: what depends on other fields said outright.

    In runs of before, `loss_on` may be recorded as None.
    """
    old = {} if record is None else record["config"]
    loss_on = config.loss_on or (config.prediction if old.get("loss_on", "") is not None else None)
    return dataclasses.replace(image_sources.placed(config), loss_on=loss_on)


def is_judged(config: Config, directory: files.Path, held_out: data.Images) -> bool:
    """Tell whether there is a report of the last step and the main average; say what it has else.

    How it was judged may be another matter: `evaluate` decides that, and then it stays.
    """
    if not evaluations.is_judged(directory, config.num_steps):
        return False
    others = evaluations.differing(directory, digits_report.settings(config, held_out))
    if others and distributed.is_main():
        said = f"The report there has {', '.join(others)}; `evaluate` makes another."
        print(said, file=sys.stderr)
    return True


def fit(
    config: Config,
    images: data.Images,
    directory: files.Path,
    running: Running,
    *,
    also: Mapping[str, Any] | None = None,
    progress: bool,
) -> PyTree:
    """Train what is left of a run; return the averaged parameters.

    Its record also says `also`, by default what the data are.
    """
    model, record = build_model(config, images), to_record(config)
    mode = running.mode(config.batch_size, directory)
    update = optimization.build_update(
        config,
        build_loss(config, model, images.num_levels),
        skip_nonfinite=running.nonfinite == "skip",
    )

    def begun() -> None:
        optimization.warn_of_config(config)
        evaluations.outdate(directory)

    running.agree(record)
    said = image_data.record(images, image_data.SPLIT) if also is None else also
    said = {"running": running.began(config.batch_size, mode), **said}
    state = training.fit(
        directory,
        lambda: update.init(model.init_params()),
        update,
        batches_of(images, config),
        key=jax.random.key(config.seed),
        num_steps=config.num_steps,
        cadence=optimization.cadence(config),
        mode=mode,
        record=training.Record(record, optimization.FREE, defaults(), said),
        keep=running.keep(),
        report=running.report(progress=progress, begun=begun, repeat=repeating(images, config)),
    )
    return distributed.gather(optimization.main_average(config, state.ema))


def sample(
    run_dir: str,
    out: str,
    devices: tyro.conf.OmitArgPrefixes[Devices],
    average: tyro.conf.OmitArgPrefixes[Average],
    guiding: tyro.conf.OmitArgPrefixes[Guidance],
    num: int = 64,
    sampler: MethodName = "ddim",
    num_steps: int = 50,
    label: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Draw images from a trained run, into one PNG or, by the thousand, into a folder.

    Args:
        run_dir: Folder of the run.
        out: The PNG to write, or a folder, filled file by file: the same command goes on.
        devices: Which devices share the images; they are the same for any.
        average: Which parameters draw them.
        guiding: Whether they lean towards their class.
        num: How many images.
        sampler: The method.
        num_steps: Steps from noise to data.
        label: The class of all images, its name or number; by default all classes in turn.
        seed: Of the noise; image i depends on the run, seed and i only.
        quiet: Show no progress bar.
    """
    command.check_seed(seed)
    options.check_counts(num=num, num_steps=num_steps)
    where = streaming.Out.asked(out)
    guiding.check()
    devices.start()
    directory = command.existing(run_dir)
    record = runs.read_record(directory) or {}
    with refusing(runs.RunError, say="The samples would be others: "):
        runs.check_random(directory)
    config, restored, params = restore(directory, average)
    images = describe(config, directory)
    guiding.check_label(config, images)
    num_classes = images.num_classes or 1
    asked = None if label is None else image_data.label_of(label, images)
    labels = np.arange(num) % num_classes if asked is None else np.full(num, asked)
    model, params, guided = guided_by(guiding, weaker_of(guiding), config, params, images, record)
    generate = make_generator(
        model, images.shape, sampler, num_steps, grid=config.sample_grid, devices=devices.local()
    )

    key = jax.random.key(seed)  # one for all files: what is new in a call is sent to the devices

    def draw(first: int, last: int) -> np.ndarray:
        x0, _ = generate(params, key, labels[first:last], first=first)
        return pixels(x0, images.num_levels)

    said = {
        **identity(restored),
        **dataclasses.asdict(average),
        "sampler": sampler,
        "num_steps": num_steps,
        "label": asked,
        "seed": seed,
        "num": num,
        "guidance": guided,
    }
    where.write(lambda: said, draw, labels, images.shape, progress=not quiet)


def identity(restored: Restored) -> dict[str, Any]:
    """Return what names a run and the step of a checkpoint."""
    return {
        "run": runs.config_hash(restored.config, free=optimization.FREE),
        "step": restored.step,
    }


def weaker_of(guiding: Guidance) -> Weaker | None:
    """Return the run that samples lean away from, None where they are to lean from none."""
    if guiding.weaker_run is None:
        return None
    directory = command.path_of(guiding.weaker_run, "--weaker-run")
    config, restored, params = restore(directory, option="--weaker-run")
    return Weaker(config, params, runs.read_record(directory) or {}, identity(restored))


def evaluate(
    run_dir: str,
    devices: tyro.conf.OmitArgPrefixes[Devices],
    average: tyro.conf.OmitArgPrefixes[Average],
    judging: tyro.conf.OmitArgPrefixes[Judging],
    exact: bool = False,
    quiet: bool = False,
) -> None:
    """Judge a trained run anew: evaluation.json, report.md and the figures.

    Args:
        run_dir: Folder of the run.
        devices: Which devices share the work.
        average: Which parameters are judged.
        judging: How they are judged.
        exact: Also take the likelihood with the exact divergence, one tangent a pixel: slow.
        quiet: Show no progress.
    """
    directory = command.path_of(run_dir)
    options.judge(judging)
    devices.start()
    config, restored, params = restore(directory, average)
    config, record = judging.of(config), runs.read_record(directory)
    split = judging.eval_split or image_data.recorded_split(record)
    moved = judging.data_dir is None
    train = open_images(config, "train", recorded=moved)
    held_out = open_images(config, split, "--eval-split", recorded=moved)
    image_data.check(config, train, held_out)
    known = image_data.describe(config, record or {})
    if train.description != known:
        there = known.to_record()
        differing = ", ".join(
            f"{name} {value}, recorded {there[name]}"
            for name, value in train.description.to_record().items()
            if value != there[name]
        )
        raise Refusal(
            f"--data-dir: {train.name} in {train.location} holds other images than this run was "
            f"trained on: {differing}. Say by --data-dir where those are."
        )
    with refusing(OSError, say=f"--run-dir {directory} cannot be written: "):
        digits_report.write(
            config,
            params,
            directory,
            train,
            held_out,
            step=restored.step,
            average=average.name,
            exact=exact,
            devices=devices.local(),
            progress=not quiet,
        )
    if distributed.is_main():
        print((directory / command.REPORT).read_text())


def export(
    run_dir: str, out: str, average: tyro.conf.OmitArgPrefixes[Average], raw: bool = False
) -> None:
    """Write the parameters of a trained run alone, with its config, for NumPy to read.

    Args:
        run_dir: Folder of the run.
        out: The .npz to write.
        average: Which parameters.
        raw: Those of the last step, not an average.
    """
    directory, path = command.path_of(run_dir), command.path_of(out, "--out")
    config, restored, params = restore(directory, average)
    images = describe(config, directory)
    with refusing(OSError, ValueError, say=f"--out {out} cannot be written: "):
        path.parent.mkdir(parents=True, exist_ok=True)
        record = to_record(config) | images.to_record() | {"step": restored.step}
        export_params(path, restored.state["params"] if raw else params, record)


def main(argv: list[str]) -> int:
    """Run the command line."""
    config, preset = command.defaults_of(argv, PRESETS, asked_again)
    commands: dict[str, Callable[..., None]] = {
        "train": functools.partial(train, config=config, preset=preset),
        "sample": sample,
        "evaluate": evaluate,
        "export": export,
    }
    return command.run("digits", commands, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
