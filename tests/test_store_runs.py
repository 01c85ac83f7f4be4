"""What a run writes beside its checkpoints, in buckets: the same bytes as on a disk."""

import contextlib
import dataclasses
import itertools
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import servers

from experiments import ablate
from experiments.ablations import store as groups_of
from experiments.ablations.catalogue import MAKERS
from experiments.ablations.definition import groups, record
from experiments.common import command, evaluations
from experiments.images import sample_folders
from jaxdiff import data, files, plotting, training
from jaxdiff.data import stored
from jaxdiff.training import export, folders, loop, metrics_parts, run
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.program import Steps
from jaxdiff.training.telling import Telling

bucket = servers.bucket("gs", pytest.param("s3", marks=pytest.mark.slow))


@pytest.fixture
def folder(bucket, request):
    return bucket / f"a run/{request.node.originalname}"


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(metrics_parts, "LINES", 3)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files.names(folder)}


def steps_in(folder):
    return [line["step"] for line in run.read_metrics(folder / run.METRICS)]


# --- The log --------------------------------------------------------------------------------


def test_a_log_is_written_by_parts_and_merged_when_it_is_closed(folder, small_parts, tmp_path):
    logs = [run.MetricsParts(folder / run.METRICS, after=0)]
    logs.append(run.MetricsLog(tmp_path / run.METRICS, after=0))
    for step in range(2, 16, 2):
        for log in logs:
            log.write({"step": step, "loss": 1 / step})
    logs[0].flush()
    parts = ["metrics/0000000002.jsonl", "metrics/0000000008.jsonl", "metrics/0000000014.jsonl"]
    assert files.names(folder) == ["metrics.jsonl", *parts]
    assert run.read_metrics(folder / run.METRICS) == run.read_metrics(tmp_path / run.METRICS)
    for log in logs:
        log.close()
    assert contents(folder) == contents(tmp_path)


def test_what_a_kill_leaves_is_there_up_to_the_last_flush_and_goes_on(folder, small_parts):
    log = run.MetricsParts(folder / run.METRICS, after=0)
    for step in range(1, 6):
        log.write({"step": step})
        if step == 4:
            log.flush()
    del log  # killed: it was never closed
    assert steps_in(folder) == [1, 2, 3, 4]
    log = run.MetricsParts(folder / run.METRICS, after=3)  # of its newest checkpoint
    assert (steps_in(folder), files.names(folder)) == ([1, 2, 3], ["metrics.jsonl"])
    log.write({"step": 4})
    log.close()
    assert steps_in(folder) == [1, 2, 3, 4]


def test_parts_that_a_kill_left_merged_count_once(folder, small_parts, monkeypatch):
    log = run.MetricsParts(folder / run.METRICS, after=0)
    for step in range(1, 6):
        log.write({"step": step})
    log.flush()
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove_tree", lambda folder: None)
        log.close()
    assert len(files.names(folder)) == 3
    assert steps_in(folder) == [1, 2, 3, 4, 5]
    run.MetricsParts(folder / run.METRICS, after=9).close()
    assert (steps_in(folder), files.names(folder)) == ([1, 2, 3, 4, 5], ["metrics.jsonl"])


def test_lines_are_sent_when_time_has_passed_and_hold_nothing_up(folder, monkeypatch):
    monkeypatch.setattr(metrics_parts, "SECONDS", 0.05)
    log, write, sent = run.MetricsParts(folder / run.METRICS, after=0), files.write_text, []

    def slow(path, text):
        time.sleep(0.3)
        sent.append(text.count("\n"))
        write(path, text)

    monkeypatch.setattr(files, "write_text", slow)
    began = time.monotonic()
    for step in range(1, 6):
        time.sleep(0.02)
        log.write({"step": step})
    assert time.monotonic() - began < 0.3
    log.flush()
    assert len(sent) == 2  # one when due, what came meanwhile together
    assert steps_in(folder) == [1, 2, 3, 4, 5]
    log.close()


def test_a_store_that_takes_no_line_is_said_at_the_next_write_and_once(folder, monkeypatch):
    log = run.MetricsParts(folder / run.METRICS, after=0)

    def refuse(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", refuse)
        log.write({"step": 1})
        with pytest.raises(folders.RunError, match="cannot be written: Permission denied. Saved"):
            log.flush()
        log.close()
    log = run.MetricsParts(folder / run.METRICS, after=0)
    log.write({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", refuse)
        with pytest.raises(folders.RunError, match="cannot be written"):
            log.close()


def test_event_files_come_one_a_checkpoint(folder):
    log = run.MetricsParts(folder / run.METRICS, after=0, tensorboard=folder / "board")
    for step in (1, 2):
        log.write({"step": step, "loss": 2.0})
        log.flush()
    log.flush()  # nothing new
    log.close()
    events = [(folder / name).read_bytes() for name in files.names(folder) if "tfevents" in name]
    assert [b"loss" in each for each in events] == [True, True]
    assert list(pathlib.Path(tempfile.gettempdir()).glob("jaxdiff-scratch-*/events*")) == []


def test_what_was_logged_is_there_before_a_checkpoint_and_a_profile_comes(
    folder, tmp_path, monkeypatch
):
    optimizer, seen = optax.sgd(0.1), []
    update = jax.jit(
        training.make_update(
            lambda params, key, batch: ((batch["x0"] * params["w"]) ** 2, {}),
            optimizer,
            ema_decay=0.9,
        )
    )
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda *given: (seen.append(steps_in(folder)), save(*given))
    )
    log = run.MetricsParts(folder / run.METRICS, after=0)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        loop.fit(
            training.init({"w": jnp.ones(())}, optimizer, ema_decay=0.9),
            Steps(update),
            jax.random.key(0),
            ({"x0": jnp.full(4, float(i))} for i in itertools.count()),
            num_steps=6,
            checkpoints=checkpoints,
            config={},
            cadence=training.Cadence(log=2, save=4),
            telling=Telling(log, profile=(folder / "profile", 1)),
        )
    log.close()
    assert seen == [[2, 4], [2, 4, 6]]
    assert any(name.endswith(".xplane.pb") for name in files.names(folder / "profile"))


# --- Records, exports, pictures -------------------------------------------------------------


def test_a_record_is_written_read_and_held_against(folder):
    assert run.read_record(folder) is None
    run.write_record(folder, {"width": 3, "data_dir": "a"}, free=("data_dir",), also={"shape": [1]})
    assert files.names(folder) == ["config.json"]
    assert run.recorded(folder).config == {"width": 3, "data_dir": "a"}
    asked = {"width": 3, "data_dir": "b"}
    assert run.reconcile(folder, asked, free=("data_dir",)) == asked
    with pytest.raises(folders.RunError, match=r"(?s)://bucket/a run/.*there 3, asked 4"):
        run.reconcile(folder, {**asked, "width": 4}, free=("data_dir",))
    assert folders.existing_run(str(folder)) == folder
    with pytest.raises(folders.RunError, match=r"config\.json is an object"):
        folders.existing_run(folder / "config.json")
    with pytest.raises(folders.RunError, match=r"/none does not exist\."):
        command.existing(str(folder / "none"))
    assert command.defaults_of(["--run-dir", str(folder)], {"a": 1}, lambda found: found) == (
        {"width": 3, "data_dir": "a"},
        "a",
    )


def test_a_finished_run_of_a_command_is_finished_the_second_time(folder, capsys, monkeypatch):
    with contextlib.ExitStack() as claims:
        monkeypatch.setattr(command, "_claims", claims)
        assert command.open_run(str(folder), {"seed": 0}) == folder
        files.write_text(folder / command.REPORT, "done")
        assert command.open_run(str(folder), {"seed": 0}) is None
    assert f"Report: {folder}/report.md" in capsys.readouterr().out
    evaluations.write(folder, {"step": 3, "average": "main"}, {"nll": 2.0}, "report")
    assert evaluations.is_judged(folder, 3)
    assert evaluations.numbers(folder) == {"step": 3, "nll": 2.0}
    evaluations.outdate(folder)
    assert not evaluations.is_judged(folder, 3)


def test_exports_and_figures_are_those_of_a_disk(folder, tmp_path):
    params = {"block": {"w": jnp.ones((2, 3), jnp.bfloat16)}}
    for place in (folder, tmp_path):
        export.export_params(place / "p.npz", params, {"width": 3})
        plotting.save_curve(place / "loss.png", [1, 2], [0.5, 0.25], title="a", ylabel="b")
        plotting.save_sheet(place / "grid.png", np.zeros((3, 8, 8, 1), np.uint8))
    assert contents(folder) == contents(tmp_path)
    found, config = export.import_params(str(folder / "p.npz"))
    assert (found["block"]["w"].dtype, config) == (jnp.bfloat16, {"width": 3})


def test_a_folder_of_samples_is_filled_and_gone_on_with(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_folders, "PER_FILE", 4)

    def fill(place, num):
        drawn = []

        def draw(first, last):
            drawn.append(first)
            return np.arange(first, last, dtype=np.uint8)[:, None, None, None]

        out, labels = sample_folders.Out.asked(str(place)), np.arange(num) % 3
        out.write(lambda: {"seed": 0, "num": num}, draw, labels, (1, 1, 1), progress=False)
        return drawn

    assert fill(tmp_path / "x", 10) == fill(folder, 10) == [0, 4, 8]
    files.write_text(folder / "00000004-00000008.npz", "damaged")
    assert fill(folder, 10) == [4]
    assert fill(tmp_path / "x", 11) == fill(folder, 11) == [8]
    assert fill(folder, 11) == []
    assert contents(folder) == contents(tmp_path / "x")
    images, _ = sample_folders.read(folder)
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(11))
    with pytest.raises(command.Refusal, match="holds other images: num 11"):
        fill(folder, 9)


# --- Stored latents -------------------------------------------------------------------------

COUNT, SIZE = 5, 2


def make(first, last):
    rows = np.arange(first, last)
    return {
        "mean": rows[:, None] * np.ones(3, np.float32),
        "deviation": jnp.asarray(rows, jnp.bfloat16),
    }


@pytest.mark.parametrize("kind", ["shards", "whole"])
def test_stored_arrays_are_those_of_a_disk_and_are_drawn_from(folder, tmp_path, kind):
    def write(place):
        if kind == "shards":
            stored.write_shards(place, COUNT, make, shard_size=SIZE, attributes={"scale": 2.0})
        else:
            halves = [make(0, 3), make(3, COUNT)]
            stored.write(place, halves, shard_size=SIZE, attributes={"scale": 2.0})

    folder, local = folder / kind, tmp_path / "local"
    write(str(folder))
    write(local)
    assert contents(folder) == contents(local)
    found = stored.open(str(folder))
    assert (len(found), found.attributes, found.title) == (COUNT, {"scale": 2.0}, str(folder))
    for name, array in stored.open(local).rows(np.array([4, 0, 2])).items():
        np.testing.assert_array_equal(found.rows(np.array([4, 0, 2]))[name], array)
    files.write_text(folder / "00001-0.npy", "damaged")
    with pytest.raises(data.UnreadableError, match=rf"{folder}/00001-0.npy is damaged"):
        stored.open(folder)


def test_shards_that_a_kill_left_stay_and_what_is_damaged_is_made_again(folder):
    asked = []

    def killed(first, last):
        asked.append(first)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return make(first, last)

    with pytest.raises(KeyboardInterrupt):
        stored.write_shards(folder, COUNT, killed, shard_size=SIZE)
    with pytest.raises(data.NotPreparedError, match="2 of 3 shards are there"):
        stored.open(folder)
    path = folder / "00000-0.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    stored.write_shards(folder, COUNT, killed, shard_size=SIZE)
    assert asked == [0, 2, 4, 0, 4]
    before = contents(folder)
    stored.write_shards(folder, COUNT, killed, shard_size=SIZE)
    assert (len(asked), contents(folder)) == (5, before)
    with pytest.raises(ValueError, match="`num_examples` must be as when"):
        stored.write_shards(folder, COUNT + 1, make, shard_size=SIZE)
    with pytest.raises(FileExistsError):
        stored.write(folder, [make(0, 3)])


def test_what_was_written_whole_has_its_index_last(folder, monkeypatch):
    with monkeypatch.context() as patch:  # killed: nothing is cleared away
        patch.setattr(files, "remove_tree", lambda folder: None)
        with pytest.raises(ZeroDivisionError):
            stored.write(folder, (make(0, 3 // (1 - i)) for i in range(2)), shard_size=1)
    assert len(files.names(folder)) == 6
    with pytest.raises(data.NotPreparedError, match="not finished"):
        stored.open(folder)
    stored.write(folder, [make(0, 2)])
    assert files.names(folder) == ["00000-0.npy", "00000-1.npy", "index.json"]
    with pytest.raises(FileExistsError, match="holds something already"):
        stored.write(folder, [make(0, 2)])
    with pytest.raises(ZeroDivisionError):
        stored.write(folder / "b", (make(0, 3 // (1 - i)) for i in range(2)), shard_size=1)
    assert files.names(folder / "b") == []


# --- Ablations ------------------------------------------------------------------------------


def test_groups_of_an_ablation_are_stored_and_claimed_alike(folder, tmp_path, monkeypatch, capsys):
    ablation = MAKERS["losses"]()["smoke"]
    ablation = dataclasses.replace(ablation, seeds=2)
    resolved = record("losses", "smoke", ablation)
    for place in (folder, tmp_path):
        there = groups_of.claim(place, resolved, ablation)
        for group in groups(there):
            assert groups_of.read_group(place, there, group) is None
            rows = [
                {
                    **groups_of.as_json(values),
                    "hash": groups_of.row_hash(there, groups_of.replaced(group.config, values)),
                    **dict.fromkeys((*there.measures, *groups_of.COSTS), 1.0),
                }
                for values in group.rows()
            ]
            seconds = dict.fromkeys(("compile", "train", "judge"), 1.0)
            result = {"group": group.index, "rows": rows, "seconds": seconds, "environment": {}}
            groups_of.write_group(place, group, result)
        if str(folder).startswith("gs"):  # drawing takes its time
            ablate.run_groups(place, resolved, ablation, groups(ablation))
    assert contents(folder) == contents(tmp_path)
    again = groups_of.claim(folder, resolved, ablation)
    assert len(groups_of.read_groups(folder, again)) == len(groups(ablation))
    with pytest.raises(command.Refusal, match="holds another ablation"):
        groups_of.claim(folder, record("losses", "full", ablation), ablation)
    assert ablate.main(["status", str(folder)]) == 0
    assert "groups done" in capsys.readouterr().out


def test_a_store_that_cannot_be_read_is_refused_by_its_option(monkeypatch, capsys):
    assert ablate.main(["status", "ftp://bucket/a"]) == 1
    assert "the folder cannot be used: a URL must be like gs://" in capsys.readouterr().err
    with pytest.raises(command.Refusal, match="--out cannot be used: a URL must be like"):
        sample_folders.Out.asked("gs://")

    def missing(url):
        raise ImportError("No module named 'gcsfs'", name="gcsfs")

    monkeypatch.setattr("jaxdiff.files.stores.StorePath.of", missing)
    with pytest.raises(folders.RunError, match=r"pip install 'jaxdiff\[stores\]'"):
        folders.of_run("gs://bucket/run")
