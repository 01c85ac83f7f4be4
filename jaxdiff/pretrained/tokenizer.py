"""CLIP's tokenizer, by the tokenizers library: prompts to the numbers of their tokens.

A folder has `tokenizer.json`, or `vocab.json` and `merges.txt`, of which that is made as
transformers makes it. Every prompt becomes L tokens: the one that starts it, its own, the one that
ends it, and then the one that fills up; longer ones are cut.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxdiff import extras
from jaxdiff.pretrained.errors import WeightsError
from jaxdiff.pretrained.files import read_json

__all__ = ["Tokenize", "missing", "read"]

Tokenize: TypeAlias = Callable[[Sequence[str]], np.ndarray]
"""Prompts to their tokens, int32 (B, L)."""

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


def read(folder: Path, length: int | None = None) -> Tokenize:
    """Read the tokenizer of a folder; what it gives refuses prompts that are no text (TypeError).

    Args:
        folder: that has its files.
        length: L; by default what its config says, or 77.

    Returns:
        A function of one prompt or several, which gives int32 (B, L).

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

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        """Return the tokens of prompts, int32 (B, L).

        Raises:
            TypeError: if a prompt is no text.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"`prompts` must be texts; got {prompt!r}.")
        found = [encoding.ids for encoding in made.encode_batch(prompts)]
        return np.asarray(found, np.int32).reshape(len(prompts), length)

    return tokenize


def missing(folder: Path) -> Tokenize:
    """Return what refuses to make tokens, with a WeightsError: there is no tokenizer there."""

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        raise WeightsError(
            f"{folder} has no tokenizer: put tokenizer.json, or vocab.json and merges.txt, there. "
            "Or give tokens to `encode`."
        )

    return tokenize


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special(*configs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the special tokens as configs give them, each as text or with its options."""
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
