"""A trained model of images, read back without its data: for commands, and for Python.

from experiments.images import trained

run = trained.load("runs/digits")
denoise = run.model.denoiser(run.params, labels)
"""

import os
from typing import NamedTuple

from experiments.common import command
from experiments.common.averages import NO_CHOICE, Average
from experiments.common.command import Refusal
from experiments.images import data as image_data
from experiments.images.model import Config, Recipe, build_model, from_record
from jaxdiff import data, files
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import Restored
from jaxdiff.training.trainer import open_checkpoints
from jaxdiff.typing import PyTree


class Trained(NamedTuple):
    """A trained model of images.

    Attributes:
        model: network, process and prediction.
        params: of the network.
        config: of the run.
        description: what its images are.
        step: updates done.
    """

    model: Recipe
    params: PyTree
    config: Config
    description: data.Description
    step: int


def load(directory: str | os.PathLike[str], average: Average = NO_CHOICE) -> Trained:
    """Read back the model of a run of `experiments.digits`; its data are not needed.

    Args:
        directory: of the run.
        average: which parameters.

    Raises:
        Refusal: if the folder holds no run, or no such average.
        RunError: if its record cannot be read.
        CheckpointError: if no checkpoint is sound.
    """
    folder = files.to_path(directory)
    config, restored, params = restore(folder, average)
    description = describe(config, folder)
    return Trained(build_model(config, description), params, config, description, restored.step)


def describe(config: Config, directory: files.Path) -> data.Description:
    """Return what the images of a run are, by its record where that says it."""
    return image_data.describe(config, runs.read_record(directory) or {})


def restore(
    directory: files.Path, average: Average = NO_CHOICE, option: str = "--run-dir"
) -> tuple[Config, Restored, PyTree]:
    """Return the config, the newest sound checkpoint and an average of a run, or refuse."""
    remedy = f" Train one first:\n  python -m experiments.digits train --run-dir {directory}"
    record = runs.read_record(command.existing(directory, option, remedy))
    with open_checkpoints(directory) as checkpoints:
        restored = None if record is None else checkpoints.restore()
        if record is None and checkpoints.steps():
            raise Refusal(
                f"{option} {directory} holds checkpoints and no config.json, which says what they "
                "are of. Bring it back."
            )
        if record is None or restored is None:
            raise Refusal(f"{option} {directory} holds no checkpoint yet.{remedy}")
        config = from_record(record["config"])
        return config, restored, average.of(config, restored.state["ema"], checkpoints)
