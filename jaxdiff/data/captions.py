"""Records with captions, and captions as numbers beside what they are of."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from jaxdiff import checks
from jaxdiff.data.records import Records, check_rows, checked_fields, title_of
from jaxdiff.typing import PyTree

FIELD = "text"


@runtime_checkable
class Captioned(Records, Protocol):
    """Records that can say what each example shows: scenes, or a folder with `metadata.jsonl`."""

    def captions(self, indices: np.ndarray, /) -> list[str]:
        """Return the captions of examples `indices`, int64 (B,) in 0..N-1."""


class Tokenized:
    """Records with their captions as numbers. Made by `tokenized`."""

    def __init__(self, records: Captioned, tokenize: Callable[[Sequence[str]], PyTree]) -> None:
        self._records, self._tokenize = records, tokenize
        self.title = title_of(records)
        self.in_memory = getattr(records, "in_memory", False)

    def __len__(self) -> int:
        return len(self._records)

    def rows(self, indices: np.ndarray) -> dict[str, PyTree]:
        """Return the fields of examples `indices` (B,), and "text": what `tokenize` makes."""
        text = self._tokenize(self._records.captions(indices))
        return {**self._records.rows(indices), FIELD: text}

    def captions(self, indices: np.ndarray) -> list[str]:
        """Return the captions themselves."""
        return self._records.captions(indices)


def tokenized(records: Captioned, tokenize: Callable[[Sequence[str]], PyTree]) -> Tokenized:
    """Add the field "text" to records: their captions, as a model takes them.

        read = data.tokenized(data.load_folder("photos", 64), pretrained.load(folder).tokenizer)

    Args:
        records: with captions.
        tokenize: texts -> array (B, ...) or a tree of them, such as {"tokens": (B, L), "mask":
            (B, L)}; called in the threads that read.

    Returns:
        Records of the same examples, with captions too.

    Raises:
        TypeError: if `records` have no captions, `tokenize` is no function, or it makes no numbers.
        ValueError: if the examples have none, or it does not make a row of each text.
    """
    if not isinstance(records, Captioned):
        raise TypeError(
            "`records` must have captions(indices) -> texts, as scenes and folders with "
            f"metadata.jsonl do; got {checks.shown(records)}."
        )
    checks.function("tokenize", tokenize, "(texts) -> array (B, L) or a tree of arrays", takes=1)
    made = Tokenized(records, tokenize)
    checked_fields("tokenize", {FIELD: tokenize(records.captions(np.arange(1)))})
    check_rows(made)
    return made
