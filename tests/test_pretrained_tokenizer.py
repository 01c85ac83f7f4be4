"""Prompts become the tokens that transformers makes of them."""

import json

import numpy as np
import pytest
from peers import common

from jaxdiff.pretrained import tokenizer
from jaxdiff.pretrained.errors import WeightsError

GOLDEN = common.read("tokenizer")
CONFIG = GOLDEN.config


def written(folder, **contents):
    """A folder of files; a dict is one of JSON."""
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
    return folder


def files(case):
    return {
        "vocab__json": CONFIG["vocab"],
        "merges__txt": "#version: 0.2\n" + "\n".join(CONFIG["merges"]) + "\n",
        "tokenizer_config__json": CONFIG[case],
        **({"special_tokens_map__json": CONFIG[f"{case}.map"]} if f"{case}.map" in CONFIG else {}),
    }


@pytest.mark.parametrize("case", GOLDEN.arrays)
@pytest.mark.parametrize("form", ["in parts", "whole", "split"])
def test_tokens_are_those_of_transformers(tmp_path, case, form):
    contents = files(case)
    if form == "whole":
        del contents["vocab__json"], contents["merges__txt"]
        contents["tokenizer__json"] = CONFIG[f"{case}.json"]
    if form == "split":
        options = dict(CONFIG[case])
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        own = {name: options.pop(name) for name in names}
        contents["special_tokens_map__json"] = own | CONFIG.get(f"{case}.map", {})
        contents["tokenizer_config__json"] = options
    found = tokenizer.read(written(tmp_path, **contents))(CONFIG["prompts"])
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, GOLDEN.arrays[case])


def test_one_prompt_or_none_has_the_same_form(tmp_path):
    tokenize = tokenizer.read(written(tmp_path, **files("sd1")), 9)
    np.testing.assert_array_equal(tokenize("The cat"), tokenize(["The cat"]))
    assert tokenize([]).shape == (0, 9)
    with pytest.raises(TypeError, match="`prompts` must be texts; got 3"):
        tokenize(["a", 3])


def test_what_does_not_fit_is_known_as_it_was_written(tmp_path):
    tokenize = tokenizer.read(written(tmp_path, **files("sd1")), 5)
    assert tokenize.cut(["The  cat", "The cat  THE  Cat the"]) == ["", "Cat the"]
    assert tokenize.cut("the " * 20) == ["the " * 17]
    tokens = tokenize(["The cat  THE  Cat the", "the cat the"])
    np.testing.assert_array_equal(tokens[0], tokens[1])


def test_what_is_no_tokenizer_is_said(tmp_path):
    with pytest.raises(WeightsError, match=r"it needs tokenizer.json, or vocab.json and merges"):
        tokenizer.read(tmp_path)
    with pytest.raises(WeightsError, match=r"put tokenizer.json"):
        tokenizer.missing(tmp_path)(["a"])
    contents = files("sd1")
    for change, match in (
        ({"merges__txt": "a b c"}, "two words a line"),
        ({"merges__txt": "zz zz"}, "can be read"),
        ({"vocab__json": {"a": 1}}, "startoftext"),
        ({"vocab__json": "{"}, "no JSON"),
        ({"tokenizer__json": "{}"}, "can be read"),
        ({"tokenizer_config__json": {"pad_token": 3}}, "`pad_token` of the tokenizer"),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        with pytest.raises(WeightsError, match=match):
            tokenizer.read(written(folder, **(contents | change)))
