"""Images by the thousand, written file by file, so that a crash costs one file at most."""

import json
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.command import Refusal
from jaxdiff import files
from jaxdiff.training import checksums, distributed

PER_FILE = 1024
RECORD = "samples.json"


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
    ranges = _ranges(len(labels))
    mine = ranges[jax.process_index() :: jax.process_count()]
    missing = [each for each in mine if not _is_whole(directory / _name(*each))]
    show = progress and distributed.is_main() and sys.stderr.isatty()
    for first, last in tqdm(missing, unit="file", disable=not show):
        staged = directory / f".{_name(first, last)}"
        np.savez(staged, images=draw(first, last), labels=labels[first:last])
        checksums.flush(staged)
        os.replace(staged, directory / _name(first, last))
        for path in directory.glob(f"{first:08d}-*.npz"):  # of a smaller number
            if path.name != _name(first, last):
                path.unlink()
    if distributed.is_main():
        count = sum(last - first for first, last in mine)
        which = "" if len(mine) == len(ranges) else f" of this process, of {len(labels)} in all"
        print(
            f"{directory}: {count} images in {len(mine)} files{which}, "
            f"{len(mine) - len(missing)} of them there before"
        )


def read(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return all images and labels that a folder's record names, in their order."""
    num, images, labels = _read_record(directory / RECORD)["num"], [], []
    for each in _ranges(num):
        with np.load(directory / _name(*each)) as part:
            images.append(part["images"])
            labels.append(part["labels"])
    return np.concatenate(images), np.concatenate(labels)


def _ranges(num: int) -> list[tuple[int, int]]:
    return [(first, min(first + PER_FILE, num)) for first in range(0, num, PER_FILE)]


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, zlib.error):
        return False


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        return {**record, "num": int(record["num"])}
    except (ValueError, TypeError, KeyError) as error:
        raise Refusal(f"{path} cannot be read ({error}). Take another folder.") from error


def _name(first: int, last: int) -> str:
    return f"{first:08d}-{last:08d}.npz"


def _claim(directory: Path, record: Mapping[str, Any]) -> None:
    """Say in the folder what it is of, or refuse; all processes ask together."""
    problem = _problem(directory, record) if distributed.is_main() else None
    if distributed.any_of(problem is not None):
        raise Refusal(problem or "Process 0 refuses.")
    directory.mkdir(parents=True, exist_ok=True)
    if distributed.is_main():
        files.write_text(directory / RECORD, json.dumps(dict(record), indent=2) + "\n")


def _problem(directory: Path, record: Mapping[str, Any]) -> str | None:
    path = directory / RECORD
    if not path.exists():
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            return f"--out {directory} holds other files; take another folder."
        return None
    try:
        old = _read_record(path)
    except Refusal as refusal:
        return str(refusal)
    differing = [name for name in record if name != "num" and record[name] != old.get(name)]
    if record["num"] < old["num"]:
        differing.append("num")
    fields = ", ".join(f"{name} {old.get(name)} (asked {record[name]})" for name in differing)
    if differing:
        return f"--out {directory} holds other images: {fields}. Take another folder."
    return None
