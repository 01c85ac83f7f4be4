"""Captions: of a folder by its metadata, and as numbers beside the images."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxdiff import data

LINES = [
    {"file_name": "b.png", "text": "a blue square"},
    {"file_name": "more/a.png", "text": "ein rotes Quadrat, größer", "extra": 1},
    {"file_name": "c.png", "text": "a green square"},
    {"file_name": "./d.png", "text": "a grey square"},
]


def make(folder, lines=LINES, files=("b.png", "more/a.png", "c.png", "d.png")):
    for number, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (12, 10), (60 * number, 0, 0)).save(path)
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    (folder / "metadata.jsonl").write_text(text + "\n\n", encoding="utf-8")
    return folder


def codes(texts):
    """A text's length and its first letters."""
    tokens = np.array([[ord(letter) for letter in text[:3]] for text in texts], np.int32)
    return {"tokens": tokens, "length": np.array([len(text) for text in texts])}


def test_a_folder_with_metadata_has_captions_and_no_classes(tmp_path):
    images = data.load_folder(make(tmp_path), 8, split="all")
    assert images.paths == ("b.png", "c.png", "d.png", "more/a.png")
    assert images.num_classes is None
    assert images.captions(np.array([3, 0])) == ["ein rotes Quadrat, größer", "a blue square"]
    assert images.rows(np.array([3]))["image"][0, 0, 0, 0] == 60  # the second file that was made


def test_each_split_has_its_own_captions(tmp_path):
    make(tmp_path)
    parts = [data.load_folder(tmp_path, 8, split=split) for split in ("train", "test")]
    assert sorted(path for part in parts for path in part.paths) == sorted(
        ["b.png", "c.png", "d.png", "more/a.png"]
    )
    texts = {line["file_name"].removeprefix("./"): line["text"] for line in LINES}
    for part in parts:
        assert part.captions(np.arange(2)) == [texts[path] for path in part.paths]


def test_contents_are_told_apart_by_captions_too(tmp_path):
    before = data.load_folder(make(tmp_path), 8, split="all").contents
    assert data.load_folder(tmp_path, 8, split="all").contents == before
    make(tmp_path, [LINES[0] | {"text": "a blue squarf"}, *LINES[1:]])
    assert data.load_folder(tmp_path, 8, split="all").contents != before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*LINES, "{"], "line 5: no JSON"),
        ([*LINES, "[1]"], r"line 5: no record, but \[1\]"),
        ([{"file_name": "b.png"}, *LINES[1:]], 'line 1: "text" is missing'),
        ([LINES[0] | {"text": " "}, *LINES[1:]], "line 1: \"text\" is ' ', where a text"),
        ([LINES[0] | {"text": 3}, *LINES[1:]], 'line 1: "text" is 3'),
        ([{"text": "a"}, *LINES], 'line 1: "file_name" is missing'),
        ([*LINES, LINES[0]], "line 5: b.png has a caption already"),
        ([*LINES, {"file_name": "e.png", "text": "a"}], "line 5: there is no file e.png"),
        ([*LINES, {"file_name": "../e.png", "text": "a"}], "line 5: ../e.png is outside"),
        (LINES[1:], "metadata.jsonl has no line for b.png. Add what is missing"),
        ([], "names no image"),
        ([{"file_name": f"{i}", "text": "a"} for i in range(9)], "line 5: .* and 4 more"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        data.load_folder(make(tmp_path, lines), 8)


def test_captions_become_numbers_beside_the_images(tmp_path):
    images = data.load_folder(make(tmp_path), 8, split="all")
    read = data.tokenized(images, codes)
    assert len(read) == 4
    assert read.captions(np.array([1])) == ["a green square"]
    batch = next(data.batches(read, 3, seed=0))
    chosen = data.batch_indices(4, 3, 0, 0)
    np.testing.assert_array_equal(batch["image"], images.rows(chosen)["image"])
    np.testing.assert_array_equal(
        batch["text"]["length"], [len(text) for text in images.captions(chosen)]
    )


def test_what_has_no_captions_is_refused():
    images = data.Images.from_arrays(np.zeros((3, 4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="`captions` must be given: arrays/all has none"):
        data.tokenized(images, codes)
    with pytest.raises(TypeError, match=r"`records` must have captions\(indices\)"):
        data.tokenized(data.from_arrays({"x": np.zeros((3, 2))}), codes)


def test_what_makes_no_numbers_is_refused():
    made = data.scenes.Scenes(3)
    with pytest.raises(TypeError, match="`tokenize.*` must hold numbers"):
        data.tokenized(made, lambda texts: np.array(texts))
    with pytest.raises(ValueError, match="must give one row for each index"):
        data.tokenized(made, lambda texts: np.zeros((len(texts) + 1, 2)))
