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

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from experiments import command, digits_report, fitting, streaming
from experiments.averages import NO_CHOICE, Average
from experiments.command import Refusal, refusing
from experiments.image_model import (
    PRESETS,
    Config,
    build_loss,
    build_model,
    check,
    from_record,
    make_generator,
    open_images,
    pixels,
    to_record,
)
from experiments.methods import MethodName
from experiments.running import Devices, Running
from jaxdiff import data, plotting
from jaxdiff.training import distributed
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import Restored
from jaxdiff.training.export import export_params
from jaxdiff.typing import Batch, PyTree


def train(
    run_dir: str,
    config: tyro.conf.OmitArgPrefixes[Config],
    running: tyro.conf.OmitArgPrefixes[Running],
    preset: Literal["full", "smoke"] = "full",
    quiet: bool = False,
) -> None:
    """Train a run or resume it, then evaluate and draw it.

    Args:
        run_dir: Folder of the run; the same command on it resumes.
        config: What the run is.
        running: How it is carried out.
        preset: What options that are not given are set to; smoke runs all in a minute.
        quiet: Show no progress bar.
    """
    check(config)
    running.start()
    directory = command.claim(run_dir)
    config = from_record(
        runs.reconcile(directory, to_record(config), free=fitting.FREE, grows="num_steps")
    )
    images = open_images(config, "train")
    with command.compiling_for(preset):
        params = fit(config, images, directory, running, progress=not quiet)
        if distributed.any_of(not fitting.is_judged(directory, config.num_steps)):
            with refusing(OSError, say=f"--run-dir {directory} cannot be written: "):
                digits_report.write(config, params, directory, devices=running.local())
    if distributed.is_main():
        print(f"Report: {directory / command.REPORT}")


def fit(
    config: Config, images: data.Images, directory: Path, running: Running, *, progress: bool
) -> PyTree:
    """Train what is left of a run; return the averaged parameters."""
    model = build_model(config, images)

    def batches_from(step: int) -> Iterator[Batch]:
        with refusing(ValueError):
            return data.batches(
                images,
                config.batch_size,
                seed=config.seed,
                start_step=step,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )

    def indices_of(step: int) -> np.ndarray:
        return data.batch_indices(len(images), config.batch_size, config.seed, step)

    return fitting.fit(
        directory,
        config,
        to_record(config),
        model.init_params,
        build_loss(config, model, images.num_levels),
        batches_from,
        report=command.REPORT,
        progress=progress,
        running=running,
        indices_of=indices_of,
    )


def sample(
    run_dir: str,
    out: str,
    devices: tyro.conf.OmitArgPrefixes[Devices],
    average: tyro.conf.OmitArgPrefixes[Average],
    num: int = 64,
    sampler: MethodName = "ddim",
    num_steps: int = 50,
    label: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Draw images from a trained run, into one PNG or, by the thousand, into a folder.

    Args:
        run_dir: Folder of the run.
        out: The PNG to write, or a folder, filled file by file: the same command goes on.
        devices: Which devices share the images; they are the same for any.
        average: Which parameters draw them.
        num: How many images.
        sampler: The method.
        num_steps: Steps from noise to data.
        label: The class of all images; by default all classes in turn.
        seed: Of the noise; image i depends on the run, seed and i only.
        quiet: Show no progress bar.
    """
    for option, value in (("--num", num), ("--num-steps", num_steps)):
        if value < 1:
            raise Refusal(f"{option} must be at least 1; got {value}.")
    path = Path(out)
    one_file = path.suffix.lower() == ".png"
    if path.suffix and not one_file:
        raise Refusal(f"--out must end in .png, or be a folder without an ending; got {out}.")
    devices.start()
    config, restored, params = restore(Path(run_dir), average)
    images = open_images(config, "train")
    num_classes = images.num_classes or 1
    if label is not None and not 0 <= label < num_classes:
        raise Refusal(f"--label must lie in 0..{num_classes - 1}; got {label}.")
    labels = np.arange(num) % num_classes if label is None else np.full(num, label)
    generate = make_generator(
        build_model(config, images), images.shape, sampler, num_steps, devices=devices.local()
    )

    key = jax.random.key(seed)  # one for all files: what is new in a call is sent to the devices

    def draw(first: int, last: int) -> np.ndarray:
        x0, _ = generate(params, key, labels[first:last], first=first)
        return pixels(x0, images.num_levels)

    with refusing(OSError, say=f"--out {out} cannot be written: "):
        if one_file and distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            plotting.save_sheet(path, draw(0, num))
        elif not one_file:
            record = {
                "run": runs.config_hash(restored.config, free=fitting.FREE),
                "step": restored.step,
                **dataclasses.asdict(average),
                "sampler": sampler,
                "num_steps": num_steps,
                "label": label,
                "seed": seed,
                "num": num,
            }
            streaming.write(path, record, draw, labels, progress=not quiet)


def evaluate(
    run_dir: str,
    devices: tyro.conf.OmitArgPrefixes[Devices],
    average: tyro.conf.OmitArgPrefixes[Average],
    exact: bool = False,
) -> None:
    """Judge a trained run anew: evaluation.json, report.md and the figures.

    Args:
        run_dir: Folder of the run.
        devices: Which devices share the work.
        average: Which parameters are judged.
        exact: Also take the likelihood with the exact divergence, one tangent a pixel: slow.
    """
    directory = Path(run_dir)
    devices.start()
    config, _, params = restore(directory, average)
    with refusing(OSError, say=f"--run-dir {directory} cannot be written: "):
        digits_report.write(config, params, directory, exact=exact, devices=devices.local())
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
    config, restored, params = restore(Path(run_dir), average)
    path = Path(out)
    with refusing(OSError, ValueError, say=f"--out {out} cannot be written: "):
        path.parent.mkdir(parents=True, exist_ok=True)
        export_params(path, restored.state["params"] if raw else params, to_record(config))


def restore(
    directory: Path, average: Average = NO_CHOICE, option: str = "--run-dir"
) -> tuple[Config, Restored, PyTree]:
    """Return the config, the newest sound checkpoint and an average of a run, or refuse."""
    remedy = f" Train one first:\n  python -m experiments.digits train --run-dir {directory}"
    record = runs.read_record(command.existing(directory, option, remedy))
    with contextlib.closing(fitting.open_checkpoints(directory)) as checkpoints:
        restored = None if record is None else checkpoints.restore()
        if record is None or restored is None:
            raise Refusal(f"{option} {directory} holds no checkpoint yet.{remedy}")
        config = from_record(record["config"])
        return config, restored, average.of(config, restored.state["ema"], checkpoints)


def main(argv: list[str]) -> int:
    """Run the command line."""
    commands: dict[str, Callable[..., None]] = {
        "train": functools.partial(train, config=command.preset_of(argv, PRESETS)),
        "sample": sample,
        "evaluate": evaluate,
        "export": export,
    }
    return command.run("digits", commands, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
