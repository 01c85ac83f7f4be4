"""Nothing of a run is believed that is not so, and nothing lost: keys, copies, strays, readers."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import digits
from experiments.common import options
from experiments.common.command import Refusal
from experiments.images.model import PRESETS, Config, defaults, from_record, to_record
from jaxdiff.training import checksums, lock, run, step_folders
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints

CONFIG = {"seed": 3, "width": 8, "data_dir": "here"}
ROOT = Path(__file__).parent.parent


def state_of(step):
    return {"step": jnp.int32(step), "params": {"w": jnp.full(3, step / 7)}}


def save(directory, *steps, config=CONFIG, **options):
    with Checkpoints(directory, config=config, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), config)
    return directory


def restored(directory, reports=None, **options):
    report = (lambda message: None) if reports is None else reports.append
    with Checkpoints(directory, report=report, **options) as checkpoints:
        return checkpoints.restore()


def as_earlier_versions_wrote(folder):
    """Make a step's folder one that does not say which step it is."""
    (folder / step_folders.CONTENTS).unlink()
    lines = (folder / checksums.SEAL).read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.endswith(f"  {step_folders.CONTENTS}\n")]
    assert len(kept) == len(lines) - 1
    (folder / checksums.SEAL).write_text("".join(kept))


# Copies


@pytest.mark.parametrize("earlier", [False, True])
def test_a_checkpoint_copied_to_another_step_s_name_is_corrupt(tmp_path, earlier):
    directory, reports = save(tmp_path, 10, 20), []
    if earlier:
        as_earlier_versions_wrote(directory / "10")
    shutil.copytree(directory / "10", directory / "30")
    assert restored(directory, reports, config=CONFIG).step == 20 or earlier
    assert restored(directory, reports, config=CONFIG).step == 20
    assert f"{directory / '30'} is corrupt (it is a copy of step 10)" in reports[-1] or earlier
    with Checkpoints(directory, config=CONFIG) as checkpoints:
        with pytest.raises(CheckpointError, match=r"30 is corrupt \(it is a copy of step 10\)"):
            checkpoints.restore(step=30)
        checkpoints.save(30, state_of(30), CONFIG)  # no ten steps vanish
        assert checkpoints.restore(step=30).state["step"] == 30
    assert (directory / "30.corrupt").is_dir()


def test_a_checkpoint_copied_in_from_another_run_is_corrupt(tmp_path):
    mine = save(tmp_path / "mine", 10)
    other = save(tmp_path / "other", 20, config={**CONFIG, "seed": 4})
    shutil.copytree(other / "20", mine / "20")
    reports = []
    assert restored(mine, reports, config=CONFIG).step == 10
    assert "20 is corrupt (it is another run's: seed 4, here 3)" in reports[0]
    here = {**CONFIG, "data_dir": "there", "newer": 1}  # neither makes it another run
    assert restored(mine, config=here, free=("data_dir",)).step == 10


def test_a_checkpoint_of_earlier_versions_is_read(tmp_path):
    as_earlier_versions_wrote(save(tmp_path, 10) / "10")
    assert restored(tmp_path, config=CONFIG).state["step"] == 10


# What was written, and nothing else


@pytest.mark.parametrize("earlier", [False, True])
def test_files_of_others_do_not_count_but_those_written_do(tmp_path, earlier):
    folder = save(tmp_path, 1, 2) / "2"
    if earlier:
        as_earlier_versions_wrote(folder)
    for name in (".DS_Store", "state/.nfs0001", "Thumbs.db", *([] if earlier else ["notes.txt"])):
        (folder / name).write_bytes(b"x")
    assert restored(tmp_path).step == 2
    (folder / "metrics.json").unlink()
    assert restored(tmp_path).step == 1


@pytest.mark.parametrize("earlier", [False, True])
def test_a_seal_that_lost_lines_is_damage(tmp_path, earlier):
    folder = save(tmp_path, 1, 2) / "2"
    if earlier:
        as_earlier_versions_wrote(folder)
    lines = (folder / checksums.SEAL).read_text().splitlines(keepends=True)
    for kept in (lines[:-1], lines[1:], lines[:1], []):
        (folder / checksums.SEAL).write_text("".join(kept))
        assert restored(tmp_path).step == 1


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_a_typed_key_in_the_state_comes_back_as_it_was(tmp_path, kind):
    state = {"keys": jax.random.split(jax.random.key(3, impl=kind), 4), "w": jnp.ones(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        found = [checkpoints.restore(target).state["keys"] for target in (None, state)]
        shape = jax.eval_shape(lambda: state)
        found.append(checkpoints.restore(shape).state["keys"])
        other = {**state, "keys": jax.random.key(3)}
        with pytest.raises(CheckpointError, match=r"keys: wanted key<fry>\[\], got key<"):
            checkpoints.restore(other)
    for keys in found:
        assert keys.dtype == state["keys"].dtype
        assert (jax.random.key_data(keys) == jax.random.key_data(state["keys"])).all()


def test_an_optimizer_with_a_key_is_saved_and_restored(tmp_path):
    optimizer = optax.add_noise(0.1, 0.5, jax.random.key(5))
    state = optimizer.init({"w": jnp.ones(2)})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        found = checkpoints.restore(state).state
    grads = {"w": jnp.zeros(2)}
    np.testing.assert_array_equal(
        optimizer.update(grads, found)[0]["w"], optimizer.update(grads, state)[0]["w"]
    )


# The best


def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path):
    with Checkpoints(tmp_path, keep_last=1, keep_best="val") as checkpoints:
        for step, value in ((1, math.nan), (2, jnp.float32(0.5)), (3, np.int64(1)), (4, -math.inf)):
            checkpoints.save(step, state_of(step), metrics={"val": value})
        checkpoints.wait()
        assert checkpoints.best("val") == 2
        assert checkpoints.steps() == [2, 4]
        with pytest.raises(ValueError, match=r"`metrics\['val'\]` must be one number"):
            checkpoints.save(5, state_of(5), metrics={"val": jnp.ones(2)})
        with pytest.raises(TypeError, match=r"`metrics\['val'\]` must hold real numbers"):
            checkpoints.save(5, state_of(5), metrics={"val": "low"})


@pytest.mark.parametrize("text", ["[1]", '{"val": "low"}', '{"val": NaN}', '{"val": null}', "{"])
def test_metrics_of_another_form_stop_no_save(tmp_path, text):
    folder = save(tmp_path, 1) / "1"
    (folder / "metrics.json").write_text(text)
    with Checkpoints(tmp_path, keep_best="val", report=lambda message: None) as checkpoints:
        checkpoints.save(2, state_of(2), metrics={"val": 1.0})
        checkpoints.wait()
        assert checkpoints.best("val") == 2


# Writers and readers


def test_the_last_save_of_a_program_that_does_not_close_is_whole(tmp_path):
    program = """
import sys
import jax.numpy as jnp
from jaxdiff.training.checkpoint import Checkpoints
for name in sys.argv[1:]:
    checkpoints = Checkpoints(name)
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": jnp.full((500, 500), step)})
"""
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    command = [sys.executable, "-W", "error", "-c", program, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name in names:
        assert restored(name).step == 3


def test_another_process_that_saves_is_not_disturbed_and_readers_go_on(tmp_path):
    program = """
import sys, time
import jax.numpy as jnp
from jaxdiff.training.checkpoint import Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {"step": jnp.int32(1)})
    checkpoints.wait()
    (checkpoints.directory / "2.tmp").mkdir()
    print("saved", flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", program, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdout.readline() == b"saved\n"
            reports = []
            assert restored(tmp_path, reports).step == 1
            assert reports == []  # 2.tmp is at work
            with pytest.raises(CheckpointError, match="step 3 .*Another process saves there"):
                Checkpoints(tmp_path).save(3, state_of(3))
            with pytest.raises(CheckpointError, match="cannot be written: Another process"):
                Checkpoints(tmp_path).claim()
            assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.tmp"]
        finally:
            process.send_signal(signal.SIGKILL)
    restored(tmp_path, reports)
    assert "2.tmp is incomplete: an unfinished save" in reports[0]
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    assert not lock.is_saved_to(tmp_path)


def test_a_checkpoint_deleted_while_it_is_read_gives_way_to_the_next_newest(tmp_path, monkeypatch):
    directory = save(tmp_path, 1, 2, 3)
    read, reports = step_folders.contents, []

    def prune_and_read(folder):
        found = read(folder)
        if folder.name == "3" and threading.current_thread() is threading.main_thread():
            os.rename(directory / "3", directory / "3.tmp")
        return found

    monkeypatch.setattr(step_folders, "contents", prune_and_read)
    assert restored(directory, reports).step == 2
    assert not any("corrupt" in report for report in reports)


def test_what_could_not_be_saved_is_said_before_the_first_step(tmp_path):
    for folder in (tmp_path / "file" / "checkpoints", Path("/proc/checkpoints")):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=f"{folder} cannot be written: "):
            Checkpoints(folder).claim()


def test_closed_checkpoints_save_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
    checkpoints.save(2, state_of(2))
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]
    assert not lock.is_saved_to(tmp_path)


@pytest.mark.parametrize("name", ["exp[1]", "a*b", "what?", "back\\slash", "gs:/bucket"])
def test_names_that_could_not_be_read_back_are_refused_with_a_remedy(tmp_path, name):
    with pytest.raises(ValueError, match=r"`directory` must .*Rename"):
        Checkpoints(tmp_path / name)
    (tmp_path / "plain").mkdir()
    assert restored(save(tmp_path / "plain", 1)).step == 1


# The record


def record(folder, config=CONFIG):
    run.write_record(folder, config, free=("data_dir",))
    return json.loads((folder / run.CONFIG).read_text())


def rewrite(folder, **changes):
    text = json.dumps(json.loads((folder / run.CONFIG).read_text()) | changes)
    (folder / run.CONFIG).write_text(text)


def test_a_config_changed_by_hand_is_not_believed(tmp_path):
    written = record(tmp_path)
    rewrite(tmp_path, config={**CONFIG, "data_dir": "elsewhere"})  # does not count
    assert run.read_record(tmp_path)["config"]["data_dir"] == "elsewhere"
    rewrite(tmp_path, config={**CONFIG, "width": 9})
    with pytest.raises(run.RunError, match=rf"was changed: its hash is {written['hash']}"):
        run.read_record(tmp_path)


def test_checkpoints_without_a_config_are_not_said_to_be_none(tmp_path):
    save(tmp_path / "checkpoints", 2)
    with pytest.raises(Refusal, match="holds checkpoints and no config.json"):
        digits.restore(tmp_path)


def test_a_record_of_earlier_versions_is_held_to_its_hash_too(tmp_path):
    written = record(tmp_path)
    del written["free"], written["random_numbers"]
    for free in (("num_steps", "data_dir", "checkpoint_every", "log_every", "remat"), ()):
        written["hash"] = run.config_hash(CONFIG, free=free)
        (tmp_path / run.CONFIG).write_text(json.dumps(written))
        assert run.read_record(tmp_path)["config"] == CONFIG
        run.check_random(tmp_path)
    rewrite(tmp_path, config={**CONFIG, "width": 9})
    with pytest.raises(run.RunError, match="was changed"):
        run.read_record(tmp_path)


def test_a_record_without_fields_that_came_later_is_that_of_their_defaults(tmp_path):
    """Its hash, what resumes it and what it opens as stay as they were."""
    config = dataclasses.replace(PRESETS["smoke"], decay_steps=20)
    old = to_record(config)
    assert options.later_defaults(Config).items() >= {"preconditioning": "none"}.items()
    assert not options.later_defaults(Config).keys() & old.keys()
    assert from_record(old) == config
    written = record(tmp_path, old)
    later = {"defaults": defaults()}
    for asked in (old, defaults() | old):  # whoever writes them down all the same
        assert from_record(run.reconcile(tmp_path, asked, **later)) == config
    run.write_record(tmp_path, to_record(config), free=("data_dir",))
    assert json.loads((tmp_path / run.CONFIG).read_text()) == written

    edm = to_record(dataclasses.replace(config, preconditioning="edm"))
    assert edm["preconditioning"] == "edm"
    assert run.config_hash(edm) != run.config_hash(old)
    with pytest.raises(run.RunError, match="--preconditioning: there none, asked edm"):
        run.reconcile(tmp_path, edm, **later)
    record(tmp_path / "edm", edm)
    with pytest.raises(run.RunError, match="--preconditioning: there edm, asked none"):
        run.reconcile(tmp_path / "edm", old, **later)
    with pytest.raises(Refusal, match="another version of the experiment: .* size"):
        from_record({**old, "size": 3})


def test_committed_runs_open_and_are_gone_on_with():
    """The fields that they lack are at what was done before there were any."""
    folder = ROOT / "experiments" / "results" / "digits"
    found = run.read_record(folder)["config"]
    config = from_record(found)
    assert (config.schedule, config.dtype, config.preconditioning) == ("cosine", "float32", "none")
    with jax.enable_x64(False):
        assert from_record(run.reconcile(folder, found, defaults=defaults())) == config
    with pytest.raises(run.RunError, match="--schedule: there cosine, asked linear"):
        run.reconcile(folder, found | {"schedule": "linear"}, defaults=defaults())


@pytest.mark.parametrize(
    "changes", [{"hash": 3}, {"free": "seed"}, {"versions": []}, {"random_numbers": 1}]
)
def test_a_record_of_wrong_types_is_a_sentence(tmp_path, changes):
    record(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(run.RunError, match=f"`{next(iter(changes))}` must be"):
        run.read_record(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_enable_x64", False),
        ("jax_default_matmul_precision", "highest"),
    ],
)
def test_a_run_of_other_random_numbers_is_not_gone_on_with(tmp_path, name, value):
    record(tmp_path)
    run.reconcile(tmp_path, CONFIG)
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(run.RunError, match=f"{name.upper()}: there {before}, here {value}"):
            run.reconcile(tmp_path, CONFIG)
    finally:
        jax.config.update(name, before)


def test_damaged_lines_of_a_log_are_said_and_kept(tmp_path, capfd):
    path = tmp_path / run.METRICS
    path.write_bytes(b'{"step": 1}\n{"step": 2, "a": "\xff"}\n{"step": 3}\n{"st')
    assert run.read_metrics(path) == [{"step": 1}, {"step": 3}]
    damaged = path.read_bytes()
    run.MetricsLog(path, after=9).close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert "1 damaged lines, the first is 2" in capfd.readouterr().err
    run.MetricsLog(path, after=9).close()
    assert capfd.readouterr().err == ""


def test_a_log_that_cannot_be_read_or_written_is_a_sentence(tmp_path):
    (tmp_path / run.METRICS).mkdir()
    for attempt in (run.read_metrics, lambda path: run.MetricsLog(path, after=0)):
        with pytest.raises(run.RunError, match="metrics.jsonl cannot be read: Is a directory"):
            attempt(tmp_path / run.METRICS)
