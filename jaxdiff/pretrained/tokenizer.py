"""CLIP's tokenizer, by the tokenizers library: prompts to the numbers of their tokens.

A folder has `tokenizer.json`, or `vocab.json` and `merges.txt`, of which that is made as
transformers makes it. Every prompt becomes L tokens: the one that starts it, its own, the one that
ends it, and then the one that fills up; longer ones are cut.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff import checks, extras
from jaxdiff.pretrained.errors import WeightsError
from jaxdiff.pretrained.files import read_json

__all__ = ["Tokenizer", "missing", "read"]

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
"""What is one word to CLIP (Radford et al. 2021, arXiv:2103.00020, its code)."""
_SPECIAL = {
    "unk_token": "<|endoftext|>",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A function of one prompt or several, which gives their tokens, int32 (B, L).

    Attributes:
        length: L.
        folder: where its files are.
        made: that of the library, which cuts and fills up; None where there are no files, and it
            refuses to make tokens.
    """

    length: int
    folder: Path
    made: Any = dataclasses.field(repr=False)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the tokens of prompts, int32 (B, L).

        Raises:
            TypeError: if a prompt is no text.
            WeightsError: if there are no files.
        """
        found = [encoding.ids for _, encoding in self._encoded(prompts)]
        return np.asarray(found, np.int32).reshape(len(found), self.length)

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Return what is left out of each prompt, since it has more than L tokens.

        Raises:
            TypeError: if a prompt is no text.
            WeightsError: if there are no files.
        """
        left = []
        for prompt, encoding in self._encoded(prompts):
            beyond = [
                start
                for part in encoding.overflowing
                for (start, _), own in zip(part.offsets, part.special_tokens_mask, strict=True)
                if not own
            ]
            left.append(prompt[min(beyond) :] if beyond else "")
        return left

    def _encoded(self, prompts: Sequence[str]) -> list[tuple[str, Any]]:
        """Return each prompt with the library's encoding of it."""
        if self.made is None:
            raise WeightsError(
                f"{self.folder} has no tokenizer: put tokenizer.json, or vocab.json and "
                "merges.txt, there. Or give tokens to `encode`."
            )
        given = checks.texts("prompts", prompts)
        return list(zip(given, self.made.encode_batch(given), strict=True))


def read(folder: Path, length: int | None = None) -> Tokenizer:
    """Read the tokenizer of a folder.

    Args:
        folder: that has its files.
        length: L; by default what its config says, or 77.

    Raises:
        WeightsError: if its files are missing or damaged.
        ImportError: if tokenizers is not installed.
    """
    with extras.needed_by("jaxdiff.pretrained", "pretrained"):
        import tokenizers

    config = _optional(folder / "tokenizer_config.json")
    special = _special(config, _optional(folder / "special_tokens_map.json"))
    whole, vocabulary, merges = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    try:
        if whole.is_file():
            made = tokenizers.Tokenizer.from_file(str(whole))
        elif vocabulary.is_file() and merges.is_file():
            made = _made(tokenizers, vocabulary, merges, special)
        else:
            raise WeightsError(
                f"{folder} holds no tokenizer: it needs tokenizer.json, or vocab.json and "
                "merges.txt."
            )
    except WeightsError:
        raise
    except Exception as error:  # what the library raises is Exception itself
        raise WeightsError(f"{folder} holds no tokenizer that can be read: {error}.") from error
    if length is None:
        length = config.get("model_max_length", 77)
        length = length if isinstance(length, int) and 2 < length < 10**6 else 77
    filling = special["pad_token"]["content"]
    number = made.token_to_id(filling)
    if number is None:
        raise WeightsError(f"{folder}: the token that fills up, {filling!r}, is none of its own.")
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=number, pad_token=filling)

    return Tokenizer(length, folder, made)


def missing(folder: Path) -> Tokenizer:
    """Return what refuses to make tokens, with a WeightsError: there is no tokenizer there."""
    return Tokenizer(0, folder, None)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special(config: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the special tokens as two files give them, each as text or with its options.

    The map beside the config is what counts, as transformers reads it, unless the config lists
    what was added: they differ in the token that fills up for Stable Diffusion 2.
    """
    configs = (config, beside) if "added_tokens_decoder" in config else (beside, config)
    found: dict[str, dict[str, Any]] = {}
    for name, default in _SPECIAL.items():
        given = next((c[name] for c in configs if c.get(name) is not None), default)
        options = dict(given) if isinstance(given, Mapping) else {"content": given}
        if not isinstance(options.get("content"), str):
            raise WeightsError(f"`{name}` of the tokenizer must be text; got {given!r}.")
        known = ("content", "lstrip", "rstrip", "single_word", "normalized")
        found[name] = {key: options[key] for key in known if key in options}
    return found


def _made(tokenizers: Any, vocabulary: Path, merges: Path, special: dict[str, Any]) -> Any:
    numbers = read_json(vocabulary)
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    unknown, start, end = (special[f"{name}_token"]["content"] for name in ("unk", "bos", "eos"))
    absent = [token for token in (start, end) if token not in numbers]
    if absent or any(len(pair) != 2 for pair in pairs):
        raise WeightsError(
            f"{merges} must have two words a line, and {vocabulary} {start!r} and {end!r}."
        )
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=numbers,
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=unknown,
        )
    )
    rules, splits = tokenizers.normalizers, tokenizers.pre_tokenizers
    made.normalizer = rules.Sequence(
        [rules.NFC(), rules.Replace(tokenizers.Regex(r"\s+"), " "), rules.Lowercase()]
    )
    made.pre_tokenizer = splits.Sequence(
        [
            splits.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            splits.ByteLevel(add_prefix_space=False),
        ]
    )
    made.post_processor = tokenizers.processors.RobertaProcessing(
        (end, numbers[end]), (start, numbers[start]), trim_offsets=False, add_prefix_space=False
    )
    made.add_special_tokens([tokenizers.AddedToken(**each) for each in special.values()])
    return made
