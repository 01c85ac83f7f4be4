"""A tokenizer of one's own, learned of the texts that a model is told by.

Texts are put into Unicode's form NFKC and lower case; a space goes before them, so that a word is
the same at the start as elsewhere. Their UTF-8 bytes are tokens, and so are those pairs of tokens
that follow each other most often, one pair after the other (byte-pair encoding). Any text has
tokens, then, and is told by them. Token 0 stands for none, behind the mask.

Source: Sennrich et al. 2016 (arXiv:1508.07909), section 3.2, on bytes as Wang et al. 2019
(arXiv:1909.03341) have it; pairs do not cross the words of GPT-2's code.
"""

import dataclasses
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdiff import checks, extras

__all__ = ["Tokenizer", "learn_tokenizer"]

KIND = "byte-level BPE, NFKC, lower case"
"""What a record says that it is of."""
NUM_BYTES = 256
SPACE = " "
"""What goes before every text."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A function of texts that gives their tokens and mask. Made by `learn_tokenizer`.

    Two are equal where their records are.

    Attributes:
        merges: the pairs that are tokens, in the order in which they are put together; a byte is
            one character, as in GPT-2's code.
        length: L, the number of tokens that a text may have.

    Raises:
        TypeError: if `length` is no whole number.
        ValueError: if it is below 1, or the pairs are none.
        ImportError: if tokenizers is not installed.
    """

    merges: tuple[tuple[str, str], ...] = dataclasses.field(repr=False)
    length: int
    _made: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checks.count("length", self.length)
        object.__setattr__(self, "_made", _made(self.merges))

    @property
    def num_tokens(self) -> int:
        """The size of the vocabulary: tokens are in 0..num_tokens - 1."""
        return 1 + self._made.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the tokens of texts.

        Args:
            texts: B of them, or one. The empty text has no tokens.

        Returns:
            {"tokens": int32 (B, L), "mask": bool (B, L)}, true where there is a token and 0
            elsewhere: the value of :class:`jaxdiff.nn.Texts`.

        Raises:
            TypeError: if one is no text.
            ValueError: if one has more than L tokens, or is no Unicode.
        """
        found = [(text, _numbers(self._made, text)) for text in checks.texts("texts", texts)]
        tokens = np.zeros((len(found), self.length), np.int32)
        for row, (text, numbers) in enumerate(found):
            if len(numbers) > self.length:
                raise ValueError(
                    f"`texts` must have at most {self.length} tokens each; {text!r} has "
                    f"{len(numbers)}. Shorten it, or learn a tokenizer of a greater `length`."
                )
            tokens[row, : len(numbers)] = numbers
        return {"tokens": tokens, "mask": tokens > 0}

    def decode(self, tokens: Any) -> list[str]:
        """Return the texts of tokens (B, L), as they were after NFKC and in lower case.

        Bytes that are no Unicode, as texts that are cut have, are shown as U+FFFD.

        Raises:
            TypeError: if they are no integers.
            ValueError: if their shape is another, or one is not of the vocabulary.
        """
        rows = np.asarray(checks.whole_numbers("tokens", tokens, self.num_tokens))
        if rows.ndim != 2:
            raise ValueError(f"`tokens` must have shape (B, L); got {rows.shape}.")
        texts = [self._made.decode(row[row > 0].tolist()) for row in rows]
        return [text.removeprefix(SPACE) for text in texts]

    def to_record(self) -> dict[str, Any]:
        """Return what it is as JSON holds it, a few kB."""
        return {"kind": KIND, "length": self.length, "merges": [" ".join(m) for m in self.merges]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Tokenizer":
        """Make the tokenizer of a record.

        Raises:
            ValueError: if it is none of :meth:`to_record`.
            ImportError: if tokenizers is not installed.
        """
        names = {"kind", "length", "merges"}
        if not isinstance(record, Mapping) or set(record) != names or record["kind"] != KIND:
            raise ValueError(
                f"`record` must be what Tokenizer.to_record() gave, of kind {KIND!r}; "
                f"got {checks.shown(record)}."
            )
        return cls(_pairs(record["merges"]), record["length"])


def learn_tokenizer(
    texts: Iterable[str], *, num_tokens: int = 512, length: int | None = None
) -> Tokenizer:
    """Learn a tokenizer of texts; the same of the same, wherever it runs.

        tokenizer = data.learn_tokenizer(captions)
        conditioning = nn.Texts(tokenizer.num_tokens, length=tokenizer.length)

    Args:
        texts: such as all captions of the training data.
        num_tokens: the greatest size of the vocabulary, 257 at least: none, and every byte. It is
            smaller where no pair is left that occurs twice.
        length: L, the number of tokens that a text may have; that of the longest unless given.

    Returns:
        A function of texts.

    Raises:
        TypeError: if one is no text, or a size no whole number.
        ValueError: if there are none, one is no Unicode or has more than `length` tokens, or a
            size is too small.
        ImportError: if tokenizers is not installed.
    """
    checks.count("num_tokens", num_tokens, 1 + NUM_BYTES)
    given = checks.texts("texts", texts)
    if not given:
        raise ValueError("`texts` must hold at least one text; got none.")
    tokenizers = _library()
    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_tokens - 1,
        min_frequency=2,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(map(_normal, given), trainer)
    merges = _pairs(json.loads(learned.to_str())["model"]["merges"])
    made, distinct = _made(merges), list(dict.fromkeys(given))
    longest = max(len(_numbers(made, text)) for text in distinct)
    tokenizer = Tokenizer(merges, max(longest, 1) if length is None else length)
    if longest > tokenizer.length:
        tokenizer(distinct)  # refuses the text
    return tokenizer


def _library() -> Any:
    with extras.needed_by("jaxdiff.data.learn_tokenizer", "pretrained"):
        import tokenizers
    return tokenizers


def _normal(text: str) -> str:
    """Return a text as it is read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"`texts` must be Unicode; got {text!r}.") from None
    return SPACE + unicodedata.normalize("NFKC", text).lower()


def _numbers(made: Any, text: str) -> list[int]:
    """Return the tokens of one text."""
    normal = _normal(text)
    # Not encode_batch: for short texts it is no faster, and it leaves threads behind.
    return made.encode(normal).ids if normal != SPACE else []


def _pairs(merges: Any) -> tuple[tuple[str, str], ...]:
    """Return pairs of texts, each of which may be one text with a space between."""
    try:
        found = [each.split(" ") if isinstance(each, str) else each for each in merges]
        return tuple((str(first), str(second)) for first, second in found)
    except (TypeError, ValueError):
        raise ValueError(
            "`merges` of a tokenizer must be pairs of tokens with a space between."
        ) from None


def _made(merges: tuple[tuple[str, str], ...]) -> Any:
    """Return the library's tokenizer, whose tokens are counted from 1."""
    tokenizers = _library()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    # Different pairs may make the same token.
    names = dict.fromkeys([*alphabet, *(first + second for first, second in merges)])
    vocabulary = {name: number for number, name in enumerate(names, 1)}
    try:
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=list(merges)))
    except Exception as error:  # what the library raises is Exception itself
        raise ValueError(
            f"`merges` of a tokenizer do not follow from each other: {error}."
        ) from None
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made
