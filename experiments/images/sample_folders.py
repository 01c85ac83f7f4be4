"""What a command draws: one PNG, or images by the thousand in a folder.

A folder is written file by file, so that a crash costs one file at most.
"""

import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common import command
from experiments.common.command import Refusal, refusing
from jaxdiff import checks, files, plotting
from jaxdiff.training import distributed
from jaxdiff.training import run as runs

PER_FILE = 1024
IMAGES = "arr_0"
RECORD = "samples.json"
RANDOM = "random_numbers"
IN_A_FILE = "per_file"


class Out(NamedTuple):
    """Where a command writes its images.

    Attributes:
        path: of a PNG or a folder.
        one_file: whether it is a PNG.
    """

    path: files.Path
    one_file: bool

    @classmethod
    def asked(cls, out: str) -> "Out":
        """Return what `--out` asks for.

        Raises:
            Refusal: if it is neither.
        """
        path = command.path_of(out, "--out")
        one_file = path.suffix.lower() == ".png"
        if path.suffix and not one_file:
            raise Refusal(f"--out must end in .png, or be a folder without an ending; got {out}.")
        if not out or (not one_file and path.is_file()):
            got = "a file without it" if out else "an empty name"
            raise Refusal(f"--out must be a file that ends in .png, or a folder; got {got} {out}.")
        return cls(path, one_file)

    def write(
        self,
        record: Callable[[], Mapping[str, Any]],
        draw: Callable[[int, int], np.ndarray],
        labels: np.ndarray,
        shape: Sequence[int],
        *,
        progress: bool,
        per_file: int | None = None,
        save: Callable[[files.Path, np.ndarray], None] = plotting.save_sheet,
    ) -> None:
        """Draw the images and write them; for the arguments see :func:`write`.

        Args:
            record: makes it, for a folder.
            draw: likewise.
            labels: likewise.
            shape: likewise.
            progress: likewise.
            per_file: likewise.
            save: (path, images) writes the PNG.

        Raises:
            Refusal: if it cannot be written.
        """
        with refusing(OSError, say=f"--out {self.path} cannot be written: "):
            if not self.one_file:
                said = record()
                write(self.path, said, draw, labels, shape, progress=progress, per_file=per_file)
            elif distributed.is_main():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                save(self.path, draw(0, len(labels)))


def write(
    directory: files.Path,
    record: Mapping[str, Any],
    draw: Callable[[int, int], np.ndarray],
    labels: np.ndarray,
    shape: Sequence[int],
    *,
    progress: bool,
    per_file: int | None = None,
) -> None:
    """Fill a folder with images (N, H, W, C), uint8, and `labels` (N,), file by file.

    The images are `arr_0` of each file, where other tools look for them. Files that are there are
    left; of several processes each writes its share. The names are the numbers of the first image
    and of the one after the last.

    Args:
        directory: made if missing; one with images of another record is refused.
        record: what the images are of; its `num` may grow.
        draw: (first, last) -> the images of these numbers.
        labels: of all images.
        shape: of one image, (H, W, C).
        progress: show a progress bar if stderr is a terminal.
        per_file: images a file, which is recorded; `PER_FILE` unless given.
    """
    from tqdm import tqdm

    if per_file is not None:
        record = {**record, IN_A_FILE: per_file}
    _claim(directory, record)
    ranges = _ranges(record, len(labels))
    mine = ranges[jax.process_index() :: jax.process_count()]
    missing = [
        (first, last)
        for first, last in mine
        if not _is_whole(directory / _name(first, last), labels[first:last], shape)
    ]
    show = progress and distributed.is_main() and sys.stderr.isatty()
    for first, last in tqdm(missing, unit="file", disable=not show):
        arrays = {IMAGES: draw(first, last), "labels": labels[first:last]}
        files.write_arrays(directory / _name(first, last), arrays)
    wanted = {f"{first:08d}": _name(first, last) for first, last in mine}
    found: list[Any] = list(directory.iterdir()) if mine else []
    for path in found:
        start, dash, _ = path.name.partition("-")
        if dash and path.suffix == ".npz" and wanted.get(start, path.name) != path.name:
            path.unlink()  # of a smaller number
    if distributed.is_main():
        count = sum(last - first for first, last in mine)
        which = "" if len(mine) == len(ranges) else f" of this process, of {len(labels)} in all"
        print(
            f"{directory}: {count} images in {len(mine)} files{which}, "
            f"{len(mine) - len(missing)} of them there before"
        )


def read(directory: files.Path) -> tuple[np.ndarray, np.ndarray]:
    """Return all images and labels that a folder's record names, in their order."""
    record, images, labels = _read_record(directory / RECORD), [], []
    for each in _ranges(record, record["num"]):
        path = directory / _name(*each)
        try:
            found, of_class = _arrays(path)
        except _DAMAGE as error:
            raise Refusal(
                f"{path} cannot be read ({error}). Run the command again that made it."
            ) from error
        images.append(found)
        labels.append(of_class)
    return np.concatenate(images), np.concatenate(labels)


def _ranges(record: Mapping[str, Any], num: int) -> list[tuple[int, int]]:
    size = record.get(IN_A_FILE, PER_FILE)
    return [(first, min(first + size, num)) for first in range(0, num, size)]


_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    RuntimeError,  # NotImplementedError is one
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy and zipfile raise where a file is damaged, or is of another kind."""


def _arrays(path: files.Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as part:
        # `images` in files of earlier versions
        images, labels = part[IMAGES if IMAGES in part.files else "images"], part["labels"]
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"it holds {images.dtype}{list(images.shape)} and labels {list(labels.shape)}, no "
            "images of uint8 with a label each"
        )
    return images, labels


def _is_whole(path: files.Path, labels: np.ndarray, shape: Sequence[int]) -> bool:
    try:
        images, found = _arrays(path)
    except _DAMAGE:
        return False
    return images.shape[1:] == tuple(shape) and np.array_equal(found, labels)


def _read_record(path: files.Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        sizes = {name: checks.count(name, record[name]) for name in (IN_A_FILE,) if name in record}
        return {**record, **sizes, "num": checks.count("num", record["num"])}
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise Refusal(f"{path} cannot be read ({error}). Take another folder.") from error


def _name(first: int, last: int) -> str:
    return f"{first:08d}-{last:08d}.npz"


def _claim(directory: files.Path, record: Mapping[str, Any]) -> None:
    """Say in the folder what it is of, or refuse; all processes ask together."""
    record = {**record, RANDOM: runs.random_numbers()}
    problem = _problem(directory, record) if distributed.is_main() else None
    if distributed.any_of(problem is not None):
        raise Refusal(problem or "Process 0 refuses.")
    directory.mkdir(parents=True, exist_ok=True)
    if distributed.is_main():
        files.write_text(directory / RECORD, json.dumps(record, indent=2) + "\n")


def _problem(directory: files.Path, record: Mapping[str, Any]) -> str | None:
    path = directory / RECORD
    if not path.exists():
        if directory.exists() and (
            not directory.is_dir()
            or any(not each.name.startswith(".") for each in directory.iterdir())
        ):
            return f"--out {directory} holds other files; take another folder."
        return None
    try:
        old = _read_record(path)
    except Refusal as refusal:
        return str(refusal)
    old.setdefault(RANDOM, record[RANDOM])  # earlier versions did not say
    differing = [name for name in record if name != "num" and record[name] != old.get(name)]
    if record["num"] < old["num"]:
        differing.append("num")
    fields = ", ".join(f"{name} {old.get(name)} (asked {record[name]})" for name in differing)
    if differing:
        return f"--out {directory} holds other images: {fields}. Take another folder."
    return None
