"""A supervisor starts a command again where that may help, says why, and stops where it may not."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import servers

from experiments.common.command import Refusal
from experiments.supervise import __main__ as supervise
from experiments.supervise import keeping, listing
from experiments.supervise.events import Events
from experiments.supervise.keeping import Patience, keep_running
from experiments.supervise.policy import Ended, Limits, Policy
from experiments.supervise.watching import Watch
from jaxdiff import files
from jaxdiff.training import folders, holder, lock

QUICK = Patience(hang=30.0, grace=5.0, look=0.02)
LIMITS = Limits(max_restarts=3, first_delay=0.01, longest_delay=0.02)
BEGIN = """if True:
    import json, os, pathlib, signal, sys, time
    here = pathlib.Path(sys.argv[1])
    here.mkdir(exist_ok=True)
    starts = here / ".starts"
    start = len(starts.read_text()) + 1 if starts.exists() else 1
    starts.write_text("x" * start)
    def log(step):
        with (here / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\\n")
"""


def words(folder, code):
    return [sys.executable, "-ISc", BEGIN + code, str(folder)]


def keep(folder, code, *, limits=LIMITS, patience=QUICK, watched=True):
    watch = Watch([folder] if watched else [])
    return keep_running(words(folder, code), watch, Policy(limits), patience, Events())


def starts(folder):
    return len((folder / ".starts").read_text())


# --- What ends, and what is started again ---------------------------------------------------


def test_a_command_that_is_done_is_done(tmp_path, capfd):
    assert keep(tmp_path, "print('out'); print('err', file=sys.stderr)") == 0
    said = capfd.readouterr()
    assert said.out == "out\n"
    assert "err\n" in said.err
    assert starts(tmp_path) == 1
    assert re.search(r"start 1 exited with 0 after .*\. It is done\.", said.err)
    assert "ended with 0 after" in said.err


def test_a_preemption_is_started_again_at_once(tmp_path, capfd):
    slow = Limits(first_delay=100.0)
    code = "log(start); sys.exit(75 if start < 4 else 0)"
    assert keep(tmp_path, code, limits=slow) == 0
    said = capfd.readouterr().err
    assert starts(tmp_path) == 4
    assert said.count("restart at once") == 3
    assert "4 starts, 3 preemptions, 0 crashes, 0 hangs; the furthest step logged is 4" in said


def test_a_crash_or_a_kill_is_started_again_and_said(tmp_path, capfd):
    code = """
    if start == 1: sys.exit(3)
    if start == 2: os.kill(os.getpid(), signal.SIGKILL)
    """
    assert keep(tmp_path, code) == 0
    said = capfd.readouterr().err
    assert re.search(r"start 1 exited with 3 .*\. Restart 1 of 3 without progress in 0\.0 s", said)
    assert re.search(r"start 2 was killed by SIGKILL .*\. Restart 2 of 3 without", said)
    assert "3 starts, 0 preemptions, 2 crashes" in said


def test_restarts_without_progress_are_limited(tmp_path, capfd):
    code = "log(7); print(start, file=sys.stderr); sys.exit(3 if start < 20 else 0)"
    assert keep(tmp_path, code) == 3
    said = capfd.readouterr().err
    assert starts(tmp_path) == 4  # the first came to step 7, the others no further
    assert "Given up: 3 restarts in a row brought no progress" in said
    assert 'having said: "4"' in said


def test_progress_begins_the_count_anew(tmp_path):
    assert keep(tmp_path, "log(start); sys.exit(3 if start < 9 else 0)") == 0
    assert starts(tmp_path) == 9


def test_a_killed_command_that_is_given_up_has_a_shells_exit_code(tmp_path):
    code = "os.kill(os.getpid(), signal.SIGSEGV)"
    assert keep(tmp_path, code, limits=LIMITS._replace(max_restarts=0)) == 128 + 11


@pytest.mark.parametrize("code", [1, 2])
def test_a_refusal_is_not_repeated_for_ever(tmp_path, capfd, code):
    script = f"print('error: no such thing', file=sys.stderr); sys.exit({code})"
    assert keep(tmp_path, script) == code
    assert starts(tmp_path) == 2
    assert "It refuses, twice in the same words" in capfd.readouterr().err


def test_other_words_are_another_crash(tmp_path):
    script = "print(f'error {start}', file=sys.stderr); sys.exit(1 if start < 4 else 0)"
    assert keep(tmp_path, script) == 0


def test_a_hang_is_ended_and_started_again(tmp_path, capfd):
    code = """
    if start == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print('ready', flush=True)
        time.sleep(60)
    """
    began = time.monotonic()
    assert keep(tmp_path, code, patience=Patience(hang=1.0, grace=0.2, look=0.02)) == 0
    assert time.monotonic() - began < 10
    said = capfd.readouterr().err
    assert "no progress for 1.0 s in its output or" in said
    assert "start 1 hung and was ended" in said
    assert "2 starts, 0 preemptions, 0 crashes, 1 hang\n" in said


@pytest.mark.parametrize(
    "sign",
    [
        "print('.', flush=True)",
        "print('.', file=sys.stderr, flush=True)",
        "log(i)",
        "(here / 'checkpoints' / str(i)).mkdir(parents=True)",
        "(here / 'denoiser' / 'checkpoints' / str(i)).mkdir(parents=True)",
    ],
)
def test_what_shows_progress_is_no_hang(tmp_path, sign):
    code = f"""
    for i in range(8):
        time.sleep(0.25)
        {sign}
    """
    assert keep(tmp_path, code, patience=Patience(hang=1.2, grace=0.2, look=0.02)) == 0
    assert starts(tmp_path) == 1


def test_what_a_crash_leaves_running_is_ended(tmp_path):
    code = """
    if start == 1:
        if os.fork() == 0:
            time.sleep(3.0)
            (here / 'survived').touch()
            os._exit(0)
        sys.exit(3)
    """
    began = time.monotonic()
    assert keep(tmp_path, code) == 0
    assert time.monotonic() - began < 3.0
    time.sleep(max(0.0, 3.3 - (time.monotonic() - began)))
    assert not (tmp_path / "survived").exists()


# --- Signals --------------------------------------------------------------------------------

STOPPED = """
    if start > 1: sys.exit(0)
    def stop(number, frame):
        (here / 'told').write_text(signal.Signals(number).name)
        sys.exit({code})
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    os.kill(os.getppid(), signal.{name})
    time.sleep(60)
"""


@pytest.fixture
def no_nohup():
    """SIGHUP does what it does where it is not ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize(
    ("name", "told", "code"),
    [("SIGTERM", "SIGTERM", 75), ("SIGINT", "SIGINT", 3), ("SIGHUP", "SIGTERM", 0)],
)
def test_a_signal_is_passed_on_and_ends_both(tmp_path, capfd, name, told, code):
    assert keep(tmp_path, STOPPED.format(name=name, code=code)) == code
    assert (tmp_path / "told").read_text() == told
    assert starts(tmp_path) == 1
    said = capfd.readouterr().err
    assert f"{name}: the command is not started again" in said
    assert f"{told} is passed on to process" in said
    assert "It was told to stop." in said


def test_a_hangup_that_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert keep(tmp_path, "os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.1)") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_it_waits_ends_it(tmp_path):
    class Waking(Events):
        def say(self, text):
            told.append(text)
            if "Restart 1" in text:
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    told, limits = [], Limits(first_delay=100.0, longest_delay=100.0)
    began, command = time.monotonic(), words(tmp_path, "sys.exit(3)")
    assert keep_running(command, Watch([]), Policy(limits), QUICK, Waking()) == 75
    assert time.monotonic() - began < 20
    assert "SIGTERM: the command is not started again" in told


def test_a_third_signal_kills(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(keeping, "SUCCESSION", 0.0)
    code = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(3):
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.2)
    time.sleep(60)
    """
    assert keep(tmp_path, code) == 128 + 9
    assert capfd.readouterr().err.count("SIGTERM is passed on") == 2


# --- What follows from what -----------------------------------------------------------------

CRASH = Ended(code=3, lived=1.0, progressed=False)


def test_delays_double_up_to_the_longest():
    limits = Limits(max_restarts=6, first_delay=5.0, longest_delay=60.0)
    policy = Policy(limits, jitter=lambda: 1.0)
    assert [policy.after(CRASH).delay for _ in range(7)] == [5, 10, 20, 40, 60, 60, None]
    policy = Policy(limits, jitter=lambda: 0.0)
    assert [policy.after(CRASH).delay for _ in range(2)] == [2.5, 5.0]
    assert policy.after(CRASH._replace(progressed=True)).delay == 2.5


def test_stops_by_others_that_never_let_it_progress_are_limited_too():
    policy = Policy(Limits(max_restarts=2, first_delay=5.0), jitter=lambda: 1.0)
    stop = CRASH._replace(code=75)
    moved = stop._replace(progressed=True)
    assert [policy.after(moved).delay for _ in range(5)] == [0.0] * 5
    assert [policy.after(stop).delay for _ in range(4)] == [0.0, 5.0, 10.0, None]
    assert policy.preemptions == 9


@pytest.mark.parametrize(
    "change", [{"lived": 99.0}, {"said": ""}, {"code": 3}, {"progressed": True}, {"hung": True}]
)
def test_what_may_be_mended_is_no_refusal(change):
    refusal = Ended(code=1, lived=1.0, progressed=False, said="error: no")
    policy = Policy(Limits())
    assert policy.after(refusal).delay is not None
    assert policy.after(refusal._replace(**change)).delay is not None
    policy = Policy(Limits())
    policy.after(refusal)
    assert policy.after(refusal).delay is None


def test_the_same_lines_again_are_no_progress(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    watch = Watch([tmp_path])

    def write(*steps):
        metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))

    write(1, 2)
    assert watch.has_changed()
    assert watch.has_advanced()
    time.sleep(0.02)
    write(1)
    assert watch.has_changed()
    assert not watch.has_advanced()
    write(1, 2)
    assert not watch.has_advanced()
    metrics.write_text('{"step": 3}\n{"st')
    assert watch.has_advanced()
    assert watch.step == 3
    (tmp_path / "checkpoints" / "4.tmp").mkdir(parents=True)
    watch.has_advanced()
    (tmp_path / "checkpoints" / "5.tmp").mkdir()
    assert not watch.has_advanced()
    (tmp_path / "checkpoints" / "4.tmp").rename(tmp_path / "checkpoints" / "4")
    assert watch.has_advanced()


def test_a_file_that_shows_progress(tmp_path):
    watch = Watch([tmp_path / "out.txt"])
    assert not watch.has_advanced()
    (tmp_path / "out.txt").write_text("a")
    assert watch.has_changed()
    assert watch.has_advanced()
    assert not watch.has_advanced()
    (tmp_path / "out.txt").write_text("ab")
    assert watch.has_advanced()


def test_tensorboards_files_are_no_progress(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    watch = Watch([tmp_path])
    (tmp_path / "tensorboard" / "events.out.tfevents.1.host").touch()
    assert not watch.has_advanced()


# --- In a store -----------------------------------------------------------------------------


bucket = servers.bucket("gs")


@pytest.fixture
def run(bucket, request, monkeypatch):
    monkeypatch.setattr(listing, "EVERY", 0.0)
    return bucket / f"runs/{request.node.originalname}"


def changes(watch, seconds=0.5):
    """Ask for a while, as the loop does."""
    found, end = False, time.monotonic() + seconds
    while time.monotonic() < end:
        found |= watch.has_changed()
        time.sleep(0.02)
    return found


def test_a_run_in_a_store_shows_progress(run):
    watch = Watch([run])

    def write(name, *steps):
        files.write_text(run / name, "".join(json.dumps({"step": s}) + "\n" for s in steps))

    write("metrics.jsonl")
    write("metrics/0000000001.jsonl", 1, 2)
    assert changes(watch)
    assert watch.has_advanced()
    assert watch.step == 2
    assert not watch.has_advanced()
    files.remove_tree(run / "metrics")
    write("metrics.jsonl", 1)
    write("metrics/0000000002.jsonl", 2)
    assert not watch.has_advanced()  # the same lines again
    files.write_text(run / ".lock" / "1", "a lease")
    files.write_text(run / "checkpoints" / "4.corrupt" / "SHA256SUMS", "")
    files.write_text(run / "tensorboard" / "events.out.tfevents.1", "")
    watch.has_advanced()
    files.write_text(run / ".lock" / "2", "another")
    assert not changes(watch)
    files.write_text(run / "checkpoints" / "4" / "state" / "data", "sent")
    assert changes(watch)
    assert not watch.has_advanced()
    files.write_text(run / "checkpoints" / "4" / "SHA256SUMS", "")
    assert watch.has_advanced()
    write("denoiser/metrics/0000000009.jsonl", 9)
    assert watch.has_advanced()
    assert watch.step == 9
    watch = Watch([run / "metrics.jsonl"])
    write("metrics.jsonl", 1, 2, 3)
    assert watch.has_advanced()


def test_a_store_is_asked_once_in_a_while(run, monkeypatch):
    monkeypatch.setattr(listing, "EVERY", 30.0)
    asked = []
    monkeypatch.setattr(listing, "_listed", lambda top: asked.append(top) or {})
    watch = Watch([run])
    changes(watch)
    assert len(asked) == 1
    watch.has_advanced()
    changes(watch)
    assert len(asked) == 2


@pytest.mark.parametrize("hangs", [False, True])
def test_a_store_that_does_not_answer_is_no_reason_to_kill(run, monkeypatch, capfd, hangs):
    def fail(folder):
        if hangs:
            time.sleep(60)
        raise OSError(5, "no answer")

    monkeypatch.setattr(listing, "PATIENCE", 0.1)
    monkeypatch.setattr(files, "sizes", fail)
    events, command = Events(), [sys.executable, "-ISc", "import time; time.sleep(1.5)"]
    patience = Patience(hang=0.7, grace=0.2, look=0.02)
    assert keep_running(command, Watch([run], events.say), Policy(LIMITS), patience, events) == 0
    said = capfd.readouterr().err
    assert said.count("cannot be listed: no answer") == 1
    assert "1 start, 0 preemptions, 0 crashes, 0 hangs" in said


def test_a_store_that_answers_again_is_said_and_what_nothing_came_to_hangs(run, monkeypatch):
    told, sizes, failing = [], files.sizes, [True, True]

    def sometimes(folder):
        if failing:
            failing.pop()
            raise OSError(5, "no answer")
        return sizes(folder)

    monkeypatch.setattr(files, "sizes", sometimes)
    events = Events()
    events.say = told.append
    command = [sys.executable, "-ISc", "import time; time.sleep(60)"]
    patience, once = Patience(hang=1.0, grace=0.2, look=0.02), Policy(Limits(max_restarts=0))
    assert keep_running(command, Watch([run], events.say), once, patience, events) > 128
    assert [each for each in told if "answers again" in each] == [f"{run} answers again."]
    assert any("it hangs" in each for each in told)


def test_anothers_lease_is_waited_for_as_it_ends(run):
    left = holder.Holder(1, "other", 7, "elsewhere", "noon")
    holder.place_of(run, 1).write_bytes(left.text())
    with pytest.raises(folders.RunError) as refused, lock.writing(run):
        pass
    leased = Ended(code=1, lived=1.0, progressed=False, said=f"error: {refused.value}")
    policy = Policy(Limits(max_restarts=3))
    assert [policy.after(leased).delay is None for _ in range(4)] == [False] * 3 + [True]


# --- The command line -----------------------------------------------------------------------


def test_a_log_stays_small(tmp_path):
    log = tmp_path / "new" / "log.txt"
    for i in range(30):
        Events(log, most_bytes=500).say(f"event {i}\nof several lines")
    assert sorted(path.name for path in log.parent.iterdir()) == ["log.txt", "log.txt.1"]
    assert all(path.stat().st_size <= 500 for path in log.parent.iterdir())
    assert log.read_text().endswith("event 29 of several lines\n")


@pytest.mark.parametrize("spelling", [["--run-dir", "RUN"], ["--run-dir=RUN"], ["--run_dir=RUN"]])
def test_the_runs_folder_is_that_of_the_command(monkeypatch, spelling):
    seen = []
    monkeypatch.setattr(supervise, "keep_running", lambda *args: seen.append(args) or 0)
    argv = ["--hang-after", "2", "--", "python", *spelling, "--", "x"]
    assert supervise.main(argv) == 0
    ((words, watch, _, patience, _),) = seen
    assert words == ["python", *spelling, "--", "x"]
    assert [str(place) for place in watch.places] == ["RUN"]
    assert patience == Patience(hang=120.0, grace=60.0, look=5.0)
    supervise.main(["--progress", "other", "--", "python", *spelling])
    assert [str(place) for place in seen[1][1].places] == ["other"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--"], "error: Which command"),
        ([], "error: Which command"),
        (["--hang-after", "0", "--", "true"], "--hang-after must be a positive time"),
        (["--max-restarts", "-1", "--", "true"], "--max-restarts must be at least 0"),
        (["--", "/no/such/program"], "The command cannot be started"),
        (["--log", "/proc/none/x", "--", "true"], "--log /proc/none/x cannot be written"),
        (["--log", "gs://bucket/x", "--", "true"], "--log must be a file on a disk"),
        (["--", "true", "--run-dir", "ftp://host/x"], "--run-dir cannot be used: a URL must be"),
    ],
)
def test_what_cannot_be_meant_is_refused(capfd, argv, said):
    assert supervise.main(argv) == 1
    assert said in capfd.readouterr().err


def test_no_command_is_a_refusal():
    with pytest.raises(Refusal, match="after --"):
        supervise.supervise(supervise.Options(), [])


def test_no_accelerator_is_touched_and_the_exit_code_is_the_commands(tmp_path):
    code = """if True:
        import sys
        from experiments.supervise.__main__ import main
        child = [sys.executable, "-ISc", "import sys; sys.exit(7)"]
        code = main(["--max-restarts", "0", "--", *child])
        from jax._src import xla_bridge
        print(code, xla_bridge.backends_are_initialized())
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "7 False\n"
