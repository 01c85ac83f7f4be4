"""Folders of images: whole files, whoever was there before."""

import numpy as np
import pytest

from experiments.common.command import Refusal
from experiments.images import sample_folders as streaming


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(streaming, "PER_FILE", 8)


def fill(folder, num, **record):
    drawn = []

    def draw(first, last):
        drawn.append(first)
        return np.arange(first, last, dtype=np.uint8)[:, None, None, None]

    labels = np.arange(num) % 3
    said = {"seed": 0, "num": num, **record}
    streaming.write(folder, said, draw, labels, (1, 1, 1), progress=False)
    images, found = streaming.read(folder)
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(num))
    np.testing.assert_array_equal(found, labels)
    return drawn


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_images_are_where_other_tools_look_for_them(tmp_path):
    fill(tmp_path / "many", 10)
    with np.load(tmp_path / "many" / "00000000-00000008.npz") as part:
        assert part["arr_0"].shape == (8, 1, 1, 1)
        assert set(part.files) == {"arr_0", "labels"}


def test_files_of_earlier_versions_are_read_and_not_made_again(tmp_path):
    fill(tmp_path, 10)
    images = np.arange(8, dtype=np.uint8)[:, None, None, None]
    np.savez(tmp_path / "00000000-00000008.npz", images=images, labels=np.arange(8) % 3)
    assert fill(tmp_path, 10) == []


def test_what_a_kill_left_stops_nothing(tmp_path):
    for name in (".samples.json.tmp", ".samples.json.0123456789abcdef.tmp", ".DS_Store"):
        (tmp_path / name).touch()
    assert fill(tmp_path, 10) == [0, 8]
    assert names(tmp_path) == [
        ".DS_Store",
        ".samples.json.tmp",
        "00000000-00000008.npz",
        "00000008-00000010.npz",
        "samples.json",
    ]


def test_a_folder_that_grows_keeps_no_file_of_a_smaller_number(tmp_path):
    fill(tmp_path, 10)
    small = (tmp_path / "00000008-00000010.npz").read_bytes()
    assert fill(tmp_path, 17) == [8, 16]
    (tmp_path / "00000008-00000010.npz").write_bytes(small)  # killed before it was deleted
    assert fill(tmp_path, 17) == []
    assert names(tmp_path)[:-1] == [
        f"{first:08d}-{last:08d}.npz" for first, last in ((0, 8), (8, 16), (16, 17))
    ]


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"labels": np.arange(8) % 3},
        {"arr_0": np.zeros((8, 1, 1, 1), np.uint8)},
        {"arr_0": np.zeros((7, 1, 1, 1), np.uint8), "labels": np.arange(8) % 3},
        {"arr_0": np.zeros((8, 1, 1, 1), np.uint8), "labels": np.zeros(8, int)},
        {"arr_0": np.zeros((8, 1, 1, 1), np.uint8), "labels": np.zeros(())},
        {"arr_0": np.zeros(()), "labels": np.arange(8) % 3},
        {"arr_0": np.zeros((8, 1, 1, 1)), "labels": np.arange(8) % 3},
        {"arr_0": np.zeros((8, 2, 1, 1), np.uint8), "labels": np.arange(8) % 3},
    ],
)
def test_a_file_without_its_images_or_labels_is_made_again(tmp_path, arrays):
    fill(tmp_path, 10)
    np.savez(tmp_path / "00000000-00000008.npz", **arrays)
    assert fill(tmp_path, 10) == [0]


def test_images_of_other_random_numbers_are_not_mixed(tmp_path, monkeypatch):
    fill(tmp_path, 10)
    monkeypatch.setattr("jaxdiff.training.run.random_numbers", lambda: {"prng": "another"})
    with pytest.raises(Refusal, match=r"holds other images: random_numbers .*another"):
        fill(tmp_path, 10)


def test_a_missing_file_is_said_with_the_remedy(tmp_path):
    fill(tmp_path, 10)
    (tmp_path / "00000008-00000010.npz").unlink()
    with pytest.raises(Refusal, match="cannot be read .*Run the command again that made it"):
        streaming.read(tmp_path)


@pytest.mark.parametrize("num", ["Infinity", "-1", "2.5", '"10"', "null"])
def test_a_record_of_no_number_of_images_is_refused(tmp_path, num):
    (tmp_path / "samples.json").write_text(f'{{"seed": 0, "num": {num}}}')
    with pytest.raises(Refusal, match=r"samples\.json cannot be read .*`num`"):
        fill(tmp_path, 10)
