"""Sets of many files, read where they are needed, and what is damaged in them named."""

import itertools
import os
import pathlib
import pickle
import shutil
import time

import numpy as np
import pytest

from experiments.benches import jpegs
from jaxdiff.data import UnreadableError, batch_indices, batches, load_images
from jaxdiff.data import shards as shards_module

N, NUM_SHARDS = 192, 64


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A set of 192 JPEGs of 16 x 16 in 64 files."""
    folder = tmp_path_factory.mktemp("jpegs")
    jpegs.write(folder, N, NUM_SHARDS, size=16)
    return folder


@pytest.fixture(autouse=True)
def beyond_memory(monkeypatch):
    monkeypatch.setattr("jaxdiff.data.images.IN_MEMORY_BYTES", 10)


@pytest.fixture
def copy(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


def files_of(folder):
    return sorted(pathlib.Path(folder, "jpegs", "1.0.0").glob("*array_record-*"))


def open_files(folder):
    """The files of a folder that this process has open."""
    found = []
    for each in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{each}")
        except OSError:
            continue
        if path.startswith(f"{folder}/"):
            found.append(path)
    return found


def counted(images, monkeypatch):
    """Count which records of a split are read."""
    read, source = [], type(images.source)
    by_index = source.__getitems__

    def getitems(self, indices):
        if self is images.source:
            read.extend(int(i) for i in indices)
        return by_index(self, indices)

    monkeypatch.setattr(source, "__getitems__", getitems)
    return read


# --- what is read -----------------------------------------------------------------------------


def test_records_are_those_that_tfds_reads(prepared):
    import tensorflow_datasets as tfds

    images = load_images("jpegs", "train[10:-5]+train[:3]", data_dir=prepared)
    source = tfds.builder("jpegs", data_dir=str(prepared)).as_data_source("train[10:-5]+train[:3]")
    rows = images.rows(np.arange(len(images))[::-1])
    expected = list(source)[::-1]
    assert len(images) == N - 12
    np.testing.assert_array_equal(rows["image"], [record["image"] for record in expected])
    np.testing.assert_array_equal(rows["label"], [record["label"] for record in expected])


def test_each_process_reads_its_own_rows_and_no_others(prepared, monkeypatch):
    for process in (0, 1):
        images = load_images("jpegs", "train", data_dir=prepared)
        reader = batches(images, 16, seed=0, process_index=process, process_count=2, prefetch=0)
        read = counted(images, monkeypatch)
        for step in range(6):
            batch = next(reader)
            mine = batch_indices(N, 16, 0, step)[8 * process : 8 * (process + 1)]
            assert read[-8:] == mine.tolist()
            np.testing.assert_array_equal(batch["label"], mine % 10)
        assert len(read) == 6 * 8
        monkeypatch.undo()
        monkeypatch.setattr("jaxdiff.data.images.IN_MEMORY_BYTES", 10)


def test_files_are_opened_when_a_record_of_theirs_is_read(copy):
    images = load_images("jpegs", "train", data_dir=copy)
    assert open_files(copy) == []
    images.rows(np.arange(7))
    assert sorted(open_files(copy)) == [str(path) for path in files_of(copy)[:3]]


def test_files_kept_open_are_bounded_and_the_last_used(copy):
    opened = load_images("jpegs", "train", data_dir=copy).source
    few = shards_module.Shards(opened._shards, opened._decode, "few", str(copy), max_open=5)
    for start in range(0, N, 24):
        few.__getitems__(range(start, start + 24))
        assert len(open_files(copy)) == 5
    assert sorted(open_files(copy)) == [str(path) for path in files_of(copy)[-5:]]
    np.testing.assert_array_equal(few[0]["image"], opened[0]["image"])


def test_a_split_keeps_an_eighth_of_the_files_open_that_the_process_may(monkeypatch, copy):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (80, 80))
    images = load_images("jpegs", "train", data_dir=copy)
    images.rows(np.arange(N))
    assert len(open_files(copy)) == 10


def test_threads_that_share_few_files_read_the_same_batches(prepared):
    images = load_images("jpegs", "train", data_dir=prepared)
    expected = images.rows(np.arange(N))["image"]
    images.source._max_open = 2
    reader = batches(images, 48, seed=0, prefetch=4)
    for step in range(12):
        np.testing.assert_array_equal(
            next(reader)["image"], expected[batch_indices(N, 48, 0, step)]
        )
    reader.close()


def test_files_that_answer_late_are_read_at_once_and_in_their_order(prepared, monkeypatch):
    images = load_images("jpegs", "train", data_dir=prepared)
    expected = images.rows(np.arange(N))
    read = shards_module.Shards._read

    def late(self, number, places):
        time.sleep(0.05)
        return read(self, number, places)

    monkeypatch.setattr(shards_module.Shards, "_read", late)
    order = np.random.default_rng(0).permutation(N)
    start = time.monotonic()
    got = images.rows(order)
    assert time.monotonic() - start < 1.5  # one after another 3.2 s; by 32 at once 0.2
    np.testing.assert_array_equal(got["image"], expected["image"][order])
    np.testing.assert_array_equal(got["label"], expected["label"][order])


def test_a_source_crosses_to_another_process(prepared):
    source = load_images("jpegs", "train", data_dir=prepared).source
    expected = source[100]["image"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[100]["image"], expected)


# --- what is damaged --------------------------------------------------------------------------


def damage_of(folder, index):
    """What reading a record says; None if it is sound."""
    try:
        load_images("jpegs", "train", data_dir=folder).rows(np.array([index]))
    except UnreadableError as error:
        return str(error)
    return None


def test_a_flipped_byte_anywhere_is_named_or_harmless(copy, prepared):
    path = files_of(copy)[2]  # records 6, 7 and 8
    whole = path.read_bytes()
    expected = load_images("jpegs", "train", data_dir=prepared).rows(np.arange(6, 9))
    end = len(whole.rstrip(b"\0"))
    said = []
    for position in [*range(0, 3000, 37), *range(65536, end, 997), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        images = load_images("jpegs", "train", data_dir=copy)
        try:
            rows = images.rows(np.arange(6, 9))
        except UnreadableError as error:
            said.append(str(error))
        else:  # padding, or what reading by index needs not
            np.testing.assert_array_equal(rows["image"], expected["image"])
            np.testing.assert_array_equal(rows["label"], expected["label"])
    assert len(said) > 40
    assert all("jpegs/train in" in each for each in said)
    assert all(f"of {path.name}, which is damaged" in each for each in said)


def test_a_damaged_record_is_named_by_its_number_and_its_place_and_others_are_read(copy):
    path = files_of(copy)[2]
    damaged = bytearray(path.read_bytes())
    _, second, _ = sorted(i for i in range(len(damaged)) if damaged[i : i + 3] == b"\xff\xd8\xff")
    damaged[second + 50] ^= 1
    path.write_bytes(damaged)
    images = load_images("jpegs", "train", data_dir=copy)
    said = rf"jpegs/train in {images.location} cannot be read: example 7 is record 1 of {path.name}"
    with pytest.raises(UnreadableError, match=said + r".*hash mismatch.*Copy that file anew"):
        images.rows(np.array([5, 8, 7, 6]))
    assert images.rows(np.array([5, 8, 6]))["label"].tolist() == [5, 8, 6]
    part = load_images("jpegs", "train[4:]", data_dir=copy)
    with pytest.raises(UnreadableError, match=rf"example 3 is record 1 of {path.name}"):
        part.rows(np.array([3]))


@pytest.mark.parametrize("prefetch", [0, 4])
def test_damage_ends_the_batches_with_its_name_whoever_reads(copy, prefetch):
    path = files_of(copy)[2]
    path.write_bytes(path.read_bytes()[:-1])
    images = load_images("jpegs", "train", data_dir=copy)
    reader = batches(images, 48, seed=0, prefetch=prefetch)
    with pytest.raises(UnreadableError, match=rf"is record \d of {path.name}, which is damaged"):
        list(itertools.islice(reader, 4))  # an epoch
    reader.close()


@pytest.mark.parametrize("keep", [0, 100, 65536, 80_000, -1])
def test_a_file_cut_short_is_named(copy, keep):
    path = files_of(copy)[5]  # two blocks of 64 KiB; cut between them it opens as an empty one
    path.write_bytes(path.read_bytes()[:keep])
    assert damage_of(copy, 14) is None
    assert f"example 15 is record 0 of {path.name}, which is damaged (the file: " in damage_of(
        copy, 15
    )


def test_a_file_that_is_gone_or_another_is_named(copy):
    fifth, sixth = files_of(copy)[5:7]
    os.unlink(fifth)
    assert f"of {fifth.name}, which is damaged (the file: open() failed: No such file" in damage_of(
        copy, 15
    )
    shutil.copy(files_of(copy)[0], fifth)
    jpegs.write(copy / "other", 4, 1, size=16)
    shutil.copy(files_of(copy / "other")[0], sixth)
    assert "(the file: it holds 4 records, not 3)" in damage_of(copy, 18)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (b"no example", "Error parsing message"),
        (b"", 'it has no "image"'),
        ({"image": b"GIF?", "label": 3}, "of no format that is known"),
        ({"image": jpegs.jpeg(0, 16)[:300], "label": 3}, "Truncated File Read"),
        ({"image": jpegs.jpeg(0, 8), "label": 3}, r"has 8 x 8 pixels, not \(16, 16\)"),
        ({"image": jpegs.jpeg(0, 16)}, 'it has no "label"'),
    ],
)
def test_a_record_that_is_no_such_example_is_named(copy, record, said):
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    if isinstance(record, dict):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(record["image"])
        if "label" in record:
            example.features.feature["label"].int64_list.value.append(record["label"])
        record = example.SerializeToString()
    path = files_of(copy)[-1]
    images = load_images("jpegs", "train", data_dir=copy)
    raw = images.source._read(NUM_SHARDS - 1, [0, 2])
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for each in (raw[0], record, raw[1]):
        writer.write(each)
    writer.close()
    images = load_images("jpegs", "train", data_dir=copy)
    with pytest.raises(
        UnreadableError, match=f"example {N - 2} is record 1 of {path.name}.*{said}"
    ):
        images.rows(np.arange(N - 3, N))
    assert images.rows(np.array([N - 3, N - 1]))["label"].tolist() == [(N - 3) % 10, (N - 1) % 10]


def test_too_many_open_files_are_no_damage(prepared, monkeypatch):
    import resource

    images = load_images("jpegs", "train", data_dir=prepared)
    images.rows(np.arange(3))  # imports
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="too many files are open.*jpegs/train.*ulimit -n"):
            images.rows(np.arange(N))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.slow
def test_the_bench_tells_what_jpegs_take_beside_a_step(capsys):
    from experiments import bench

    argv = "input --preset smoke --data-set jpegs --rounds 1 --steps 1 --num-images 64"
    assert bench.main(argv.split()) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("64 JPEGs of 64 x 64, 1,")
    assert [line.split("  ")[0] for line in out[2:4]] == ["decoding alone", "pipeline, 0 threads"]
    assert out[-1].startswith("ratio ")
