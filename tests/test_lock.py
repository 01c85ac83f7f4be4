"""One process at a time writes a run; what it is killed by does not matter."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxdiff.training import folders, lock

HOLD = """
import os, sys, time
from jaxdiff.training import lock
with lock.writing(sys.argv[1]):
    parent = os.getpid()
    if os.fork() == 0:  # outlives its parent, as a worker that loads data may, and holds nothing
        while os.getppid() == parent:
            time.sleep(0.1)
        time.sleep(2)
        os._exit(0)
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def another_process(folder):
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def test_a_second_writer_is_refused_at_once_and_a_lock_left_by_a_kill_stops_nobody(tmp_path):
    with another_process(tmp_path / "run") as process:
        before = (tmp_path / "run" / lock.LOCK).read_bytes()
        for _ in range(3):
            began = time.monotonic()
            said = rf"is being written by process {process.pid} on \S+, since .*or take another"
            with pytest.raises(folders.RunError, match=said), lock.writing(tmp_path / "run"):
                pass
            assert time.monotonic() - began < 1
        taken = lock.writing(tmp_path / "run", take_over=True)
        with pytest.raises(folders.RunError, match="stop it, .*Nobody can take over a lock"), taken:
            pass
        assert (tmp_path / "run" / lock.LOCK).read_bytes() == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock.writing(tmp_path / "run"):
            assert str(os.getpid()) in (tmp_path / "run" / lock.LOCK).read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_process_holds_a_lock_several_times_over(tmp_path):
    with lock.writing(tmp_path):
        with lock.writing(tmp_path / "." / ""):
            pass
        assert (tmp_path / lock.LOCK).exists()
    assert not (tmp_path / lock.LOCK).exists()


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path):
    with pytest.raises(RuntimeError), lock.writing(tmp_path / "a" / "b"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with lock.writing(tmp_path / "a") as folder:
        (folder / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_where_files_cannot_be_locked_it_is_said_and_work_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("jaxdiff.files.hold", lambda descriptor: None)
    with lock.writing(tmp_path):
        pass
    assert "cannot be locked" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gs://", "cannot be used: a URL must be like gs://BUCKET/run or s3://BUCKET/run"),
        ("ftp://bucket/run", "cannot be used: a URL must be like .*; got ftp://bucket/run"),
        ("gs://bucket", "must be a folder in the bucket; got gs://bucket. Name one"),
        ("gs://bucket/a/../run", "must not have a part that is '..'"),
        ("s3://bucket/a[1]#/run", r"must have none of .* has '#' '\[' '\]'\. Rename"),
        ("gs:/bucket", "colon"),
        ("", "empty name"),
        ("file/run", "file is a file. Take another --run-dir"),
        ("link", "link is a link to nothing"),
        ("exp[1]", r"must have none of .* has \[ \]. Rename that"),
        ("a\\b", "cannot be read back"),
        ("/proc/run", "/proc/run cannot be written: No such file or directory. Take another."),
    ],
)
def test_what_cannot_be_a_run_directory_is_refused_before_anything_is_made(
    tmp_path, monkeypatch, name, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(folders.RunError, match=f"--run-dir .*{said}"), lock.writing(name):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_run_that_is_to_be_read_must_exist(tmp_path):
    with pytest.raises(folders.RunError, match=r"--run-dir .*/none does not exist\."):
        folders.existing_run(tmp_path / "none")
