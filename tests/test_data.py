import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data import (
    Description,
    Images,
    NotPreparedError,
    batch_indices,
    batches,
    bin_width,
    centers,
    default_data_dir,
    dequantize,
    load_images,
    to_levels,
)
from jaxdiff.data.extras import require

KEY = jax.random.key(0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def digits(cache):
    return load_images("digits", "train", data_dir=cache)


@pytest.fixture
def toy():
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (10, 2, 3, 1), np.uint8)
    return Images.from_arrays(levels, np.arange(10), name="toy", split="train")


def run_python(code, *args, **options):
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def snapshot(folder):
    files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def take(iterator, count):
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def row_numbers(folder, split):
    import tensorflow_datasets as tfds

    return [int(record["row"]) for record in read_by_tfds(tfds, folder, "digits", split)]


def read_by_tfds(tfds, folder, name, split):
    return tfds.builder(name, data_dir=str(folder)).as_data_source(split)


# --- digits -----------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_and_each_row_is_in_one_split(digits, cache):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    test = load_images("digits", "test", data_dir=cache)
    rows = [row_numbers(cache, part) for part in ("train", "test")]
    assert (len(digits), len(test)) == (1500, 297)
    assert sorted(rows[0] + rows[1]) == list(range(1797))
    for part, part_rows in zip((digits, test), rows, strict=True):
        np.testing.assert_array_equal(part.levels.reshape(-1, 64), images[part_rows])
        np.testing.assert_array_equal(part.labels, labels[part_rows])


def test_digits_describe_themselves(digits):
    assert digits.shape == (8, 8, 1)
    assert (digits.num_levels, digits.num_classes) == (17, 10)
    assert digits.levels.dtype == np.uint8
    assert digits.labels.dtype == np.int32
    assert (digits.levels.min(), digits.levels.max()) == (0, 16)
    assert digits.bin_width == 2 / 17


def test_digits_split_never_changes(cache):
    assert row_numbers(cache, "test[:8]") == [3, 5, 8, 11, 15, 27, 29, 30]


def test_digits_arrays_are_shared_and_refuse_writing(digits):
    with pytest.raises(ValueError, match="read-only"):
        digits.levels[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        digits.labels[0] = 0


def test_digits_are_prepared_once(digits, cache):
    before = snapshot(cache)
    assert load_images("digits", "test", data_dir=cache).location == digits.location
    assert snapshot(cache) == before
    assert os.listdir(cache) == ["digits"]


def test_data_needs_no_tensorflow_and_its_import_no_tfds(tmp_path):
    process = run_python(
        "import sys\n"
        "import jaxdiff.data as data\n"
        "heavy = {'tensorflow_datasets', 'grain', 'sklearn', 'PIL', 'array_record'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "images = data.load_images('digits', 'train', data_dir=sys.argv[1])\n"
        "reader = data.batches(images, 8, seed=0, prefetch=2)\n"  # still reading ahead at exit
        "assert 'tensorflow' not in sys.modules\n"
        "print(next(reader)['image'].shape)\n",
        tmp_path,
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "(8, 8, 8, 1)\n", "")


def test_digits_killed_half_way_are_prepared_anew(tmp_path):
    process = run_python(
        "import os, sys, signal\n"
        "from jaxdiff.data import digits, load_images\n"
        "made = digits._rename\n"
        "digits._rename = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "load_images('digits', 'train', data_dir=sys.argv[1])\n",
        tmp_path,
    )
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not list((tmp_path / "digits").iterdir())
    assert load_images("digits", "train", data_dir=tmp_path).levels.shape == (1500, 8, 8, 1)


def test_digits_prepared_by_another_process_meanwhile_are_used(tmp_path, monkeypatch):
    from jaxdiff.data import digits

    rename = os.rename

    def late(made, final):
        monkeypatch.setattr(os, "rename", rename)
        digits.prepare(tmp_path)  # the other process
        before.update(snapshot(tmp_path / "digits"))
        rename(made, final)

    before = {}
    monkeypatch.setattr(os, "rename", _only_into(tmp_path / "digits" / "1.0.0", late, rename))
    digits.prepare(tmp_path)
    assert before
    assert snapshot(tmp_path / "digits") == before
    assert os.listdir(tmp_path) == ["digits"]


def _only_into(final, hook, rename):
    return lambda a, b: hook(a, b) if pathlib.Path(b) == final else rename(a, b)


def test_digits_do_not_overwrite_what_stands_in_their_place(tmp_path):
    final = tmp_path / "digits" / "1.0.0"
    final.mkdir(parents=True)
    (final / "mine.txt").write_text("kept")
    with pytest.raises(NotPreparedError, match=f"{final} is in the way"):
        load_images("digits", "train", data_dir=tmp_path)
    assert (final / "mine.txt").read_text() == "kept"
    assert os.listdir(tmp_path) == ["digits"]


def test_damaged_files_are_reported_with_their_folder(tmp_path):
    images = load_images("digits", "train", data_dir=tmp_path)
    shard = next(pathlib.Path(images.location).glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:100_000])
    images = load_images("digits", "train", data_dir=tmp_path)
    with pytest.raises(ValueError, match=f"digits/train in {images.location} cannot be read"):
        _ = images.levels


def test_data_directory_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.delenv("JAXDIFF_DATA_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_data_dir() == "/home/user/.cache/jaxdiff"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_data_dir() == "/cache/jaxdiff"
    monkeypatch.setenv("JAXDIFF_DATA_DIR", "~/data")
    assert default_data_dir() == "/home/user/data"


def test_default_directory_is_where_digits_go(monkeypatch, tmp_path, cache):
    (tmp_path / "here").symlink_to(cache)
    monkeypatch.setenv("JAXDIFF_DATA_DIR", str(tmp_path / "here"))
    assert load_images("digits", "test").location.startswith(str(tmp_path / "here"))


# --- any set by name ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A TFDS folder with a set of 12 PNG images, "tiny", whose builder nobody has registered."""
    import io

    import tensorflow_datasets as tfds
    from PIL import Image

    rng = np.random.default_rng(1)
    levels = rng.integers(0, 256, (12, 4, 5, 3), np.uint8)

    def png(image):
        Image.fromarray(image).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = None

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(4, 5, 3)),
                    "label": tfds.features.ClassLabel(num_classes=4),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i, image in enumerate(levels):
                    yield i, {"image": png(image), "label": i % 4}

    folder = tmp_path_factory.mktemp("tiny")
    Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=2)
    )
    return folder, levels


def test_any_prepared_image_set_opens_by_name(tiny):
    folder, levels = tiny
    images = load_images("tiny", "train", data_dir=folder)
    assert (images.num_examples, images.shape) == (12, (4, 5, 3))
    assert (images.num_levels, images.num_classes) == (256, 4)
    np.testing.assert_array_equal(images.levels, levels)
    np.testing.assert_array_equal(images.labels, np.arange(12) % 4)
    part = load_images("tiny", "train[8:]", data_dir=folder)
    np.testing.assert_array_equal(part.levels, levels[8:])


def test_a_set_without_the_split_that_judges_is_refused_by_the_option(tiny, monkeypatch):
    from experiments.common.command import Refusal
    from experiments.images import model as image_model

    config = image_model.Config(data="tiny", data_dir=str(tiny[0]))
    said = "--eval-split: `split` must be one of train of tiny.* Say by which .* --no-evaluate"
    with pytest.raises(Refusal, match=said):
        image_model.open_images(config, "test", "--eval-split")
    monkeypatch.setenv("JAXDIFF_DATA_DIR", str(tiny[0]))
    with pytest.raises(Refusal, match=r"(?s)--data-dir: mnist.*say by --data-dir or \$JAXDIFF"):
        image_model.open_images(image_model.Config(data="mnist", data_dir="/none"), "train")


@pytest.mark.parametrize("prefetch", [None, 0])
def test_sets_beyond_memory_give_the_same_batches_record_by_record(tiny, monkeypatch, prefetch):
    folder, levels = tiny
    images = load_images("tiny", "train", data_dir=folder)
    monkeypatch.setattr("jaxdiff.data.images.IN_MEMORY_BYTES", 10)
    assert not images.in_memory
    for step, batch in enumerate(take(batches(images, 5, seed=0, prefetch=prefetch), 6)):
        indices = batch_indices(12, 5, 0, step)
        np.testing.assert_array_equal(batch["image"], levels[indices])
        np.testing.assert_array_equal(batch["label"], indices % 4)


def test_a_set_not_prepared_is_refused_with_directory_and_command(tmp_path):
    start = time.monotonic()
    with pytest.raises(NotPreparedError) as caught:
        load_images("mnist", "train", data_dir=tmp_path)
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert f"mnist is not prepared in {tmp_path}" in message
    assert (
        f"python -c \"import tensorflow_datasets as tfds; tfds.builder('mnist', "
        f"data_dir='{tmp_path}', file_format='array_record').download_and_prepare()\"" in message
    )
    assert len(message.splitlines()) <= 4
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FileNotFoundError)
    assert not list(tmp_path.iterdir())


def test_a_set_in_another_format_is_refused_with_the_remedy(tmp_path, tiny):
    import shutil

    shutil.copytree(tiny[0], tmp_path, dirs_exist_ok=True)
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    remedy = rf"stored as tfrecord(.|\n)*data_dir='{tmp_path}/array_record'(.|\n)*as `data_dir`"
    with pytest.raises(NotPreparedError, match=remedy):
        load_images("tiny", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "near"), [("mnits", "mnist"), ("digit", "digits"), ("fashion-mnist", "fashion_mnist")]
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path, name, near):
    with pytest.raises(ValueError, match=f"'{name}'.*Did you mean .*{near}") as caught:
        load_images(name, "train", data_dir=tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("tain", "one of train, test of digits.*got 'tain'. Did you mean train"),
        ("train+tost", "Did you mean test"),
        ("train[:x", "refused: Unrecognized split format"),
        ("train[:0]", "refused: .*0 length"),
    ],
)
def test_an_unknown_split_is_refused(cache, split, message):
    with pytest.raises(ValueError, match=message):
        load_images("digits", split, data_dir=cache)


@pytest.mark.parametrize("name", ["/a/folder", "./mine", "imagefolder", "image_folder"])
def test_a_folder_of_images_is_told_from_a_data_set(name):
    with pytest.raises(ValueError, match="`name` must be the name of a TFDS.*load_folder"):
        load_images(name, "train")


def test_a_directory_that_cannot_be_made_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.delenv("JAXDIFF_DATA_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc")
    with pytest.raises(NotPreparedError, match=r"`data_dir` /proc.*\$JAXDIFF_DATA_DIR"):
        load_images("digits", "train")


def test_labels_out_of_range_are_refused_where_they_are_read():
    unlabelled = [{"image": np.zeros((2, 2, 1), np.uint8), "label": -1}] * 3
    images = Images("mine", "test", 3, (2, 2, 1), 256, 10, unlabelled)
    with pytest.raises(ValueError, match=r"mine/test should hold labels in 0\.\.9; got -1\.\.-1"):
        _ = images.labels


def test_images_describe_themselves_for_a_record():
    names = ("cat", "dog")
    levels = np.zeros((3, 2, 4, 1), np.uint8)
    images = Images.from_arrays(levels, np.array([0, 1, 1]), class_names=names)
    assert images.num_classes == 2
    record = images.description.to_record()
    assert Description.from_record(record) == images.description
    assert images.description.bin_width == 2 / 256
    for name, value, said in (
        ("shape", [8, 8], "`shape` must be"),
        ("num_levels", 1, "levels"),
        ("num_classes", 0, "`num_classes` must be at least 1"),
        ("class_names", ["cat"], "`class_names` must be 2 names"),
    ):
        with pytest.raises(ValueError, match=said):
            Description.from_record({**record, name: value})
    with pytest.raises(ValueError, match="`shape` is missing"):
        Description.from_record({})
    with pytest.raises(ValueError, match="`class_names` must be as many as the 3 classes"):
        Images.from_arrays(levels, np.array([0, 1, 2]), num_classes=3, class_names=names)


@pytest.mark.parametrize("name", ["digits", "tiny:1.0.0"])
def test_a_set_in_a_bucket_is_refused_with_the_command_that_copies_it(name):
    said = r"`data_dir` must be a local directory; got gs://bucket/data.*\n.*experiments.mirror "
    said += rf"--source gs://bucket/data/{name[:4]}"
    with pytest.raises(NotPreparedError, match=said):
        load_images(name, "train", data_dir="gs://bucket/data/")


def test_a_missing_import_names_the_extra():
    with pytest.raises(ImportError, match=r"no_such_module.*pip install 'jaxdiff\[train\]'"):
        require("no_such_module")


# --- arrays -------------------------------------------------------------------------------------


def test_arrays_without_labels_give_batches_without_them():
    images = Images.from_arrays(np.zeros((4, 2, 2, 1), np.uint8), num_levels=2)
    assert images.labels is None
    assert list(take(batches(images, 2, seed=0), 1)[0]) == ["image"]


@pytest.mark.parametrize(
    ("images", "labels", "options", "error", "message"),
    [
        (np.zeros((2, 4, 4, 1)), None, {}, TypeError, "`images` must be uint8"),
        (np.zeros((2, 4, 4), np.uint8), None, {}, ValueError, r"\(N, H, W, C\)"),
        (np.full((2, 4, 4, 1), 17, np.uint8), None, {"num_levels": 17}, ValueError, "0..16; got"),
        (np.zeros((2, 4, 4, 1), np.uint8), [0], {}, ValueError, r"shape \(2,\)"),
        (np.zeros((2, 4, 4, 1), np.uint8), [0, -1], {}, ValueError, "got -1..0"),
        (np.zeros((2, 4, 4, 1), np.uint8), [0, 3], {"num_classes": 3}, ValueError, "0..2; got"),
        (np.zeros((2, 4, 4, 1), np.uint8), [0.0, 1.0], {}, TypeError, "`labels` must hold int"),
        (np.zeros((2, 4, 4, 1), np.uint8), None, {"num_levels": 1}, ValueError, "`num_levels`"),
        (np.zeros((2, 4, 4, 1), np.uint8), None, {"num_classes": 3}, ValueError, "no `labels`"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images, labels, options, error, message):
    with pytest.raises(error, match=message):
        Images.from_arrays(images, labels, **options)


# --- order --------------------------------------------------------------------------------------


def test_batches_hold_the_rows_that_batch_indices_names(digits):
    for step, batch in enumerate(take(batches(digits, 700, seed=3), 5)):
        indices = batch_indices(1500, 700, 3, step)
        assert batch["image"].shape == (700, 8, 8, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"], digits.levels[indices])
        np.testing.assert_array_equal(batch["label"], digits.labels[indices])


def test_every_epoch_is_another_permutation_also_where_batches_straddle():
    stream = np.concatenate([batch_indices(50, 7, 0, step) for step in range(50)])
    epochs = stream.reshape(7, 50)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(50), (7, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 7


def test_the_stream_does_not_depend_on_the_batch_size():
    stream = np.concatenate([batch_indices(50, 7, 0, step) for step in range(50)])
    other = np.concatenate([batch_indices(50, 25, 0, step) for step in range(14)])
    np.testing.assert_array_equal(stream, other)


def test_seeds_share_no_epoch():
    epochs = {tuple(batch_indices(50, 50, seed, step)) for seed in range(4) for step in range(4)}
    assert len(epochs) == 16


def test_order_is_uniform_over_permutations():
    counts = {}
    for step in range(3000):
        order = tuple(batch_indices(3, 3, 0, step))
        counts[order] = counts.get(order, 0) + 1
    # 500 expected of each of the 6; the standard error of one count is 20.4.
    assert len(counts) == 6
    assert max(abs(count - 500) for count in counts.values()) < 82


def test_order_never_changes():
    # A checkpoint's step is all that a resumed run knows of its data.
    assert batch_indices(1500, 4, 0, 0).tolist() == [1051, 998, 162, 670]
    assert batch_indices(1500, 4, 7, 123_456).tolist() == [510, 393, 240, 176]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_restart_at_any_step_goes_on_with_the_same_batches(toy, prefetch):
    straight = take(batches(toy, 4, seed=1, prefetch=prefetch), 9)
    restarted = take(batches(toy, 4, seed=1, start_step=5, prefetch=prefetch), 4)
    for expected, got in zip(straight[5:], restarted, strict=True):
        np.testing.assert_array_equal(expected["image"], got["image"])
        np.testing.assert_array_equal(expected["label"], got["label"])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_same_global_batch(toy, count):
    whole = take(batches(toy, 8, seed=2), 3)
    shares = [
        take(batches(toy, 8, seed=2, process_index=p, process_count=count), 3) for p in range(count)
    ]
    for step in range(3):
        for name in ("image", "label"):
            joined = np.concatenate([share[step][name] for share in shares])
            np.testing.assert_array_equal(joined, whole[step][name])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1; got 0"),
        ({"batch_size": 11}, ValueError, "must not exceed the 10 examples of toy/train; got 11"),
        ({"batch_size": 4.0}, TypeError, "`batch_size` must be an integer"),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"start_step": -1}, ValueError, "`start_step`"),
        ({"process_count": 3}, ValueError, "multiple of the 3 processes; got 4"),
        ({"process_count": 0}, ValueError, "`process_count`"),
        ({"process_count": 2, "process_index": 2}, ValueError, "`process_index` must be in 0..1"),
        ({"prefetch": -1}, ValueError, "`prefetch`"),
    ],
)
def test_batches_refuse_what_cannot_be(toy, options, error, message):
    with pytest.raises(error, match=message):
        batches(toy, **{"batch_size": 4, "seed": 0} | options)


def test_closing_the_batches_stops_their_threads(toy):
    import threading

    before = threading.active_count()
    reader = batches(toy, 4, seed=0, prefetch=3)
    next(reader)
    assert threading.active_count() > before
    reader.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


# --- scaling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("num_levels", [2, 3, 17, 100, 255, 256])
def test_to_levels_inverts_dequantize_and_centers_exactly(num_levels, dtype):
    # One shape for all, so that the draw is compiled once.
    levels = jnp.asarray(np.tile(np.arange(256) % num_levels, (2000, 1)).astype(np.uint8))
    x = dequantize(KEY, levels, num_levels, dtype=dtype)
    assert x.dtype == dtype
    assert -1 < x.min() < x.max() < 1
    np.testing.assert_array_equal(to_levels(x, num_levels), levels)
    middle = centers(levels, num_levels, dtype=dtype)
    np.testing.assert_array_equal(to_levels(middle, num_levels), levels)


def test_to_levels_holds_at_the_outermost_points_that_float32_can_draw():
    # The same operations in NumPy: 255 numbers of levels would be 255 shapes to compile.
    for num_levels in range(2, 257):
        k = np.arange(num_levels, dtype=np.float32)
        for u in (np.float32(2.0**-14), np.float32(1 - 2.0**-14)):
            x = 2 * (k + u) / np.float32(num_levels) - 1
            back = np.floor((x + 1) * np.float32(num_levels / 2))
            np.testing.assert_array_equal(back, k)


def test_centers_are_the_means_of_the_bins():
    np.testing.assert_allclose(centers(jnp.arange(4), 4), [-0.75, -0.25, 0.25, 0.75], rtol=1e-15)
    assert bin_width(4) == 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dequantize_is_uniform_in_the_bin(dtype):
    count = 2000 * 256
    levels = jnp.full((2000, 256), 5, jnp.uint8)
    x = dequantize(KEY, levels, 17, dtype=dtype).astype(jnp.float64)
    u = np.sort(((x - centers(levels, 17)) / bin_width(17) + 0.5).ravel())
    # Kolmogorov-Smirnov: 1.95 / sqrt(N) is exceeded by one key in 1,000.
    distance = np.abs(u - (np.arange(count) + 0.5) / count).max()
    print("KS", distance * count**0.5)
    assert distance < 1.95 / count**0.5


def test_dequantize_rows_depend_on_key_and_row_only():
    @jax.jit
    def draws(key, other):
        levels = jnp.full((8, 4, 4, 1), 3, jnp.uint8)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8))
        pairs = [(key, levels), (key, levels[:3]), (keys[::-1], levels), (other, levels)]
        return [dequantize(key, levels, 17) for key, levels in pairs]

    x, first, backwards, other = draws(KEY, jax.random.key(1))
    np.testing.assert_array_equal(first, x[:3])
    np.testing.assert_array_equal(backwards, x[::-1])
    assert len(np.unique(np.stack([x, other]))) == 2 * x.size


def test_dequantize_compiled_gives_levels_back():
    # The compiler may reorder arithmetic that runs one operation at a time when eager.
    levels = jnp.asarray(np.tile(np.arange(256), (2000, 1)).astype(np.uint8))
    for num_levels in (17, 255):
        some = levels % num_levels
        there_and_back = jax.jit(
            lambda key, k, count=num_levels: to_levels(
                dequantize(key, k, count, dtype=jnp.float32), count
            )
        )
        np.testing.assert_array_equal(there_and_back(KEY, some), some)


def test_to_levels_clips_and_sends_nan_to_zero():
    x = jnp.array([-jnp.inf, -1.5, -1.0, 1.0, 1.5, jnp.inf, jnp.nan])
    got = to_levels(x, 17)
    assert got.dtype == jnp.uint8
    np.testing.assert_array_equal(got, [0, 0, 0, 16, 16, 16, 0])


def test_default_dtype_follows_jax():
    levels = jnp.zeros((2000, 256), jnp.uint8)
    assert dequantize(KEY, levels, 17).dtype == jnp.result_type(float)
    assert centers(levels, 17).dtype == jnp.result_type(float)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dequantize(KEY, jnp.zeros((2, 2)), 17), TypeError, "`levels` must hold integers"),
        (lambda: dequantize(KEY, jnp.array(3), 17), ValueError, r"shape \(B, ...\)"),
        (lambda: dequantize(KEY, jnp.array([3]), 1), ValueError, "`num_levels` must be in 2..256"),
        (lambda: centers(jnp.array([3]), 257), ValueError, "`num_levels` must be in 2..256"),
        (lambda: bin_width(2.5), TypeError, "`num_levels` must be a whole number"),
        (lambda: centers(jnp.array([3]), 9, dtype=jnp.bfloat16), TypeError, "`dtype` must be"),
        (lambda: to_levels(jnp.array([3]), 9), TypeError, "`x` must hold floating"),
    ],
)
def test_scaling_refuses_what_cannot_be(call, error, message):
    with pytest.raises(error, match=message):
        call()
