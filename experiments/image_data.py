"""The data of an image model: opened as a config says, judged before training, and recorded."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.command import Refusal
from experiments.image_model import Config, open_images
from jaxdiff import data

RECORD = "data"
"""Where config.json describes the data, beside the config."""
SPLIT = "test"
"""Which split judges unless told otherwise."""
SCANNED = 4096
"""Images of a split that is not in memory whose labels are looked at."""


def absolute(data_dir: str | None) -> str | None:
    """Return where data lie, so that it can be found from any working folder."""
    if data_dir is None or "://" in data_dir:
        return data_dir
    return os.path.abspath(os.path.expanduser(data_dir))


def check(config: Config, train: data.Images, held_out: data.Images | None) -> None:
    """Refuse data that cannot be trained on, or judged by; say which labels never occur.

    Args:
        config: of the run.
        train: the images to train on.
        held_out: those that judge, unless nothing is judged.

    Raises:
        Refusal: naming the option.
    """
    if config.batch_size > len(train):
        raise Refusal(
            f"--batch-size: `batch_size` must not exceed the {len(train)} examples of "
            f"{train.name}/{train.split}; got {config.batch_size}."
        )
    for images in (train,) if held_out is None else (train, held_out):
        never = missing_labels(images)
        if never:
            names = ", ".join(map(str, never[:20])) + (" ..." if len(never) > 20 else "")
            print(f"{images.name}/{images.split} has no image of label {names}.", file=sys.stderr)
    if held_out is None:
        return
    if held_out.description != train.description:
        raise Refusal(
            f"--eval-split {held_out.split} must hold such images as {train.split} does, "
            f"{train.description}; got {held_out.description}."
        )
    for images, option in ((train, "--data"), (held_out, "--eval-split")):
        if len(images) < 2:
            raise Refusal(f"{option}: {images.name}/{images.split} must hold 2 images at least.")
    components = config.mixture_components
    if components and min(components) > len(train):
        raise Refusal(
            f"--mixture-components must be at most the {len(train)} training images; got "
            f"{' '.join(map(str, components))}. Without a number no mixture is fitted."
        )


def scan(images: data.Images) -> tuple[np.ndarray, np.ndarray]:
    """Return levels and labels of all images in memory, or of the first; no label is label 0.

    Raises:
        Refusal: if they cannot be read, or a label is out of range.
    """
    try:
        if images.in_memory:
            levels, labels = images.arrays
        else:
            levels, labels = images.rows(np.arange(min(len(images), SCANNED)))
    except ValueError as error:
        raise Refusal(f"--data: {error}") from error
    return levels, np.zeros(len(levels), np.int32) if labels is None else labels


def missing_labels(images: data.Images) -> list[int]:
    """Return the labels that never occur, as far as the images were scanned."""
    labels = scan(images)[1]
    if images.num_classes is None or not images.in_memory:
        return []
    return sorted(set(range(images.num_classes)) - set(np.unique(labels).tolist()))


def record(images: data.Images, split: str) -> dict[str, Any]:
    """Return what config.json says of the data and of the split that judges."""
    return {RECORD: images.description.to_record() | {"eval_split": split}}


def recorded_split(run: Mapping[str, Any] | None) -> str:
    """Return the split that judges, as a run's record says it."""
    found = (run or {}).get(RECORD)
    return str(found.get("eval_split", SPLIT)) if isinstance(found, dict) else SPLIT


def describe(config: Config, run: Mapping[str, Any]) -> data.Description:
    """Return what a run's images are: as recorded or, of older runs, as the data themselves say.

    Raises:
        Refusal: if neither can be read.
    """
    found = run.get(RECORD)
    if found is None:
        return open_images(config, "train", recorded=True).description
    try:
        return data.Description.from_record(found)
    except (TypeError, ValueError, AttributeError) as error:
        raise Refusal(
            f"config.json says of its data what cannot be meant: {error} Put back what was there, "
            "or take the part out: then the data are opened."
        ) from error
