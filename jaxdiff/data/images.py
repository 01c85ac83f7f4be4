"""The records that an opened split of images is."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdiff.data.description import Description
from jaxdiff.data.errors import UnreadableError
from jaxdiff.data.scaling import bin_width

IN_MEMORY_BYTES = 2**30
CHUNK = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """One split of a data set of equally sized images: `Records` of "image" and "label".

    Made by `load_images`, `load_folder` or `Images.from_arrays`. Up to 1 GiB of pixels are read
    into memory when first needed; larger splits are read record by record, as any is after
    ``dataclasses.replace(images, memory_limit=0)``.

    Attributes:
        name: of the data set, such as "digits".
        split: such as "train" or "train[:90%]".
        num_examples: N.
        shape: (H, W, C) of an image.
        num_levels: L; pixels are integers in 0..L-1.
        num_classes: K, labels being 0..K-1; None where the examples have no labels.
        source: records by index, a mapping with "image" uint8 (H, W, C) and, with labels, "label".
        location: the folder that it is read from.
        class_names: K names of the classes, where they are known.
        contents: a digest of what a folder holds, by which another content is told; or None.
        paths: of the files of a folder within it, N; or None.
        texts: N captions, in memory or read by index, or None.
        memory_limit: how many bytes of pixels are kept in memory; None for 1 GiB.
    """

    name: str
    split: str
    num_examples: int
    shape: tuple[int, int, int]
    num_levels: int
    num_classes: int | None
    source: Sequence[Any] = dataclasses.field(repr=False)
    location: str = "memory"
    class_names: tuple[str, ...] | None = None
    contents: str | None = None
    paths: tuple[str, ...] | None = dataclasses.field(default=None, repr=False)
    texts: Sequence[str] | None = dataclasses.field(default=None, repr=False)
    memory_limit: int | None = None

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        num_levels: int = 256,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        name: str = "arrays",
        split: str = "all",
    ) -> "Images":
        """Wrap arrays that are already in memory.

        Args:
            images: uint8 levels, shape (N, H, W, C).
            labels: integers in 0..K-1, shape (N,), or None.
            num_levels: L, 2..256.
            num_classes: K; by default the largest label plus one, or as many as there are names.
            class_names: K names of the classes, or None.
            name: shown in messages.
            split: shown in messages.

        Raises:
            TypeError: if `images` is not uint8 or `labels` does not hold integers.
            ValueError: if the shapes do not fit, there is no image, or a value is out of range.
        """
        bin_width(num_levels)
        images = np.asarray(images)
        if num_classes is None and class_names is not None:
            num_classes = len(class_names)
        if images.dtype != np.uint8:
            raise TypeError(f"`images` must be uint8 levels; got {images.dtype}.")
        if images.ndim != 4 or images.size == 0:
            raise ValueError(f"`images` must have shape (N, H, W, C), none 0; got {images.shape}.")
        if images.max() >= num_levels:
            raise ValueError(
                f"`images` must hold levels in 0..{num_levels - 1}; got {images.max()}. "
                "Is `num_levels` right?"
            )
        if labels is None:
            if num_classes is not None:
                raise ValueError(f"`num_classes` is {num_classes}, but there are no `labels`.")
        else:
            labels, num_classes = _checked_labels(labels, len(images), num_classes)
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"`class_names` must be as many as the {num_classes} classes; "
                f"got {len(class_names)}."
            )
        opened = cls(
            name=name,
            split=split,
            num_examples=len(images),
            shape=(images.shape[1], images.shape[2], images.shape[3]),
            num_levels=num_levels,
            num_classes=num_classes,
            source=(),
            class_names=None if class_names is None else tuple(class_names),
        )
        # What `arrays` would read from the source; a cached property keeps its value here.
        vars(opened)["arrays"] = _read_only(images, labels)
        return opened

    def __len__(self) -> int:
        return self.num_examples

    @property
    def title(self) -> str:
        """How messages name it, such as "digits/train"."""
        return f"{self.name}/{self.split}"

    @property
    def description(self) -> Description:
        """What the images are, for a record."""
        return Description(self.shape, self.num_levels, self.num_classes, self.class_names)

    @property
    def bin_width(self) -> float:
        """Return the width 2/L of a level in [-1, 1]."""
        return bin_width(self.num_levels)

    @property
    def in_memory(self) -> bool:
        """Tell whether `rows` gathers from memory (reading all of it at the first call)."""
        num_bytes = self.num_examples * int(np.prod(self.shape))
        limit = IN_MEMORY_BYTES if self.memory_limit is None else self.memory_limit
        return "arrays" in vars(self) or num_bytes <= limit

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """All (levels uint8 (N, H, W, C), labels int32 (N,) or None), read-only, read once.

        Raises:
            UnreadableError: a ValueError, if the files are damaged or the records do not fit the
                description above.
        """
        levels = np.empty((self.num_examples, *self.shape), np.uint8)
        labels = None if self.num_classes is None else np.empty(self.num_examples, np.int32)
        for start in range(0, self.num_examples, CHUNK):
            rows = np.arange(start, min(start + CHUNK, self.num_examples))
            levels[rows], some = self._read(rows)
            if labels is not None and some is not None:
                labels[rows] = some
        return _read_only(levels, labels)

    @property
    def levels(self) -> np.ndarray:
        """All images, uint8 (N, H, W, C)."""
        return self.arrays[0]

    @property
    def labels(self) -> np.ndarray | None:
        """All labels, int32 (N,), or None."""
        return self.arrays[1]

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return examples `indices` (B,) as they are read.

        Returns:
            {"image": uint8 levels (B, H, W, C), "label": int32 (B,)}, without "label" where the
            images have none.

        Raises:
            UnreadableError: a ValueError, if the files are damaged or the records do not fit the
                description above.
        """
        levels, labels = self._at(indices) if self.in_memory else self._read(indices)
        return {"image": levels} if labels is None else {"image": levels, "label": labels}

    def captions(self, indices: np.ndarray) -> list[str]:
        """Return the captions of examples `indices` (B,).

        Raises:
            UnreadableError: a ValueError, if files are damaged or one is no text, with its index.
            ValueError: if the examples have none.
        """
        if self.texts is None:
            raise ValueError(
                f"`captions` must be given: {self.title} has none. A folder gives them in "
                'metadata.jsonl, a line {"file_name": ..., "text": ...} for each image; a TFDS set '
                "by a feature of texts, which load_images(..., text=) names where several could be."
            )
        if self.in_memory:
            return [self._captions[int(i)] for i in indices]
        return read_records(self.texts, [int(i) for i in indices])

    @functools.cached_property
    def _captions(self) -> tuple[str, ...]:
        """All captions, read once."""
        texts = self.texts or ()
        chunks = (range(i, min(i + CHUNK, len(texts))) for i in range(0, len(texts), CHUNK))
        return tuple(text for chunk in chunks for text in read_records(texts, chunk))

    def _at(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        levels, labels = self.arrays
        return levels[indices], None if labels is None else labels[indices]

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Read records from the source, many at once where it can."""
        records = read_records(self.source, [int(i) for i in indices])
        levels = np.stack([record["image"] for record in records])
        if levels.shape[1:] != self.shape or levels.max() >= self.num_levels:
            raise UnreadableError(
                f"{self.title} should hold images of shape {self.shape} and levels in "
                f"0..{self.num_levels - 1}; got shape {levels.shape[1:]}, level {levels.max()}."
            )
        if self.num_classes is None:
            return levels, None
        labels = np.asarray([record["label"] for record in records])
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise UnreadableError(
                f"{self.title} should hold labels in 0..{self.num_classes - 1}; got "
                f"{labels.min()}..{labels.max()}. Is it a split without labels? Take another."
            )
        return levels, labels.astype(np.int32)


def read_records(source: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    """Read records by index from a source, many at once where it can."""
    many = getattr(source, "__getitems__", None)
    return [source[i] for i in indices] if many is None else list(many(list(indices)))


def _checked_labels(
    labels: np.ndarray, num_examples: int, num_classes: int | None
) -> tuple[np.ndarray, int]:
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"`labels` must hold integers; got {labels.dtype}.")
    if labels.shape != (num_examples,):
        raise ValueError(f"`labels` must have shape ({num_examples},); got {labels.shape}.")
    if num_classes is None:
        num_classes = int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"`labels` must lie in 0..{num_classes - 1}; got {labels.min()}..{labels.max()}."
        )
    return labels.astype(np.int32), num_classes


def _read_only(
    levels: np.ndarray, labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return views that refuse writing: every reader shares these arrays."""
    levels = levels.view()
    levels.flags.writeable = False
    if labels is not None:
        labels = labels.view()
        labels.flags.writeable = False
    return levels, labels
