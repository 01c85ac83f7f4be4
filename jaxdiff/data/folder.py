"""A folder of images, opened as it is.

    photos/cat/1.jpg  photos/cat/more/2.png  photos/dog/3.webp       labels 0 and 1: cat, dog
    photos/1.jpg  photos/2.png                                       no labels
    photos/1.jpg  photos/more/2.png  photos/metadata.jsonl           captions, no labels

Sub-folders are classes, in the order of their names; what lies deeper belongs to its class. Every
file is an image, but for hidden ones and those that file managers leave. How an image becomes
levels is said in `decoding`.

**Splits.** A file is held out for "test" where SHA-256 of its path within the folder, as a number
in [0, 1), is below 0.1; the rest is "train". So a split is the same on every machine, and what is
added to the folder moves nothing from one to the other. Only of a folder so small that this holds
out fewer than two are the two with the smallest numbers held out, if two others are left.
"""

import concurrent.futures
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxdiff import checks
from jaxdiff.data import decoding, metadata
from jaxdiff.data.errors import NotPreparedError, UnreadableError
from jaxdiff.data.images import Images
from jaxdiff.data.mirror import local

TEST_SHARE = 0.1
MIN_TEST = 2
SPLITS = ("train", "test", "all")
NO_CLASSES = {"train", "training", "test", "testing", "val", "valid", "validation", "eval"}
"""Names of sub-folders that mean splits, if all do."""
PASSED_OVER = ("thumbs.db", "desktop.ini")


def load_folder(path: str | os.PathLike[str], image_size: int, *, split: str = "train") -> Images:
    """Open a folder of PNG, JPEG and WebP images, of any modes and sizes, as square ones.

    They are grey where all files of the folder are grey, else RGB. The head of each file is read
    here; all of it when first needed, once if the split takes up to 1 GiB, else at every use.

    Args:
        path: the folder.
        image_size: S, the side of the images: the short side is resized, the centre cut out.
        split: "train", "test" (a tenth, by a hash of the path) or "all".

    Returns:
        Images of shape (S, S, 1 or 3) and 256 levels, in the order of their paths, with the
        sub-folders as classes, if there are any; or with captions, where there is a
        `metadata.jsonl`.

    Raises:
        ImportError: if Pillow is not installed.
        NotPreparedError: a FileNotFoundError and ValueError, if there is no such folder.
        TypeError: if `path` is no path or `image_size` no whole number.
        ValueError: if `image_size` or `split` cannot be, or the folder, a class or the split has
            no image, or images lie beside classes. An UnreadableError, which is one, names a file
            that is no image, or a line of the metadata that is wrong; damage beyond a file's head
            shows when it is read.
    """
    image_size = checks.count("image_size", image_size)
    checks.choice("split", split, SPLITS)
    decoding.pillow()
    folder = local("path", path)
    if not os.path.isdir(folder):
        raise NotPreparedError(f"`path` must be a folder of images; there is no folder {folder}.")
    texts = metadata.read(folder)
    found, class_names = _listed(folder) if texts is None else _named(folder, texts)
    grey = all(_in_threads(decoding.is_grey, [os.path.join(folder, f.name) for f in found]))
    held_out = _held_out(found)
    chosen = [file for file in found if split == "all" or (file in held_out) == (split == "test")]
    if not chosen:
        raise ValueError(
            f"`split` {split} of {folder} holds no image: the {len(found)} that the folder holds "
            "are too few for two splits."
        )
    paths = [os.path.join(folder, file.name) for file in chosen]
    labels = None if class_names is None else [file.label for file in chosen]
    return Images(
        name=os.path.basename(folder) or folder,
        split=split,
        num_examples=len(chosen),
        shape=(image_size, image_size, 1 if grey else 3),
        num_levels=256,
        num_classes=None if class_names is None else len(class_names),
        source=_Files(paths, labels, image_size, grey),
        location=folder,
        class_names=class_names,
        contents=_digest(folder, chosen, texts),
        paths=tuple(file.name for file in chosen),
        texts=None if texts is None else tuple(texts[file.name] for file in chosen),
    )


class _File(NamedTuple):
    name: str
    """Its path within the folder, with slashes."""
    label: int


class _Files(Sequence[dict[str, Any]]):
    """Decoded images by index, many at once in threads."""

    def __init__(
        self, paths: list[str], labels: list[int] | None, image_size: int, grey: bool
    ) -> None:
        self._paths, self._labels = paths, labels
        self._image_size, self._grey = image_size, grey

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        image = decoding.read_image(self._paths[index], self._image_size, grey=self._grey)
        return {"image": image} | ({} if self._labels is None else {"label": self._labels[index]})

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return _in_threads(self.__getitem__, indices)


def _listed(folder: str) -> tuple[list[_File], tuple[str, ...] | None]:
    """Return the files in the order of their names, and those of the classes.

    Raises:
        ValueError: if there is none, or images lie beside classes, or a class is empty.
    """
    files, folders = _entries(folder)
    if files and folders:
        raise ValueError(
            f"{folder} holds images ({files[0]}) beside sub-folders ({folders[0]}), which are "
            "classes. Move the images into one, or the sub-folders elsewhere."
        )
    if not folders:
        if not files:
            raise ValueError(f"{folder} holds no image.")
        return [_File(name, 0) for name in files], None
    if {name.lower() for name in folders} <= NO_CLASSES:
        raise ValueError(
            f"{folder} holds {' and '.join(folders)}, which are splits and not classes. Give one "
            "of them: what judges is held out of it."
        )
    found = []
    for label, name in enumerate(folders):
        within = list(_below(folder, name, ()))
        if not within:
            raise ValueError(
                f"{os.path.join(folder, name)} holds no image: a class must have one. Fill the "
                "folder or remove it."
            )
        found += [_File(file, label) for file in within]
    return sorted(found), tuple(folders)


def _named(folder: str, texts: dict[str, str]) -> tuple[list[_File], None]:
    """Return the files that the metadata name, in the order of their names; they have no classes.

    Raises:
        ValueError: if the folder holds others.
    """
    files, folders = _entries(folder)
    deeper = (file for name in folders for file in _below(folder, name, ()))
    metadata.check_all_named(folder, texts, [*files, *deeper])
    return [_File(name, 0) for name in sorted(texts)], None


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of files and of folders that count, sorted."""
    names: tuple[list[str], list[str]] = ([], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.lower() not in PASSED_OVER:
                    names[entry.is_dir()].append(entry.name)
    except OSError as error:
        raise UnreadableError(f"{folder} cannot be read: {error.strerror}.") from error
    return sorted(names[0]), sorted(names[1])


def _below(folder: str, name: str, above: tuple[str, ...]) -> Iterator[str]:
    """Yield the paths of a class, following links but not in circles."""
    place = os.path.realpath(os.path.join(folder, name))
    if place in above:
        return
    files, folders = _entries(place)
    yield from (f"{name}/{file}" for file in files)
    for each in folders:
        yield from _below(folder, f"{name}/{each}", (*above, place))


def _held_out(found: list[_File]) -> set[_File]:
    """Return the files of the test split, as the module's docstring says."""

    def number(file: _File) -> float:
        return int.from_bytes(hashlib.sha256(os.fsencode(file.name)).digest()[:8], "big") / 2**64

    held_out = {file for file in found if number(file) < TEST_SHARE}
    if len(held_out) < MIN_TEST and len(found) >= 2 * MIN_TEST:
        held_out = set(sorted(found, key=number)[:MIN_TEST])
    return held_out


def _digest(folder: str, files: list[_File], texts: dict[str, str] | None) -> str:
    """Return 16 hexadecimal digits that change with a path, a file's size or a caption."""
    digest = hashlib.sha256()
    for file in files:
        size = os.path.getsize(os.path.join(folder, file.name))
        digest.update(os.fsencode(file.name) + f"\0{size}\n".encode())
        if texts is not None:
            digest.update(texts[file.name].encode() + b"\0")
    return digest.hexdigest()[:16]


Result = TypeVar("Result")
Item = TypeVar("Item")


def _in_threads(fn: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    count = min(len(items), 2 * (os.cpu_count() or 1), 32)
    with concurrent.futures.ThreadPoolExecutor(max(count, 1)) as pool:
        return list(pool.map(fn, items))
