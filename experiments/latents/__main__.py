"""Make a text-to-image model from nothing: pixels to latents, latents and words to pictures.

    python -m experiments.latents autoencoder --run-dir runs/latents
    python -m experiments.latents encode      --run-dir runs/latents
    python -m experiments.latents train       --run-dir runs/latents
    python -m experiments.latents sample      --run-dir runs/latents --prompt "a red star" \
        --guidance-scale 2 --out star.png
    python -m experiments.latents evaluate    --run-dir runs/latents

Each stage is a folder of its own in the run's, and goes on where it stopped; `train` makes those
before it where they are missing. The pictures are scenes, made on the machine, a folder of one's
own with a `metadata.jsonl` of captions, or a prepared TFDS data set.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro

from experiments.common import command, evaluations, options
from experiments.common.averages import Average
from experiments.common.command import Refusal, refusing
from experiments.common.devices import Devices, Running
from experiments.common.guiding import Form
from experiments.common.methods import MethodName
from experiments.images.sample_folders import Out
from experiments.latents import autoencoder as autoencoders
from experiments.latents import denoiser as denoisers_stage
from experiments.latents import drawing, encoding, evaluating, sources, stages
from experiments.latents.autoencoder import PresetName
from experiments.latents.encoding import Encoding
from jaxdiff.training import distributed
from jaxdiff.training import run as runs

NO_ENCODING = Encoding()


@command.writes
def autoencoder(
    run_dir: str,
    config: tyro.conf.OmitArgPrefixes[autoencoders.Config],
    running: tyro.conf.OmitArgPrefixes[Running],
    preset: PresetName = "full",
    quiet: bool = False,
) -> None:
    """Train the autoencoder of pictures, or go on, and say how near it comes to them.

    Args:
        run_dir: Folder of the run; this stage is in `autoencoder` below it. Options that are not
            given are as its record says: its folder alone resumes it.
        config: What it is, and what pictures the run is of.
        running: How it is trained.
        preset: What options that are not given are set to. relations has scenes of two objects
            and of several too; smoke shows the way in a minute.
        quiet: Show no progress.
    """
    running.start()
    _autoencoder(run_dir, config, running, preset, quiet)


def _autoencoder(
    run_dir: str, config: autoencoders.Config, running: Running, preset: str, quiet: bool
) -> None:
    autoencoders.check(config)
    config, stage = sources.placed(config), autoencoders.STAGE
    directory = command.claim(str(stage.at(run_dir)))
    config = stage.reconcile(directory, config)
    pictures = sources.open_pictures(config, "train", recorded=True)
    held_out = sources.open_held_out(config)
    shape = sources.shape_of(pictures)
    check_shape(stage, run_dir, shape)
    built = autoencoders.build(config, shape)
    with command.compiling_for(preset):
        state = stages.fit(
            stage,
            directory,
            config,
            autoencoders.build_training(
                config,
                built,
                sources.in_memory(pictures),
                skip_nonfinite=running.nonfinite == "skip",
            ),
            running,
            also={"shape": list(shape), **command.begun_by("latents", preset)},
            progress=not quiet,
        )
        params = distributed.gather(autoencoders.averaged(config, state))
        if distributed.is_main():
            evaluating.reconstruct(config, built, params, held_out, directory, running.local())
        distributed.any_of(False)  # all wait for what it has written


def check_shape(stage: stages.Stage, run_dir: str, shape: tuple[int, int, int]) -> None:
    """Refuse to go on with pictures of another shape than a stage began with."""
    before = stage.recorded(run_dir).get("shape", list(shape))
    if before != list(shape):
        raise Refusal(
            f"--data: these pictures are {shape}, and the run in {run_dir} began with "
            f"{tuple(before)}. Bring those back, or take another --run-dir."
        )


def encode(
    run_dir: str,
    encoding: tyro.conf.OmitArgPrefixes[Encoding],
    devices: tyro.conf.OmitArgPrefixes[Devices],
    quiet: bool = False,
) -> None:
    """Store latents and captions of all pictures to train on, or go on with it.

    Args:
        run_dir: Folder of the run, whose autoencoder was trained; this stage is in `latents`.
        encoding: How captions become numbers.
        devices: Which devices share the work.
        quiet: Show no progress.
    """
    devices.start()
    _encode(run_dir, encoding, devices, quiet)


def _encode(run_dir: str, asked: Encoding, devices: Devices, quiet: bool) -> None:
    options.judge(asked)
    config, built, params = drawing.read_autoencoder(run_dir)
    autoencoders.check_finished(run_dir)
    folder = command.path_of(run_dir) / encoding.FOLDER
    encoding.write(
        folder,
        built,
        params,
        sources.open_pictures(config, "train", recorded=True),
        asked,
        config=config,
        devices=devices.local(),
        progress=not quiet,
    )
    distributed.any_of(False)  # all wait for the last shard
    if distributed.is_main() and not quiet:
        print(f"Latents: {folder}")


@command.writes
def train(
    run_dir: str,
    config: tyro.conf.OmitArgPrefixes[denoisers_stage.Config],
    running: tyro.conf.OmitArgPrefixes[Running],
    preset: PresetName = "full",
    latents_of: str | None = None,
    evaluate: bool = True,
    quiet: bool = False,
) -> None:
    """Train the denoiser, or go on, then judge and draw it; make the stages before it if missing.

    Args:
        run_dir: Folder of the run; this stage is in `denoiser` below it. Options that are not
            given are as its record says: its folder alone resumes it.
        config: What it is.
        running: How it is trained.
        preset: What options that are not given are set to, and the stages before that are missing.
        latents_of: Folder of another run, whose autoencoder and latents are taken.
        evaluate: Judge the run at its end, unless a report of its last step is there, or several
            processes take part: then `evaluate` judges it, on one.
        quiet: Show no progress.
    """
    running.start()
    denoisers_stage.check(config)
    stage = denoisers_stage.STAGE
    directory = command.claim(str(stage.at(run_dir)))
    config = stage.reconcile(directory, config)
    home = (
        str(command.path_of(latents_of, "--latents-of").absolute())
        if latents_of
        else stage.recorded(run_dir).get("latents_of")
    )
    if home is None:
        make_missing(run_dir, running, preset, quiet)
    coded = drawing.read_coded(home or run_dir)
    said = {**encoding.said(coded.store), "latents_of": home, **command.begun_by("latents", preset)}
    record = stage.recorded(run_dir)
    if record:
        encoding.check_trained_on(coded.store, record, directory)
    recipe = denoisers_stage.build(config, coded.store, coded.text)
    records = denoisers_stage.records_of(
        config,
        coded.store,
        coded.text,
        lambda: sources.open_pictures(coded.config, "train", recorded=True),
    )
    with command.compiling_for(preset):
        stages.fit(
            stage,
            directory,
            config,
            denoisers_stage.build_training(
                config, recipe, coded.store, records, skip_nonfinite=running.nonfinite == "skip"
            ),
            running,
            also=said,
            progress=not quiet,
        )
        if evaluate and jax.process_count() == 1:
            trained, whole = drawing.read(run_dir), command.path_of(run_dir)
            if not evaluations.is_judged(whole, config.num_steps):
                judging = evaluating.PRESETS[preset]
                evaluating.write(trained, whole, judging, running, progress=not quiet)
            print(f"Report: {whole / command.REPORT}")


def make_missing(run_dir: str, running: Running, preset: str, quiet: bool) -> None:
    """Make the stages before the denoiser that are missing or were not finished."""
    stage = autoencoders.STAGE
    record = stage.recorded(run_dir)
    config = stage.asked_again(record["config"]) if record else autoencoders.PRESETS[preset]
    if not autoencoders.is_finished(run_dir):
        _autoencoder(run_dir, config, running, record.get(command.PRESET, preset), quiet)
    if not (command.path_of(run_dir) / encoding.FOLDER / "index.json").exists():
        _encode(run_dir, NO_ENCODING, running, quiet)


def sample(
    run_dir: str,
    prompt: str,
    out: str,
    devices: tyro.conf.OmitArgPrefixes[Devices],
    average: tyro.conf.OmitArgPrefixes[Average],
    form: tyro.conf.OmitArgPrefixes[Form],
    num: int = 16,
    guidance_scale: float | None = None,
    sampler: MethodName = "euler",
    num_steps: int = 25,
    seed: int = 0,
    text_weights: str | None = None,
    quiet: bool = False,
) -> None:
    """Draw pictures of a prompt, into one PNG or, by the thousand, into a folder.

    Args:
        run_dir: Folder of the run.
        prompt: What they show.
        out: The PNG to write, or a folder, filled file by file: the same command goes on.
        devices: Which devices share the pictures; they are the same for any.
        average: Which parameters draw them.
        form: How guidance acts.
        num: How many pictures.
        guidance_scale: Weight of the difference between the model with the prompt and without; 1
            is none. Unless given the best that the evaluation found, or 2.
        sampler: The method.
        num_steps: Steps from noise to data.
        seed: Of the noise; picture i depends on the run, the prompt, seed and i only.
        text_weights: Where the imported text encoder lies now, if it was moved.
        quiet: Show no progress bar.
    """
    command.check_seed(seed)
    options.check_counts(num=num, num_steps=num_steps)
    where = Out.asked(out)
    scale = (
        evaluating.best_scale(command.path_of(run_dir))
        if guidance_scale is None
        else guidance_scale
    )
    form.check_numbers(scale)
    devices.start()
    with refusing(runs.RunError, say="The samples would be others: "):
        runs.check_random(denoisers_stage.STAGE.at(run_dir))
    trained = drawing.read(run_dir, average, text_weights)
    denoisers_stage.check_scale(trained.config, scale)
    given = denoisers_stage.told(trained.text, [prompt])
    drawn = drawing.make_drawing(
        trained,
        sampler=sampler,
        num_steps=num_steps,
        form=form,
        devices=devices.local(),
    )
    key = jax.random.key(seed)

    def draw(first: int, last: int) -> np.ndarray:
        rows = jax.tree.map(lambda leaf: np.repeat(leaf, last - first, axis=0), given)
        return drawn.draw(rows, key, scale, first)

    said = {
        **trained.identity,
        **dataclasses.asdict(average),
        "prompt": prompt,
        "sampler": sampler,
        "num_steps": num_steps,
        "seed": seed,
        "num": num,
        "guidance": None if scale == drawing.UNGUIDED else form.record_of(scale),
    }
    labels = np.zeros(num, np.int64)
    where.write(lambda: said, draw, labels, trained.store.shape, progress=not quiet)


def evaluate(
    run_dir: str,
    devices: tyro.conf.OmitArgPrefixes[Devices],
    average: tyro.conf.OmitArgPrefixes[Average],
    judging: tyro.conf.OmitArgPrefixes[evaluating.Judging],
    text_weights: str | None = None,
    quiet: bool = False,
) -> None:
    """Judge a trained run anew: evaluation.json, report.md and the figures.

    Args:
        run_dir: Folder of the run.
        devices: Which devices share the work.
        average: Which parameters are judged.
        judging: How they are judged.
        text_weights: Where the imported text encoder lies now, if it was moved.
        quiet: Show no progress.
    """
    options.judge(judging)
    if devices.distributed:
        raise Refusal("--distributed must be left out: one process judges, on all its devices.")
    devices.start()
    directory = command.path_of(run_dir)
    trained = drawing.read(run_dir, average, text_weights)
    evaluating.write(trained, directory, judging, devices, average=average.name, progress=not quiet)
    if distributed.is_main():
        print((directory / command.REPORT).read_text())


def main(argv: list[str]) -> int:
    """Run the command line."""
    first, first_preset = autoencoders.STAGE.asked(argv, autoencoders.PRESETS)
    third, third_preset = denoisers_stage.STAGE.asked(argv, denoisers_stage.PRESETS)
    commands: dict[str, Callable[..., Any]] = {
        "autoencoder": functools.partial(autoencoder, config=first, preset=first_preset),
        "encode": encode,
        "train": functools.partial(train, config=third, preset=third_preset),
        "sample": sample,
        "evaluate": evaluate,
    }
    return command.run("latents", commands, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
