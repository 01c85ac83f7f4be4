"""Files are whole or not there, whatever lies in the way."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxdiff import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_fails_halfway_is_as_it_was_and_leaves_nothing(tmp_path):
    files.write_text(tmp_path / "a.txt", "before")

    def pieces():
        yield b"half"
        raise RuntimeError

    with pytest.raises(RuntimeError), files.whole(tmp_path / "a.txt") as file:
        file.writelines(pieces())
    assert (tmp_path / "a.txt").read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_an_error_that_names_the_file_asked_for(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*/report\.md'"):
        files.write_text(tmp_path / "report.md", "text")
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["absent/a.txt", "folder"])
def test_a_place_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=rf"(No such|Is a) \w+.*: '{tmp_path / place}'$"):
        files.write_text(tmp_path / place, "text")
    assert names(tmp_path) == ["folder"]


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_one_s_stays(tmp_path):
    program = """
import os, sys
from jaxdiff import files
with files.whole(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", program, tmp_path / "a.txt"], check=False)
    (left,) = names(tmp_path)
    assert files.is_leftover(tmp_path / left)
    with files.whole(tmp_path / "a.txt") as file:
        file.write(b"slow")
        files.write_text(tmp_path / "a.txt", "fast")
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "slow"


def test_links_of_foreseeable_names_are_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in (".a.txt.tmp", ".a.txt", "a.txt.tmp", ".a.txt.0123456789abcdef.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    files.write_text(tmp_path / "a.txt", "other")
    assert (tmp_path / "precious").read_text() == "mine"


def test_arrays_of_any_name_are_written_and_objects_are_refused(tmp_path):
    files.write_arrays(tmp_path / "a.npz", {"file": np.arange(3), "allow_pickle": [1.5]})
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        np.testing.assert_array_equal(found["file"], np.arange(3))
        assert found["allow_pickle"] == [1.5]
    with pytest.raises(ValueError, match="allow_pickle"):
        files.write_arrays(tmp_path / "a.npz", {"x": np.asarray([object()])})
