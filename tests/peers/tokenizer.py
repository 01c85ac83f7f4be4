"""What transformers' tokenizer of CLIP makes of prompts. See `common` for how to run it."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from peers.common import Golden, main
from transformers import CLIPTokenizer

MERGES = [
    "t h",
    "th e</w>",
    "i n",
    "in g</w>",
    "c a",
    "ca t</w>",
    "Ã ©",
    "1 2</w>",
    "a n",
    "! !</w>",
]
PROMPTS = [
    "The cat",
    "  a cat's\tTHING, it'll  be nothing ",
    "",
    "café — cafe\u0301, 日本 \U0001f408!!",
    "12 cats<|endoftext|> after it <|startoftext|>",
    "wow! a cat !",
    "the cat " * 60,
    "naïve\n\x00text’s 3rd",
]


def vocabulary() -> dict[str, int]:
    """Number the bytes' letters, those that end words, what is merged, and the special tokens."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in MERGES]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def tokens(seed: int, larger: int) -> Golden:
    end = {"__type": "AddedToken", "content": "<|endoftext|>", "normalized": True}
    start = {**end, "content": "<|startoftext|>"}
    special = {"bos_token": start, "eos_token": end, "unk_token": end}
    cases = {
        "sd1": {**special, "pad_token": "<|endoftext|>", "model_max_length": 77},
        "sd2": {**special, "pad_token": "!", "model_max_length": 77},
        "short": {**special, "pad_token": "<|endoftext|>", "model_max_length": 9 + larger + seed},
    }
    cases["published_sd2"] = cases["sd1"]
    config: dict[str, Any] = {"merges": MERGES, "vocab": vocabulary(), "prompts": PROMPTS}
    config["published_sd2.map"] = {**special, "pad_token": "!"}  # it differs, and is what counts
    arrays = {}
    for name, options in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            contents = {
                "vocab.json": json.dumps(vocabulary()),
                "merges.txt": "#version: 0.2\n" + "\n".join(MERGES) + "\n",
                "tokenizer_config.json": json.dumps(options),
            }
            if f"{name}.map" in config:
                contents["special_tokens_map.json"] = json.dumps(config[f"{name}.map"])
            for file, content in contents.items():
                Path(folder, file).write_text(content, encoding="utf-8")
            made = CLIPTokenizer.from_pretrained(folder)
            found = made(PROMPTS, padding="max_length", truncation=True)
            made.save_pretrained(folder)
            config[f"{name}.json"] = json.loads(Path(folder, "tokenizer.json").read_text())
        config[name] = options
        arrays[name] = np.asarray(found["input_ids"], np.int32)
    return Golden(config, {}, seed, arrays)


if __name__ == "__main__":
    main({"tokenizer": tokens})
