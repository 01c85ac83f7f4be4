"""A folder of images: what is read, what is refused, and a model of it by the command line."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest
from digits_cases import run
from PIL import Image

from experiments.common.command import Refusal
from experiments.images import report
from experiments.images import sample_folders as streaming
from experiments.images.model import PRESETS, open_images
from jaxdiff import data
from jaxdiff.data import decoding
from jaxdiff.training import throughput
from jaxdiff.training.export import import_params

MODES = ("RGB", "L", "RGBA", "LA", "P", "1", "I;16", "CMYK")
FOLDERS = ("bird", "cat", "dog")


def picture(number, mode):
    """An image of a size of its own: a gradient of a colour that says its class."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(9, 40, 2)
    levels = np.linspace(0, 255, height)[:, None, None] * np.ones((1, width, 3))
    levels[..., number % 3] = 255
    image = Image.fromarray(levels.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    if mode == "P":
        return image.quantize(16)
    return image.convert(mode)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    image.save(path, **lossless)
    return path


def make_folder(folder, count, classes=FOLDERS):
    """Images of every mode and kind of file, in classes; return the folder."""
    for number in range(count):
        mode = MODES[number % len(MODES)]
        ending = {"CMYK": "jpg", "RGBA": "webp"}.get(mode, "png")
        save(picture(number, mode), folder / classes[number % 3] / f"{number:05d}.{ending}")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("photos"), 48)


def only(path, **options):
    """Read the one image of a folder as (H, W, C)."""
    return data.load_folder(path, **{"image_size": 8, "split": "all"} | options).levels[0]


# --- What is read ---------------------------------------------------------------------------


def test_a_folder_of_any_modes_and_sizes_is_opened(folder):
    images = data.load_folder(folder, 8, split="all")
    assert images.shape == (8, 8, 3)
    assert (images.num_levels, images.num_classes, images.class_names) == (256, 3, FOLDERS)
    assert len(images) == 48
    names = sorted(f"{path.parent.name}/{path.name}" for path in folder.rglob("*.*"))
    wanted = [FOLDERS.index(name.split("/")[0]) for name in names]
    np.testing.assert_array_equal(images.labels, wanted)
    assert images.title == f"{folder.name}/all"
    assert isinstance(images, data.Records)


def test_splits_part_a_folder_and_do_not_move_when_it_grows(tmp_path):
    def names(split):
        opened = data.load_folder(tmp_path, 4, split=split)
        return {os.path.relpath(path, tmp_path) for path in opened.source._paths}

    for number in range(60):
        save(Image.new("L", (4, 4), number), tmp_path / f"{number}.png")
    train, test = names("train"), names("test")
    assert (len(train | test), train & test) == (60, set())
    by_hand = {
        name
        for name in os.listdir(tmp_path)
        if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 < 0.1
    }
    assert test == by_hand
    assert test
    for number in range(60, 90):
        save(Image.new("L", (4, 4), number), tmp_path / f"{number}.png")
    assert train < names("train")
    assert test <= names("test")


def test_a_small_folder_holds_two_out(tmp_path):
    numbers = {
        n: int.from_bytes(hashlib.sha256(f"{n}.png".encode()).digest()[:8], "big") / 2**64
        for n in range(40)
    }
    few = [n for n in numbers if numbers[n] >= 0.1][:6]
    for n in few:
        save(Image.new("L", (4, 4), n), tmp_path / f"{n}.png")
    held_out = data.load_folder(tmp_path, 4, split="test").levels[:, 0, 0, 0].tolist()
    assert sorted(held_out) == sorted(sorted(few, key=numbers.__getitem__)[:2])
    assert len(data.load_folder(tmp_path, 4)) == 4


def test_a_folder_beyond_memory_gives_the_same_batches_image_by_image(folder, monkeypatch):
    images = data.load_folder(folder, 8)
    in_memory = [next(data.batches(images, 8, seed=s)) for s in range(2)]
    monkeypatch.setattr("jaxdiff.data.images.IN_MEMORY_BYTES", 10)
    images = data.load_folder(folder, 8)
    assert not images.in_memory
    for seed, wanted in enumerate(in_memory):
        reader = data.batches(images, 8, seed=seed)
        jax.tree.map(np.testing.assert_array_equal, next(reader), wanted)
        reader.close()


def test_images_lie_where_pillow_puts_them_resized_and_cropped(tmp_path):
    rng = np.random.default_rng(0)
    for number, size in enumerate(((20, 31), (57, 23), (8, 8), (5, 9))):
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
        save(image, tmp_path / str(number) / "a.png")
        scale = 8 / min(size)
        whole = image.resize([round(side * scale) for side in size], Image.Resampling.LANCZOS)
        left, top = ((side - 8) // 2 for side in whole.size)
        wanted = np.asarray(whole.crop((left, top, left + 8, top + 8))).astype(int)
        np.testing.assert_array_equal(only(tmp_path / str(number)), wanted)


def test_an_image_of_two_sizes_is_resized_until_they_fit_in(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8))
    save(image, tmp_path / "a.png")
    for (height, width), whole, corner in (((6, 12), (12, 8), (0, 1)), ((10, 5), (16, 10), (5, 0))):
        resized = image.resize(whole, Image.Resampling.LANCZOS)
        left, top = corner
        wanted = np.asarray(resized.crop((left, top, left + width, top + height)))
        got = decoding.read_image(str(tmp_path / "a.png"), (height, width), grey=False)
        np.testing.assert_array_equal(got, wanted)


def test_orientation_transparency_and_depth_are_respected(tmp_path):
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "turned").mkdir()
    Image.fromarray(half).save(tmp_path / "turned" / "a.jpg", exif=exif, quality=100)
    assert only(tmp_path / "turned")[:, 0, 0].tolist() == [0] * 4 + [255] * 4

    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4, :, 3] = 255  # opaque black above, nothing below: white
    save(Image.fromarray(clear), tmp_path / "clear" / "a.png")
    assert only(tmp_path / "clear")[:, 0, 0].tolist() == [0] * 4 + [255] * 4

    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) // 32)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    (tmp_path / "palette").mkdir()
    palette.save(tmp_path / "palette" / "a.png", transparency=1)
    assert only(tmp_path / "palette")[::7, 0].tolist() == [[255, 0, 0], [255, 255, 255]]

    deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    save(Image.fromarray(deep), tmp_path / "deep" / "a.png")
    np.testing.assert_array_equal(only(tmp_path / "deep")[..., 0], deep >> 8)


def test_a_grey_folder_is_grey_until_it_holds_a_colour(tmp_path):
    for number, mode in enumerate(("L", "1", "LA", "I;16")):
        save(picture(number, mode), tmp_path / f"{number}.png")
    images = data.load_folder(tmp_path, 8, split="all")
    assert (images.shape, images.num_classes, images.labels) == ((8, 8, 1), None, None)
    save(picture(4, "RGB"), tmp_path / "4.png")
    assert data.load_folder(tmp_path, 8, split="all").shape == (8, 8, 3)


def test_hidden_files_deep_folders_and_links_in_circles(tmp_path):
    save(picture(0, "L"), tmp_path / "a" / "deep" / "er" / "x.png")
    save(picture(1, "L"), tmp_path / "b" / "y.png")
    for name in (".DS_Store", "a/.hidden.png", ".git/config", "b/Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    images = data.load_folder(tmp_path, 8, split="all")
    assert images.labels.tolist() == [0, 1]
    assert images.class_names == ("a", "b")


def test_damage_that_is_met_on_the_way_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxdiff.data.images.IN_MEMORY_BYTES", 10)
    folder = make_folder(tmp_path / "f", 12)
    truncated(folder)
    reader = data.batches(data.load_folder(folder, 8, split="all"), 4, seed=0)
    with pytest.raises(data.UnreadableError, match=r"cut\.jpg cannot be read"):
        list(itertools.islice(reader, 4))
    reader.close()


# --- What is refused ------------------------------------------------------------------------


def text(path):
    (path / "cat" / "notes.txt").write_text("not an image")
    return "notes.txt cannot be read as a PNG, JPEG or WebP image: its content is of no such"


def gif(path):
    picture(0, "L").save(path / "cat" / "a.gif")
    return "a.gif cannot be read as a PNG, JPEG or WebP"


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = save(Image.fromarray(noise), path / "cat" / "cut.jpg")
    file.write_bytes(file.read_bytes()[:-300])
    return "cut.jpg cannot be read as .*truncated"


def empty_class(path):
    (path / "owl").mkdir()
    return "owl holds no image: a class must have one"


def beside(path):
    save(picture(0, "L"), path / "stray.png")
    return r"holds images \(stray.png\) beside sub-folders \(bird\)"


@pytest.mark.parametrize("harm", [text, gif, truncated, empty_class, beside])
def test_what_is_no_folder_of_images_is_refused_by_name(tmp_path, harm):
    folder = make_folder(tmp_path / "f", 6)
    said = harm(folder)
    with pytest.raises(ValueError, match=said):
        _ = data.load_folder(folder, 8, split="all").levels


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        ([], {}, ValueError, "holds no image"),
        (["train/a.png", "test/b.png"], {}, ValueError, "test and train, which are splits"),
        (["a.png"], {"image_size": 0}, ValueError, "`image_size` must be at least 1"),
        (["a.png"], {"image_size": 8.0}, TypeError, "`image_size` must be a whole number"),
        (["a.png"], {"split": "valid"}, ValueError, "`split` must be one of train, test, all"),
        (
            ["a.png"],
            {"split": "test"},
            ValueError,
            "`split` test .* holds no image",
        ),
    ],
)
def test_folders_that_cannot_be_opened_are_refused(tmp_path, make, options, error, message):
    for name in make:
        save(Image.new("L", (4, 4)), tmp_path / name)
    with pytest.raises(error, match=message):
        only(tmp_path, **options)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(data.NotPreparedError, match="`path` must be a folder of images"):
        data.load_folder(tmp_path / "none", 8)


# --- By the command line --------------------------------------------------------------------


TINY = ("--preset", "smoke", "--width", 16, "--batch-size", 8, "--num-steps", 2, "--quiet")
TINY += ("--eval-examples", 2, "--mixture-components", "--sample-steps", 2)


def test_a_folder_is_trained_on_moved_lost_and_still_sampled(tmp_path, capsys, monkeypatch):
    photos, run_dir = make_folder(tmp_path / "photos", 40), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(throughput, "count_flops", lambda *args: None)
    monkeypatch.setattr(report, "draw", lambda *args, **options: 1.0)  # the figures: below, slow
    train = ("train", "--run-dir", run_dir, *TINY, "--no-evaluate", "--image-size", 8, "--flip")
    code, _, err = run(capsys, *train, "--data", "photos")
    assert code == 0, err
    record = json.loads((run_dir / "config.json").read_text())
    assert record["config"]["data"] == "folder"
    assert record["config"]["data_dir"] == str(photos)
    assert (record["config"]["image_size"], record["config"]["flip"]) == (8, True)
    known = {"shape": [8, 8, 3], "num_levels": 256, "class_names": list(FOLDERS)}
    assert known.items() <= record["data"].items()

    moved = photos.rename(tmp_path / "moved")
    code, _, err = run(capsys, *train, "--data", moved)  # done already; the place is free
    assert code == 0, err
    evaluate = ("evaluate", "--run-dir", run_dir, "--quiet")
    code, _, err = run(capsys, *evaluate)
    assert code == 1
    assert f"--data: `path` must be a folder of images; there is no folder {photos}" in err
    assert "If it was moved, say by $JAXDIFF_DATA_DIR which folder holds it now." in err
    code, out, err = run(capsys, *evaluate, "--data-dir", moved)
    assert code == 0, err
    assert "moved/test" in out
    assert json.loads((run_dir / "evaluation.json").read_text())["held_out_bits_per_dim"] > 0
    save(picture(99, "RGB"), moved / "cat" / "new.png")
    code, _, err = run(capsys, *train, "--data", "moved")
    assert code == 1
    assert "other files" in err

    shutil.rmtree(moved)
    sample = ("sample", "--run-dir", run_dir, "--num", 3, "--num-steps", 2, "--quiet")
    for label in ("cat", 1):  # the same to it: what is there is gone on with
        code, _, err = run(capsys, *sample, "--label", label, "--out", tmp_path / "cats")
        assert code == 0, err
    images, labels = streaming.read(tmp_path / "cats")
    assert (images.shape, labels.tolist()) == ((3, 8, 8, 3), [1, 1, 1])
    for label, said in (
        ("cats", "got cats. Did you mean cat?"),
        (3, "lie in 0..2; got 3"),
        ("?", "Those known are bird, cat, dog"),
    ):
        code, _, err = run(capsys, *sample, "--label", label, "--out", tmp_path / "no.png")
        assert (code, (tmp_path / "no.png").exists()) == (1, False)
        assert said in err
    code, _, err = run(capsys, "export", "--run-dir", run_dir, "--out", tmp_path / "p.npz")
    assert code == 0, err
    assert import_params(tmp_path / "p.npz")[1]["class_names"] == list(FOLDERS)


def harm_nothing(path):
    del path


@pytest.mark.parametrize(
    ("harm", "argv", "said"),
    [
        (harm_nothing, ("--data", "photos"), "If the folder photos is meant, give --image-size"),
        (harm_nothing, ("--data", "./photos"), "--image-size must be given"),
        (harm_nothing, ("--data", "imagefolder"), "On the command line: --data DIR --image-size"),
        (harm_nothing, ("--data", "none", "--image-size", 8), "there is no folder"),
        (harm_nothing, ("--data", "./none", "--image-size", 8), "--data: `path` must be a folder"),
        (
            harm_nothing,
            ("--data", "photos", "--image-size", 8, "--data-dir", "x"),
            "leave --data-dir out",
        ),
        (harm_nothing, ("--data", "photos", "--image-size", 0), "--image-size must be at least 1"),
        (
            harm_nothing,
            ("--data", "photos", "--image-size", 8, "--eval-split", "valid"),
            "`split` must be one of train, test, all; got 'valid'. Say by which split",
        ),
        (text, ("--data", "photos", "--image-size", 8), "notes.txt cannot be read as"),
        (truncated, ("--data", "photos", "--image-size", 8), "cut.jpg cannot be read as"),
        (empty_class, ("--data", "photos", "--image-size", 8), "owl holds no image"),
    ],
)
def test_folders_are_refused_by_the_command_line(tmp_path, capsys, monkeypatch, harm, argv, said):
    monkeypatch.chdir(tmp_path)
    harm(make_folder(tmp_path / "photos", 24))
    code, _, err = run(capsys, "train", "--run-dir", tmp_path / "run", *TINY, *argv)
    assert code == 1
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) < 8
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_that_is_lost_is_looked_for_by_its_name(folder, tmp_path, monkeypatch):
    gone = str(tmp_path / folder.name)
    config = dataclasses.replace(PRESETS["smoke"], data="folder", data_dir=gone, image_size=8)
    monkeypatch.delenv("JAXDIFF_DATA_DIR", raising=False)
    with pytest.raises(Refusal, match=f"there is no folder {gone}"):
        open_images(config, "train", recorded=True)
    monkeypatch.setenv("JAXDIFF_DATA_DIR", str(folder.parent))
    assert open_images(config, "train", recorded=True).location == str(folder)


@pytest.mark.slow
def test_two_thousand_images_are_trained_on_sampled_and_judged(tmp_path, capsys):
    photos, run_dir = make_folder(tmp_path / "photos", 2000), tmp_path / "run"
    options = ("--network", "unet", *TINY, "--num-steps", 20, "--batch-size", 32)
    options += ("--data", photos, "--image-size", 16, "--run-dir", run_dir)
    code, _, err = run(capsys, "train", *options, "--no-evaluate")
    assert code == 0, err
    code, out, err = run(capsys, "evaluate", "--run-dir", run_dir, "--quiet")
    assert code == 0, err
    assert f"{len(data.load_folder(photos, 16))} training images" in out
    assert (run_dir / "samples.png").stat().st_size > 10_000
    shutil.rmtree(photos)
    out = tmp_path / "cats.png"
    sample = ("sample", "--run-dir", run_dir, "--num", 4, "--num-steps", 4, "--label", "cat")
    code, _, err = run(capsys, *sample, "--out", out)
    assert code == 0, err
    code, _, err = run(capsys, "export", "--run-dir", run_dir, "--out", tmp_path / "p.npz")
    assert code == 0, err
