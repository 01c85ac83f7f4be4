"""Captions of a TFDS data set: which of its features they are, and the texts themselves."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxdiff.data.errors import UnreadableError
from jaxdiff.data.images import read_records

NAMES = ("caption", "captions", "text", "texts")
"""Names that mean captions."""
MAX_NAMED = 5
_OF_FILES = re.compile(r"(.*[/_])?(file_?name|path|url|uri|id)s?", re.IGNORECASE)

Path = tuple[str, ...]
"""Keys of a feature, from the record on."""


def find(tfds: Any, name: str, features: Any, wanted: str | None) -> Path | None:
    """Return the feature that holds the captions.

    Args:
        tfds: the module.
        name: of the data set.
        features: of its records.
        wanted: the feature's name, keys joined by slashes; None for the only one there is, by name
            or at all, names of files not counted.

    Returns:
        Its keys; None if none is wanted, and there is none or several.

    Raises:
        ValueError: if `wanted` is no feature of texts.
    """
    found = dict(sorted(_texts(tfds, features, ())))
    if wanted is not None:
        for path in found:
            if "/".join(path) == wanted:
                return path
        said = ", ".join("/".join(path) for path in found) or "none"
        raise ValueError(
            f"`text` must be a feature of {name} that holds texts: {said}; got {wanted!r}."
        )
    likely = [path for path in found if path[-1].lower() in NAMES] or [
        path for path, is_text in found.items() if is_text and not _OF_FILES.fullmatch(path[-1])
    ]
    return likely[0] if len(likely) == 1 else None


class Texts(Sequence[str]):
    """Captions by index, read from the records; of several of one image, the first.

    Args:
        source: records by index.
        path: the keys of their captions.
        title: how messages name the split.
        location: the folder that it is read from.
    """

    def __init__(self, source: Sequence[Any], path: Path, title: str, location: str) -> None:
        self._source, self._path = source, path
        self._title, self._location = title, location

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[str]:
        records = read_records(self._source, indices)
        texts, wrong = [], []
        for index, record in zip(indices, records, strict=True):
            text, problem = _decoded(record, self._path)
            texts.append(text)
            if problem:
                wrong.append(f"example {index}: {problem}")
        if wrong:
            more = f"; and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
            raise UnreadableError(
                f'The captions ("{"/".join(self._path)}") of {self._title} in {self._location} '
                f"cannot be used: {'; '.join(wrong[:MAX_NAMED])}{more}. Prepare the set without "
                "them, or name another feature by `text`."
            )
        return texts


def _texts(tfds: Any, feature: Any, path: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the features that hold a text or one sequence of them, and whether they say so."""
    if isinstance(feature, tfds.features.FeaturesDict):
        for key in feature:
            yield from _texts(tfds, feature[key], (*path, key))
        return
    if isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _texts(tfds, feature, path)
            return
    is_one = isinstance(feature, tfds.features.Tensor) and feature.shape == () and path
    if is_one and np.dtype(feature.np_dtype).kind in "OSU":
        yield path, isinstance(feature, tfds.features.Text)


def _decoded(record: Any, path: Path) -> tuple[str, str | None]:
    """Return the caption of a record, and what is wrong with it."""
    for key in path:
        record = record[key]
    given = np.asarray(record, object).reshape(-1)
    if not given.size:
        return "", "there is none"
    raw = given[0]
    try:
        text = raw.decode() if isinstance(raw, bytes) else str(raw)
    except UnicodeDecodeError as error:
        return "", f"{raw!r:.40} is not UTF-8 ({error.reason})"
    return text, None if text.strip() else f"it is {text!r:.40}, where a text is needed"
