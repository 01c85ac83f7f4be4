"""Images by the thousand, written file by file, so that a crash costs one file at most."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.command import Refusal
from jaxdiff.training import distributed
from jaxdiff.training import run as runs

PER_FILE = 1024
RECORD = "samples.json"
_FILE = re.compile(r"([0-9]{8})-([0-9]{8})\.npz")


def write(
    directory: Path,
    record: Mapping[str, Any],
    draw: Callable[[int, int], np.ndarray],
    labels: np.ndarray,
    *,
    progress: bool,
) -> None:
    """Fill a folder with `images` (N, H, W, C), uint8, and `labels` (N,), `PER_FILE` a file.

    Files that are there are left; of several processes each writes its share. The names are the
    numbers of the first image and of the one after the last.

    Args:
        directory: made if missing; one with images of another record is refused.
        record: what the images are of; its `num` may grow.
        draw: (first, last) -> the images of these numbers.
        labels: of all images.
        progress: show a progress bar if stderr is a terminal.
    """
    from tqdm import tqdm

    _claim(directory, record)
    num = len(labels)
    starts = range(0, num, PER_FILE)
    mine = starts[jax.process_index() :: jax.process_count()]
    ranges = [(first, min(first + PER_FILE, num)) for first in mine]
    missing = [each for each in ranges if not (directory / _name(*each)).exists()]
    show = progress and distributed.is_main() and sys.stderr.isatty()
    for first, last in tqdm(missing, unit="file", disable=not show):
        staged = directory / f".{_name(first, last)}"
        np.savez(staged, images=draw(first, last), labels=labels[first:last])
        os.replace(staged, directory / _name(first, last))
        for path in directory.glob(f"{first:08d}-*.npz"):  # of a smaller number
            if path.name != _name(first, last):
                path.unlink()
    print(
        f"{directory}: {sum(last - first for first, last in ranges)} images in {len(ranges)} "
        f"files, {len(ranges) - len(missing)} of them there before"
    )


def read(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return all images and labels of a folder, in their order."""
    paths = sorted(path for path in directory.iterdir() if _FILE.fullmatch(path.name))
    parts = [np.load(path) for path in paths]
    images, labels = ([part[name] for part in parts] for name in ("images", "labels"))
    return np.concatenate(images), np.concatenate(labels)


def _name(first: int, last: int) -> str:
    return f"{first:08d}-{last:08d}.npz"


def _claim(directory: Path, record: Mapping[str, Any]) -> None:
    """Say in the folder what it is of, or refuse; all processes ask together."""
    problem = _problem(directory, record) if distributed.is_main() else None
    if distributed.any_of(problem is not None):
        raise Refusal(problem or "Process 0 refuses.")
    directory.mkdir(parents=True, exist_ok=True)
    if distributed.is_main():
        runs.replace_text(directory / RECORD, json.dumps(dict(record), indent=2) + "\n")


def _problem(directory: Path, record: Mapping[str, Any]) -> str | None:
    path = directory / RECORD
    if not path.exists():
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            return f"--out {directory} holds other files; take another folder."
        return None
    old = json.loads(path.read_text())
    differing = [name for name in record if name != "num" and record[name] != old.get(name)]
    if record["num"] < old["num"]:
        differing.append("num")
    fields = ", ".join(f"{name} {old.get(name)} (asked {record[name]})" for name in differing)
    if differing:
        return f"--out {directory} holds other images: {fields}. Take another folder."
    return None
