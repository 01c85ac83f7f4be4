"""The data of an image model: judged before training, and recorded."""

import difflib
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.common.command import Refusal
from experiments.images.model import Config
from experiments.images.sources import open_images
from jaxdiff import data

RECORD = "data"
"""Where config.json describes the data, beside the config."""
SPLIT = "test"
"""Which split judges unless told otherwise."""
SCANNED = 4096
"""Images of a split that is not in memory whose labels are looked at."""


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
            f"{train.title}; got {config.batch_size}."
        )
    for images, option in ((train, "--data"), (held_out, "--eval-split")):
        never = [] if images is None else missing_labels(images, option)
        if images is not None and never:
            names = ", ".join(map(str, never[:20])) + (" ..." if len(never) > 20 else "")
            print(f"{images.title} has no image of label {names}.", file=sys.stderr)
    if held_out is None:
        return
    warn_if_trained_on(held_out)
    if held_out.description != train.description:
        raise Refusal(
            f"--eval-split {held_out.split} must hold such images as {train.split} does, "
            f"{train.description}; got {held_out.description}."
        )
    for images, option in ((train, "--data"), (held_out, "--eval-split")):
        if images is not None and len(images) < 2:
            raise Refusal(f"{option}: {images.title} must hold 2 images at least.")
    components = config.mixture_components
    if components and min(components) > len(train):
        raise Refusal(
            f"--mixture-components must be at most the {len(train)} training images; got "
            f"{' '.join(map(str, components))}. Without a number no mixture is fitted."
        )


def warn_if_trained_on(held_out: data.Images) -> None:
    """Say it on stderr where a split that judges is trained on."""
    if is_trained_on(held_out):
        print(f"--eval-split {held_out.split} judges by images trained on.", file=sys.stderr)


def is_trained_on(images: data.Images) -> bool:
    """Tell whether a split is one that runs train on, or has part of it."""
    return "train" in re.split(r"\W+", images.split)


def scan(images: data.Images, option: str = "--data") -> tuple[np.ndarray, np.ndarray]:
    """Return levels and labels of all images in memory, or of the first; no label is label 0.

    Args:
        images: what is looked at.
        option: the one that chose them.

    Raises:
        Refusal: if they cannot be read, or a label is out of range.
    """
    try:
        if images.in_memory:
            levels, labels = images.arrays
        else:
            found = images.rows(np.arange(min(len(images), SCANNED)))
            levels, labels = found["image"], found.get("label")
    except ValueError as error:
        raise Refusal(f"{option}: {error}") from error
    return levels, np.zeros(len(levels), np.int32) if labels is None else labels


def missing_labels(images: data.Images, option: str = "--data") -> list[int]:
    """Return the labels that never occur, as far as the images were scanned."""
    labels = scan(images, option)[1]
    if images.num_classes is None or not images.in_memory:
        return []
    return sorted(set(range(images.num_classes)) - set(np.unique(labels).tolist()))


def check_same(run: Mapping[str, Any] | None, images: data.Images, directory: Any) -> None:
    """Refuse to go on with a run on other images than it began with.

    Args:
        run: its record, if there is one.
        images: those to train on now.
        directory: of the run.

    Raises:
        Refusal: saying what differs.
    """
    found = (run or {}).get(RECORD)
    if not isinstance(found, dict):
        return
    now = images.description.to_record() | {"contents": images.contents}
    for name, value in now.items():
        if name in found and found[name] != value:
            said = "other files" if name == "contents" else f"{name} {value}, there {found[name]}"
            raise Refusal(
                f"--data: {images.location} holds other images than the run in {directory} began "
                f"with: {said}. Bring them back, or take another --run-dir."
            )


def label_of(name: str, known: data.Description) -> int:
    """Return the label that a command line means, by the name of its class or its number.

    Raises:
        Refusal: if there is no such class.
    """
    names, count = known.class_names or (), known.num_classes or 1
    if name in names:
        return names.index(name)
    try:
        label = int(name)
    except ValueError:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        if names and not near:
            hint = f" Those known are {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}."
        raise Refusal(
            f"--label must be the name of a class or lie in 0..{count - 1}; got {name}.{hint}"
        ) from None
    if not 0 <= label < count:
        raise Refusal(f"--label must lie in 0..{count - 1}; got {label}.")
    return label


def record(images: data.Images, split: str) -> dict[str, Any]:
    """Return what config.json says of the data and of the split that judges."""
    held = {} if images.contents is None else {"contents": images.contents}
    return {RECORD: images.description.to_record() | held | {"eval_split": split}}


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
        if not isinstance(found, dict):
            raise TypeError(f"`data` must be an object; got {found!r}.")
        return data.Description.from_record(found)
    except (TypeError, ValueError, AttributeError) as error:
        raise Refusal(
            f"config.json says of its data what cannot be meant: {error} Put back what was there, "
            "or take the part out: then the data are opened."
        ) from error
