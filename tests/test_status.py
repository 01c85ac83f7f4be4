"""What is said of a run: its progress, what is wrong with it; and nothing of it is touched."""

import concurrent.futures
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import servers

from experiments.status import __main__ as command
from experiments.status import gathering, judging, places, telling
from jaxdiff import files
from jaxdiff.files import stores
from jaxdiff.training import holder, lock, step_folders
from jaxdiff.training import run as runs

CONFIG = {"width": 8, "num_steps": 4000}
ALSO = {"experiment": "digits", "preset": "full", "running": {"keep_last": 3, "keep_every": None}}
HOLD = """if True:
    import fcntl, json, os, sys
    file = open(sys.argv[1] + "/.lock", "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump({"pid": os.getpid(), "host": "here", "since": "noon"}, file)
    file.flush()
    print("held", flush=True)
    sys.stdin.read()
"""


def line(step, loss=0.5, rate=10.0, **values):
    return {"step": step, "loss": loss, "grad_norm": 1.0, "steps_per_second": rate, **values}


def log(folder, lines, end=""):
    text = "".join(json.dumps(each) + "\n" for each in lines)
    (folder / runs.METRICS).write_text(text + end)


def save(folder, step, metrics=None, config=CONFIG, count=1000):
    """A checkpoint of random bytes, sealed as any other."""
    kept = step_folders.StepFolders(folder / runs.CHECKPOINTS)
    made = kept.staged(step)
    (made / "state").mkdir(parents=True)
    (made / "state" / "data").write_bytes(os.urandom(count))
    (made / "config.json").write_text(json.dumps(config))
    (made / "metrics.json").write_text(json.dumps(metrics or {}))
    kept.commit(step, {}, lambda step: None)


@pytest.fixture
def folder(tmp_path):
    """A run half done."""
    runs.write_record(tmp_path, CONFIG, free=("num_steps",), also=ALSO)
    log(tmp_path, [line(step, rate=10.0 if step < 1500 else 20.0) for step in range(20, 2020, 20)])
    for step in (500, 1000, 1500, 2000):
        save(tmp_path, step)
    return tmp_path


def ask(folder, verify=None):
    return gathering.status(places.place_of(folder), verify)


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.fixture
def held(folder):
    """The run, which another process writes."""
    program = [sys.executable, "-ISc", HOLD, folder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(program, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.stdin.close()


# --- What it is at --------------------------------------------------------------------------


def test_a_run_half_done(folder):
    found = ask(folder)
    assert (found.experiment, found.preset) == ("digits", "full")
    assert found.hash == runs.config_hash(CONFIG, free=("num_steps",))
    assert (found.step, found.num_steps, found.percent) == (2000, 4000, 50.0)
    assert not found.finished
    assert found.steps_per_second == pytest.approx(20.0)
    assert found.overall_steps_per_second == pytest.approx(1980 / (1480 / 10 + 500 / 20), rel=0.02)
    assert found.eta == pytest.approx(100.0)
    assert found.logged_age < 60
    assert [(each["step"], each["sound"]) for each in found.checkpoints] == [
        (500, None),
        (1000, True),
        (1500, True),
        (2000, True),
    ]
    assert found.checkpoints_bytes > 4000
    files_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert found.folder_bytes == files_bytes > found.checkpoints_bytes
    assert found.free_bytes > 0
    assert found.writer is None
    assert found.warnings == []
    said = "\n".join(telling.lines(found))
    assert "digits, preset full, config" in said
    assert "2000 of 4000, 50.0%" in said
    assert "20 steps a second of late" in said
    assert "1.7 min to go if it went on" in said
    assert "500 (not verified" in said
    assert "no warnings" in said


def test_a_finished_run_and_its_evaluation(folder):
    save(folder, 4000)
    (folder / "evaluation.json").write_text('{"bits": 2.5, "bits_stderr": 0.1, "step": 4000}')
    (folder / "judged.json").write_text('{"average": "ema", "step": 4000}')
    (folder / "report.md").touch()
    found = ask(folder)
    assert found.finished
    assert found.evaluated_step == 4000
    assert found.evaluation["bits"] == 2.5
    said = "\n".join(telling.lines(found))
    assert "finished" in said
    assert "bits 2.5 at step 4000" in said


def test_a_run_without_a_record_or_a_log_yet(tmp_path):
    (tmp_path / runs.METRICS).touch()
    found = ask(tmp_path)
    assert (found.step, found.num_steps, found.eta) == (0, None, None)
    assert "a run without a record" in "\n".join(telling.lines(found))
    log(tmp_path, [line(3)])
    assert ask(tmp_path).step == 3


def test_who_writes_is_said_and_how_long_it_was_silent(folder, held):
    found = ask(folder)
    assert found.writer == f"process {held.pid} on here, since noon"
    assert found.warnings == []
    assert "to go" in "\n".join(telling.lines(found))
    age(folder / runs.METRICS, 300)
    (warning,) = ask(folder).warnings
    assert "nothing was logged for 5.0 min, where 2.0 s is usual: it may hang" in warning
    (folder / runs.METRICS).unlink()
    assert ask(folder).warnings == []
    age(folder / runs.CONFIG, 3600)
    assert "nothing was logged in 1.0 h: it may hang" in ask(folder).warnings[0]
    held.stdin.close()
    held.wait()
    found = ask(folder)
    assert found.writer is None
    assert found.warnings == []


def test_a_question_is_no_writer_to_another(folder):
    (folder / lock.LOCK).write_text("left by a kill")
    descriptor = os.open(folder / lock.LOCK, os.O_RDONLY)
    assert files.hold(descriptor, shared=True)
    assert ask(folder).writer is None
    os.close(descriptor)


def test_a_question_disturbs_no_writer(tmp_path):
    done = threading.Event()

    def asking():
        while not done.is_set():
            try:
                descriptor = os.open(tmp_path / lock.LOCK, os.O_RDONLY)
            except OSError:
                continue
            files.hold(descriptor, shared=True)
            os.close(descriptor)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        readers = [pool.submit(asking) for _ in range(2)]
        try:
            for _ in range(30):
                with lock.writing(tmp_path):
                    assert lock.writer(tmp_path).startswith(f"process {os.getpid()} on ")
                assert lock.writer(tmp_path) is None
        finally:
            done.set()
    assert [reader.result() for reader in readers] == [None, None]


# --- What is wrong --------------------------------------------------------------------------


def test_damaged_checkpoints_are_named(folder):
    with (folder / "checkpoints" / "2000" / "state" / "data").open("r+b") as file:
        file.write(b"other")
    (folder / "checkpoints" / "1500" / "SHA256SUMS").unlink()
    (folder / "checkpoints" / "400.corrupt").mkdir()
    found = ask(folder)
    assert [each["sound"] for each in found.checkpoints] == [None, True, False, False]
    assert any("checkpoint 2000 is corrupt (state/data does not" in w for w in found.warnings)
    assert any("checkpoint 1500 is incomplete" in warning for warning in found.warnings)
    assert any("put aside, and may be deleted: 400.corrupt" in w for w in found.warnings)
    assert "2000 (corrupt" in "\n".join(telling.lines(found))
    assert not ask(folder, verify=0).checkpoints[-1]["damage"]


def test_a_checkpoint_of_another_run_is_damage(folder):
    save(folder, 2500, config={**CONFIG, "width": 9})
    assert "another run's: width 9, here 8" in ask(folder).warnings[0]


def test_damaged_lines_are_counted_but_for_one_being_written(folder):
    log(folder, [line(20), line(40)], end='{"step": 6')
    assert ask(folder).warnings == []
    log(folder, [line(20)], end='{"st\nnull\n{"step": "x"}\n' + json.dumps(line(40)) + "\n")
    found = ask(folder)
    assert "metrics.jsonl: 3 damaged lines, the first is 2" in found.warnings
    assert found.step == 2000


def test_an_altered_record_is_said_and_the_rest_told(folder):
    text = (folder / runs.CONFIG).read_text()
    (folder / runs.CONFIG).write_text(text.replace('"width": 8', '"width": 9'))
    found = ask(folder)
    assert "was changed" in found.warnings[0]
    assert (found.step, found.num_steps) == (2000, None)


def test_a_disk_too_small_for_the_next_checkpoints(folder, monkeypatch):
    size = ask(folder).checkpoints[-1]["bytes"]
    monkeypatch.setattr(places.OnDisk, "free", lambda place: size - 1)
    assert "saving will fail" in ask(folder).warnings[0]
    monkeypatch.setattr(places.OnDisk, "free", lambda place: size)
    assert ask(folder).warnings == []
    running = {"keep_last": 6, "keep_every": 1000}
    (folder / runs.CONFIG).unlink()
    runs.write_record(folder, CONFIG, also={"running": running})
    monkeypatch.setattr(places.OnDisk, "free", lambda place: 5 * size - 1)
    assert "saving will fail" in ask(folder).warnings[0]  # 1 written, 2 more to keep, 3000, 4000
    monkeypatch.setattr(places.OnDisk, "free", lambda place: 5 * size)
    assert ask(folder).warnings == []


def test_skipped_steps_are_counted_by_what_is_newest(folder):
    log(folder, [line(1980, skipped=3)])
    save(folder, 2500, {"loss": 1.0, "skipped": 5, "skipped_in_a_row": 2})
    found = ask(folder)
    assert found.skipped == 5
    assert "5 steps were skipped as not finite, 0.20% of all" in found.warnings
    log(folder, [line(2520, skipped=7)])
    assert ask(folder).skipped == 7
    (folder / "nonfinite.json").write_text('{"step": 2533}')
    assert any("step 2533 was not finite" in warning for warning in ask(folder).warnings)


def test_spikes_are_found_and_noise_and_descent_are_none():
    noise = [0.9, 1.0, 1.1, 0.95, 1.05]
    lines = [line(20 * i, noise[i % 5]) for i in range(1, 101)]
    assert judging.spikes(lines) == []
    assert judging.spikes([line(i, 4.0 * (noise[i % 5] - 0.9)) for i in range(1, 101)]) == []
    assert judging.spikes([line(i, 100.0 / i) for i in range(1, 200)]) == []
    assert judging.spikes([line(i, 1.0 + 1e-6 * (i % 7 == 0)) for i in range(1, 200)]) == []
    for i, loss in ((60, 5.0), (61, 9.0), (62, 4.0), (80, 3.0)):
        lines[i]["loss"] = loss
    found = judging.spikes(lines)
    assert [(s.first, s.last, s.worst) for s in found] == [(1220, 1260, 9.0), (1620, 1620, 3.0)]
    assert found[0].usual == pytest.approx(1.0)
    lines[90]["loss"] = float("nan")
    assert len(judging.spikes(lines)) == 2


def test_stalls_and_slowness_are_found():
    lines = [line(20 * i) for i in range(1, 101)]
    assert judging.stalls(lines) == []
    lines[50]["steps_per_second"] = 0.2
    lines[60]["steps_per_second"] = 1.8  # 11 s, not 10 more than 2
    (stall,) = judging.stalls(lines)
    assert (stall.step, stall.steps, stall.seconds) == (1020, 20, pytest.approx(100.0))
    assert stall.usual == pytest.approx(2.0)
    lines[51]["steps_per_second"] = 0.4
    (stall,) = judging.stalls(lines)
    assert stall == judging.Stall(1040, 40, pytest.approx(150.0), pytest.approx(4.0))
    assert judging.slowdown(lines) is None
    slow = lines + [line(20 * i, rate=4.0) for i in range(101, 111)]
    assert judging.slowdown(slow) == (4.0, 10.0)
    assert judging.slowdown(slow[-15:]) is None


def test_what_a_log_shows_is_said(folder):
    lines = [line(20 * i) for i in range(1, 101)]
    lines[70]["loss"] = 8.0
    lines[80]["steps_per_second"] = 0.1
    log(folder, lines + [line(20 * i, rate=2.5) for i in range(101, 120)])
    spike, stall, slow = ask(folder).warnings
    assert "the loss spiked at step 1420: 8, where 0.5 was usual" in spike
    assert "the 20 steps up to 1620 took 3.3 min, where 2.0 s was usual" in stall
    assert "it became slow: 2.5 steps a second of late, 10 before" in slow


# --- In a store -----------------------------------------------------------------------------


bucket = servers.bucket("gs")


@pytest.fixture
def stored(folder, bucket, request):
    """The run, in a store: half of its log in a part, two lines of which are merged already."""
    there = bucket / f"runs/{request.node.originalname}"
    lines = (folder / runs.METRICS).read_bytes().splitlines(keepends=True)
    for name in files.names(folder):
        (there / name).put(folder / name)
    (there / runs.METRICS).write_bytes(b"".join(lines[:52]))
    (there / "metrics" / "0000001020.jsonl").write_bytes(b"".join(lines[50:]))
    return there


def hold(stored, ttl=120.0, number=1, **said):
    """Write a lease as another process does."""
    said = {"token": "other", "pid": 7, "host": "elsewhere", "since": "noon", **said}
    text = holder.Holder(number, ttl=ttl, **said).text()
    holder.place_of(stored, number).write_bytes(text)


def test_a_run_in_a_store_is_told_as_on_a_disk_by_few_requests(folder, stored, monkeypatch):
    asked, ask_store = [], stores.StorePath._ask
    monkeypatch.setattr(
        stores.StorePath, "_ask", lambda *a, **k: asked.append(k) or ask_store(*a, **k)
    )
    before = {name: (stored / name).read_bytes() for name in files.names(stored)}
    asked.clear()
    found, local = ask(stored), ask(folder)
    assert len(asked) <= 20, len(asked)
    assert not [each for each in asked if each]  # nothing is written
    assert {name: (stored / name).read_bytes() for name in files.names(stored)} == before
    same = ("hash", "step", "percent", "steps_per_second", "overall_steps_per_second", "eta")
    assert [getattr(found, name) for name in same] == [getattr(local, name) for name in same]
    assert found.checkpoints_bytes == local.checkpoints_bytes
    assert [each["step"] for each in found.checkpoints] == [500, 1000, 1500, 2000]
    assert {each["sound"] for each in found.checkpoints} == {None}
    assert found.logged_age < 60
    assert found.checkpoints[-1]["age"] < 60
    assert (found.free_bytes, found.writer, found.warnings) == (None, None, [])
    said = "\n".join(telling.lines(found))
    assert "nobody that holds its lease" in said
    assert "\n  stored " in said


def test_what_is_wrong_in_a_store_is_said(stored):
    (stored / "checkpoints" / "2000" / "state" / "data").write_bytes(b"other")
    (stored / "checkpoints" / "2100" / "state" / "data").write_bytes(b"sent")
    (stored / "checkpoints" / "400.corrupt" / "a").write_bytes(b"")
    files.write_text(stored / "metrics" / "0000002020.jsonl", "null\n" + json.dumps(line(2020)))
    found = ask(stored, verify=2)
    assert [each["sound"] for each in found.checkpoints] == [None, None, True, False]
    lines, damage, aside, unfinished = found.warnings
    assert "metrics/0000002020.jsonl: 1 damaged lines, the first is 1" in lines
    assert "checkpoint 2000 is corrupt (state/data does not" in damage
    assert "400.corrupt" in aside
    assert "without a seal" in unfinished
    assert unfinished.endswith("deletes: 2100")
    assert found.step == 2020
    hold(stored)
    assert not [each for each in ask(stored).warnings if "seal" in each]  # it is at work


def test_who_holds_a_lease_is_said_and_that_nobody_renews_it(stored, monkeypatch):
    hold(stored)
    found = ask(stored)
    assert found.writer == lock.writer(stored) == "process 7 on elsewhere, since noon"
    assert found.warnings == []
    monkeypatch.setattr(holder, "known_time", lambda directory: time.time() + 90)
    (warning,) = ask(stored).warnings
    assert warning.startswith("the lease of process 7 on elsewhere, since noon, was not renewed")
    monkeypatch.setattr(holder, "known_time", lambda directory: time.time() + 130)
    found = ask(stored)
    assert found.writer is lock.writer(stored) is None
    assert "process 7 on elsewhere, since noon, left its lease" in found.warnings[0]
    boot, space, *_ = holder._process(os.getpid()).split()
    hold(stored, number=2, process=f"{boot} {space} 999999999 1", pid=999999999, ttl=1e9)
    found = ask(stored)
    assert found.writer is None
    assert "died and left its lease: the next command goes on at once" in found.warnings[0]
    hold(stored, number=3, released=True)
    assert ask(stored).warnings == []


def test_a_folder_of_runs_in_a_store(bucket, capsys):
    top = bucket / "latents"
    files.write_text(top / "denoiser" / "metrics" / "0000000001.jsonl", json.dumps(line(7)))
    files.write_text(top / "figures" / "a.png", "")
    assert command.main([str(top), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: part["step"] for name, part in found["parts"].items()} == {"denoiser": 7}
    assert command.main([str(top / "figures")]) == 1
    assert "is no run" in capsys.readouterr().err


# --- Beside the run that writes -------------------------------------------------------------


def test_nothing_is_touched(folder):
    def everything():
        paths = sorted(folder.rglob("*"))
        return {p: (p.stat().st_mtime_ns, p.is_dir() or p.read_bytes()) for p in paths}

    (folder / ".lock").write_text("left by a kill")
    (folder / "checkpoints" / "2100.tmp").mkdir()
    before = everything()
    assert command.main([str(folder)]) == 0
    assert command.main([str(folder), "--json"]) == 0
    assert everything() == before


def test_it_may_be_asked_while_checkpoints_come_and_go(tmp_path):
    runs.write_record(tmp_path, CONFIG)

    def writing():
        kept = step_folders.StepFolders(tmp_path / runs.CHECKPOINTS)
        for step in range(10, 400, 10):
            save(tmp_path, step, count=200_000)
            step_folders.prune(kept, step, keep_last=3, keep_every=None)
            log(tmp_path, [line(step)])

    asked, last = 0, 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        written = pool.submit(writing)
        while not written.done():
            found = ask(tmp_path)
            assert not [each for each in found.warnings if "checkpoint" in each]
            assert found.step >= last
            asked, last = asked + 1, found.step
    written.result()
    assert asked > 3
    assert ask(tmp_path).step == 390


# --- The command line -----------------------------------------------------------------------


def test_json_says_the_same_and_parts_are_told(folder, capsys):
    stage = folder / "denoiser"
    stage.mkdir()
    log(stage, [line(7)])
    (folder / "figures").mkdir()
    assert command.main([str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["num_steps"], found["warnings"]) == (2000, 4000, [])
    assert {name: part["step"] for name, part in found["parts"].items()} == {"denoiser": 7}
    assert command.main([str(folder)]) == 0
    assert f"{stage}: a run without a record" in capsys.readouterr().out


def test_a_run_may_be_a_link_and_hold_links(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp("other") / "link"
    link.symlink_to(folder)
    (folder / "loop").symlink_to(folder)
    found = ask(link)
    assert found.step == 2000
    assert found.folder_bytes == ask(folder).folder_bytes > 4000


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "RUN_DIR .*none does not exist"),
        ("empty", "RUN_DIR .*empty is no run"),
        ("file", "RUN_DIR must be a folder"),
        ("other", "is not the config of a run"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, capsys, name, said):
    (tmp_path / "empty" / "empty").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model": 3}')
    assert command.main([str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(said, error)


def test_no_accelerator_is_touched(folder):
    code = """if True:
        import sys
        from experiments.status.__main__ import main
        code = main([sys.argv[1], "--json"])
        from jax._src import xla_bridge
        print(code, xla_bridge.backends_are_initialized())
    """
    program = [sys.executable, "-c", code, folder]
    run = subprocess.run(program, capture_output=True, text=True, check=True)
    assert run.stdout.endswith("0 False\n")
