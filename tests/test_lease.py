"""One process at a time writes a run in a store, whatever the clocks of its hosts say."""

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import threading
import time
import warnings

import pytest
import servers

from experiments.common import command
from jaxdiff import files
from jaxdiff.training import folders, holder, lease, lock

HOLD = """
import sys
from jaxdiff.training import lock
with lock.writing(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


bucket = servers.bucket("gs", pytest.param("s3", marks=pytest.mark.slow))


@pytest.fixture
def run(bucket, request, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE", 0.1)
    folder = bucket / f"runs/{request.node.originalname}"
    files.write_text(folder / "config.json", "{}")
    yield folder
    files.remove_tree(folder)


@contextlib.contextmanager
def held(folder, **options):
    """The lease of another holder than this process's locks know."""
    found = lease.acquire(folder, **options)
    try:
        yield found
    finally:
        found.release()


def left(folder, number=1, ttl=1.0, **said):
    """Write what a crash on another machine leaves."""
    said = {"token": "other", "pid": 7, "host": "elsewhere", "since": "noon", **said}
    crashed = holder.Holder(number, ttl=ttl, **said)
    holder.place_of(folder, number).write_bytes(crashed.text())


def objects(folder):
    return {name: (folder / name).read_bytes() for name in files.names(folder)}


def may_write(folder):
    """Tell whether this process may, as far as it knows without a request."""
    try:
        files.guards[str(folder)](f"{folder}/a")
    except folders.RunError:
        return False
    return True


def wait_until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("count", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_whoever_comes_second_is_refused_every_time_and_changes_nothing(run, count):
    with held(run):
        before = objects(run)
        said = r"--run-dir \S+ is being written by process \d+ on \S+, since .*; its lease ends 20"
        for attempt in range(count):
            with pytest.raises(folders.RunError, match=said), lock.writing(run):
                pass
            if attempt < 5:  # readers are refused nothing
                assert (run / "config.json").read_text() == "{}"
                assert lock.is_saved_to(run / "checkpoints")
        assert objects(run) == before
        assert len(before) == 2
    assert list(objects(run)) == ["config.json"]
    assert not lock.is_saved_to(run / "checkpoints")


def test_a_process_holds_a_lease_several_times_over_and_leaves_nothing(run):
    with lock.writing(run), lock.writing(f"{run}/"):
        end = lock.saving(run / "checkpoints")
        assert files.names(run) == [".lock/1", "config.json"]
        lock.require_held(run / "checkpoints")
    assert files.names(run) == [".lock/1", "config.json"]
    end()
    assert files.names(run) == ["config.json"]


def test_a_lease_that_a_crash_left_ends_whatever_this_hosts_clock_says(run, monkeypatch):
    left(run, number=4, ttl=2.5)
    assert lock.writer(run) == "process 7 on elsewhere, since noon"
    monkeypatch.setattr(time, "time", lambda: 4e9)
    holder._clocks.clear()
    with pytest.raises(folders.RunError, match="process 7 on elsewhere, since noon"):
        lease.acquire(run)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with pytest.raises(folders.RunError):
        lease.acquire(run)
    time.sleep(2.5)
    with lock.writing(run):
        assert ".lock/5" in files.names(run)
        assert f"process {os.getpid()} on" in lock.writer(run)
    assert lock.writer(run) is None
    assert files.names(run) == ["config.json"]


def test_a_renewed_lease_does_not_end(run, monkeypatch):
    monkeypatch.setattr(holder, "TTL", 2.0)
    with held(run) as first:
        time.sleep(3.5)
        assert not first.lost
        with pytest.raises(folders.RunError):
            lease.acquire(run)


def test_a_killed_process_of_this_machine_stops_nobody(run):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], **pipes) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            said = f"being written by process {process.pid} on"
            with pytest.raises(folders.RunError, match=said), lock.writing(run):
                pass
        finally:
            process.kill()
    assert lock.is_saved_to(run) is False
    with lock.writing(run):
        pass
    assert files.names(run) == ["config.json"]


def test_a_lease_is_taken_over_and_its_old_holder_writes_no_more(run, capfd):
    with held(run) as old, lock.writing(run, take_over=True):
        with pytest.raises(folders.RunError, match=r"was taken over by process \d+ on"):
            old.renew()
        assert old.lost
    assert list(objects(run)) == [".lock/2", "config.json"]  # for an old holder that slept
    with held(run) as again:
        assert not again.lost
    files.remove_tree(run)
    left(run, ttl=100)
    with lock.writing(run, take_over=True):
        files.write_text(run / "a", "text")


def test_every_command_that_writes_can_take_a_lease_over(run, capsys):
    @command.writes
    def write(run_dir: str) -> None:
        """Write."""
        files.write_text(command.claim(run_dir) / "report.md", "text")

    left(run, ttl=100)
    assert command.run("x", write, ["--run-dir", str(run)]) == 1
    said = capsys.readouterr().err
    assert f"error: --run-dir {run} is being written by process 7 on elsewhere" in said
    assert command.run("x", write, ["--run-dir", str(run), "--take-over"]) == 0
    assert command.run("x", write, ["--run-dir", str(run)]) == 0
    assert "report.md" in files.names(run)


def test_a_fork_holds_nothing(run):
    with lock.writing(run):
        with warnings.catch_warnings(action="ignore"):
            child = os.fork()
        if not child:
            os._exit(may_write(run))
        assert os.waitpid(child, 0)[1] == 0
        lock.require_held(run)


def test_an_old_holder_that_slept_through_its_successor_finds_out(run):
    with held(run) as old:
        with held(run, take_over=True):
            pass
        with pytest.raises(folders.RunError, match="taken over"):
            old.renew()
        with held(run), pytest.raises(folders.RunError, match="taken over"):
            old.check()
    assert [name for name in files.names(run) if name.startswith(".lock")] == [".lock/3"]


def test_the_thread_notices_that_a_lease_was_lost_and_nothing_is_written_after(
    run, monkeypatch, capfd
):
    monkeypatch.setattr(holder, "TTL", 2.0)
    end = contextlib.ExitStack()
    with end, lock.writing(run):
        files.write_text(run / "a", "text")
        holder.place_of(run, 9).write_bytes(b"damaged")
        wait_until(lambda: not may_write(run))
        said = "not written by this process any more.*was taken over by another process"
        for refused in (
            lambda: files.write_text(run / "a", "other"),
            lambda: (run / "a").unlink(),
            lambda: files.remove_tree(run / "a"),
            lambda: (run / "a").create(b"other"),
            lambda: lock.require_held(run / "checkpoints"),
            lambda: end.enter_context(lock.writing(run)),
        ):
            with pytest.raises(folders.RunError, match=said):
                refused()
        files.write_text(run.parent / "beside", "text")
    assert (run / "a").read_text() == "text"
    assert ".lock/9" in files.names(run)
    assert "taken over" in capfd.readouterr().err


def test_what_cannot_be_renewed_is_lost_when_its_time_is_over(run, monkeypatch):
    monkeypatch.setattr(holder, "TTL", 1.0)

    def fail(*arguments):
        raise OSError("no answer")

    with held(run) as first:
        monkeypatch.setattr(holder, "numbers", fail)
        with pytest.raises(OSError, match="no answer"):
            first.renew()
        assert not first.lost
        wait_until(lambda: first.lost, 1.5)
        with pytest.raises(folders.RunError, match="could not be renewed within its 1 seconds"):
            first.renew()


def race(run, count):
    """Let threads acquire at once; return those that did."""
    barrier, found = threading.Barrier(count), []

    def acquire():
        barrier.wait()
        with contextlib.suppress(folders.RunError):
            found.append(lease.acquire(run))

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for each in [pool.submit(acquire) for _ in range(count)]:
            each.result()
    return found


def test_of_several_that_race_one_gets_it(run, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE", 0.5)
    for _ in range(3):
        found = race(run, 4)
        assert len(found) <= 1
        for each in found:
            each.renew()
            each.release()
        files.remove_tree(run / ".lock")


def test_a_process_may_save_first_and_then_write_the_run(run):
    end = lock.saving(run / "checkpoints")
    with lock.writing(run):
        assert len([name for name in files.names(run) if ".lock" in name]) == 2
        lock.require_held(run / "checkpoints")
    end()
    assert files.names(run) == ["config.json"]


def test_checkpoints_without_a_run_have_a_lease_of_their_own(run):
    checkpoints = run / "checkpoints"
    end = lock.saving(checkpoints)
    assert files.names(checkpoints) == [".lock/1"]
    assert lock.is_saved_to(checkpoints)
    end()
    with held(run), pytest.raises(BlockingIOError):
        lock.saving(checkpoints)
    with held(checkpoints) as other:
        with pytest.raises(BlockingIOError):
            lock.saving(checkpoints)
        with pytest.raises(folders.RunError, match="checkpoints is being written"):
            lock.writing(run).__enter__()
        assert ".lock/1" not in files.names(run)
        taken = lock.writing(run, take_over=True)
        with taken, pytest.raises(folders.RunError, match="taken over"):
            other.renew()
