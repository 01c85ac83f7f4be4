"""Captions: of a folder by its metadata, of a TFDS set, and as numbers beside the images."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from experiments.common.command import Refusal
from experiments.latents import sources
from experiments.latents.autoencoder import Config
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
    text = b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    (folder / "metadata.jsonl").write_bytes(text + b"\n\n")
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


def test_metadata_may_begin_with_a_mark_of_utf_8_and_end_lines_as_windows_does(tmp_path):
    make(tmp_path)
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in LINES)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode("utf-8-sig"))
    images = data.load_folder(tmp_path, 8, split="all")
    assert images.captions(np.array([0, 3])) == ["a blue square", "ein rotes Quadrat, größer"]


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
        ([*LINES, b"{"], "line 5: no JSON"),
        ([*LINES, b"[1]"], r"line 5: no record, but \[1\]"),
        ([{"file_name": "b.png"}, *LINES[1:]], 'line 1: "text" is missing'),
        ([LINES[0] | {"text": " "}, *LINES[1:]], "line 1: \"text\" is ' ', where a text"),
        ([LINES[0] | {"text": 3}, *LINES[1:]], 'line 1: "text" is 3'),
        ([LINES[0], json.dumps(LINES[1]).encode("latin-1") + b"\xff"], "line 2: not UTF-8"),
        ([LINES[0] | {"text": "\ud83d?"}, *LINES[1:]], 'line 1: "text" has half a character'),
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


# --- TFDS -----------------------------------------------------------------------------------


def prepare(folder, name, features, examples):
    """Prepare a TFDS set of one's own, in the order of its examples, each with a 4x5 image."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Own(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = None

            def _info(self):
                image = tfds.features.Tensor(shape=(4, 5, 3), dtype=np.uint8)
                dictionary = tfds.features.FeaturesDict({"image": image, **features(tfds.features)})
                return tfds.core.DatasetInfo(
                    builder=self, features=dictionary, disable_shuffling=True
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i, example in enumerate(examples):
                    yield i, {"image": np.full((4, 5, 3), i, np.uint8), **example}

    Own.name = name
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=1)
    Own(data_dir=str(folder), file_format="array_record").download_and_prepare(
        download_config=config
    )


CAPTIONS = ["a cat asleep", "ein Hund, größer", "two birds", "a fish"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """One set whose images have a caption each; one of several, as COCO's, and of bad notes."""
    folder = tmp_path_factory.mktemp("captioned")
    prepare(
        folder,
        "each",
        lambda f: {
            "caption": f.Text(),
            "file_name": f.Text(),
            "label": f.ClassLabel(num_classes=2),
        },
        [{"caption": text, "file_name": "x.png", "label": 1} for text in CAPTIONS],
    )
    prepare(
        folder,
        "several",
        lambda f: {
            "captions": f.Sequence({"text": np.str_, "id": np.int64}),
            "more": f.Sequence(f.Text()),
            "notes": f.Text(),
            "remark": {"text": f.Text()},
        },
        [
            {
                "captions": [{"text": text, "id": 3}, {"text": "another", "id": 4}],
                "more": [] if text == "two birds" else [text.upper(), "b"],
                "notes": note,
                "remark": {"text": text[::-1]},
            }
            for text, note in zip(CAPTIONS, ["good", " ", b"gr\xf6\xdfer", ""], strict=True)
        ],
    )
    return folder


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_set_with_a_feature_of_texts_has_captions(sets, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr("jaxdiff.data.images.IN_MEMORY_BYTES", 10)
    images = data.load_images("each", "train[1:]", data_dir=sets)
    assert images.in_memory == in_memory
    assert images.captions(np.array([2, 0])) == ["a fish", "ein Hund, größer"]
    batch = next(data.batches(data.tokenized(images, codes), 2, seed=0))
    chosen = data.batch_indices(3, 2, 0, 0)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], chosen + 1)
    lengths = [len(CAPTIONS[i + 1]) for i in chosen]
    np.testing.assert_array_equal(batch["text"]["length"], lengths)
    np.testing.assert_array_equal(batch["label"], [1, 1])
    named = data.load_images("each", "train", data_dir=sets, text="file_name")
    assert named.captions(np.arange(2)) == ["x.png"] * 2


def test_of_several_captions_the_first_counts(sets):
    for name, wanted in (
        ("captions/text", CAPTIONS),
        ("more", [text.upper() for text in CAPTIONS]),
        ("remark/text", [text[::-1] for text in CAPTIONS]),
    ):
        images = data.load_images("several", "train[:2]", data_dir=sets, text=name)
        assert images.captions(np.arange(2)) == wanted[:2]


def test_where_several_could_be_the_captions_one_must_be_named(sets):
    images = data.load_images("several", "train", data_dir=sets)
    with pytest.raises(ValueError, match=r"several/train has none.*load_images\(..., text=\)"):
        images.captions(np.arange(1))
    said = "`text` must be a feature of several.*: captions/text, more, notes, .*; got 'cap"
    with pytest.raises(ValueError, match=said):
        data.load_images("several", "train", data_dir=sets, text="caption")


def test_a_caption_that_is_no_text_is_named_with_its_index(sets, monkeypatch):
    bad = (
        r"\"notes\".*of several/train.*example 1: it is ' '.*; example 2: .* is not UTF-8.*; ex.* 3"
    )
    images = data.load_images("several", "train", data_dir=sets, text="notes")
    with pytest.raises(data.UnreadableError, match=bad):
        images.captions(np.array([0]))  # in memory: all are read
    with pytest.raises(data.UnreadableError, match="example 2: there is none"):
        data.load_images("several", "train", data_dir=sets, text="more").captions(np.array([0]))
    monkeypatch.setattr("jaxdiff.data.images.IN_MEMORY_BYTES", 10)
    images = data.load_images("several", "train", data_dir=sets, text="notes")
    assert images.captions(np.array([0, 0])) == ["good", "good"]
    with pytest.raises(data.UnreadableError, match=r"used: example 3: it is '', where"):
        images.captions(np.array([0, 3]))


def encoded(image, kind):
    image.save(file := io.BytesIO(), kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A set of captioned images of many sizes and modes, and a folder of the same files."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)

    def made(height, width, mode="RGB"):
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)

    files = [
        encoded(made(9, 4), "PNG"),
        encoded(made(20, 31), "JPEG"),
        encoded(made(7, 7, "L"), "PNG"),
        encoded(made(12, 5, "P"), "PNG"),
        encoded(made(6, 8, "CMYK"), "JPEG"),
        encoded(made(5, 6, "RGBA"), "PNG"),
    ]
    texts = [f"picture {i}" for i in range(len(files))]
    (folder / "files").mkdir()
    for i, file in enumerate(files):
        (folder / "files" / str(i)).write_bytes(file)
    examples = [{"image": f, "caption": t} for f, t in zip(files, texts, strict=True)]
    prepare(folder, "photos", lambda f: {"image": f.Image(), "caption": f.Text()}, examples)
    return folder, texts


@pytest.mark.parametrize("memory_limit", [None, 0])
def test_a_set_of_images_of_many_sizes_is_what_a_folder_of_them_is(photos, memory_limit):
    folder, texts = photos
    images = data.load_images("photos", "train", data_dir=folder, image_size=6)
    images = dataclasses.replace(images, memory_limit=memory_limit)
    wanted = data.load_folder(folder / "files", 6, split="all")
    assert images.shape == wanted.shape == (6, 6, 3)
    rows = np.arange(len(texts))
    np.testing.assert_array_equal(images.rows(rows)["image"], wanted.levels)
    assert images.captions(rows) == texts


def test_images_of_one_size_may_be_resized_too(sets):
    images = data.load_images("each", "train", data_dir=sets, image_size=2)
    assert images.shape == (2, 2, 3)
    np.testing.assert_array_equal(images.levels[:, 0, 1, 0], np.arange(4))
    np.testing.assert_array_equal(images.labels, 1)


def test_images_of_many_sizes_need_one(photos, tmp_path):
    with pytest.raises(ValueError, match="`image_size` must be given for photos"):
        data.load_images("photos", "train", data_dir=photos[0])
    with pytest.raises(ValueError, match="`image_size` must be at least 1"):
        data.load_images("photos", "train", data_dir=photos[0], image_size=0)
    with pytest.raises(ValueError, match="`image_size` must be left out for digits: .* 17 levels"):
        data.load_images("digits", "train", image_size=16)
    config = Config(data="photos", data_dir=str(photos[0]))
    with pytest.raises(Refusal, match="--image-size: `image_size` must be given"):
        sources.open_pictures(config, "train")
    opened = sources.open_pictures(dataclasses.replace(config, image_size=8), "train")
    assert sources.shape_of(opened) == (8, 8, 3)
    assert opened.captions(np.array([1])) == ["picture 1"]


def test_a_set_without_a_split_that_judges_is_told_of_before_training(photos, capsys):
    config = Config(data="photos", data_dir=str(photos[0]), image_size=8)
    with pytest.raises(Refusal, match="--eval-split: `split` must be one of train of photos"):
        sources.open_held_out(config)
    held_out = sources.open_held_out(dataclasses.replace(config, eval_split="train[3:]"))
    assert held_out.captions(np.array([0])) == ["picture 3"]
    assert "judges by images trained on" in capsys.readouterr().err
    with pytest.raises(Refusal, match="--eval-split must be left out for scenes"):
        sources.placed(Config(eval_split="val"))


# --- As numbers -----------------------------------------------------------------------------


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
