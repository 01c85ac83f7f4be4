"""Ablations through their command line: the same bytes whoever runs what, in whatever order."""

import json
import shutil
import time

import jax
import numpy as np
import pytest
from ablation_cases import rows_of, snapshot

from experiments import ablate
from experiments.ablations import store
from experiments.ablations.catalogue import MAKERS
from experiments.ablations.definition import cells


@pytest.fixture(autouse=True)
def as_users_run_it():
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Return a function that runs the smoke of an ablation, once, and gives its folder."""
    folders = {}

    def run(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            options = ["--preset", "smoke", "--quiet", "--run-dir", str(folders[name])]
            assert ablate.main([name, *options]) == 0
        return folders[name]

    return run


# --- Every ready ablation -------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_the_smoke_ends_with_tables_comparisons_and_figures(name, smoke):
    start = time.perf_counter()
    folder = smoke(name)
    print(f"{name}: {time.perf_counter() - start:.1f} s")
    ablation = MAKERS[name]()["smoke"]
    rows = rows_of(folder)
    assert len(rows) == len(cells(ablation)) * ablation.seeds
    for row in rows:
        for measure in ablation.measures:
            assert np.isfinite(float(row[measure]))
            assert float(row[f"{measure}_stderr"]) >= 0.0
        assert float(row["train_flops"]) > 0.0
    assert len({row["hash"] for row in rows}) == len(rows)
    report = (folder / "report.md").read_text()
    figures = sorted(path.name for path in folder.glob("*.png"))
    assert figures
    assert all(f"]({figure})" in report for figure in figures)
    whole = json.loads((folder / "results.json").read_text())
    assert [row["hash"] for row in whole["rows"]] == [row["hash"] for row in rows]
    found = json.loads((folder / "environment.json").read_text())
    assert {"versions", "device", "git_commit"} <= found[0]["environment"].keys()
    assert {path.name for path in folder.iterdir()} >= {"timings.csv", "ablation.json"}


def test_the_full_presets_are_what_the_smoke_presets_are_of():
    for make in MAKERS.values():
        presets = make()
        assert presets.keys() == {"full", "smoke"}
        assert set(presets["smoke"].axes) <= set(presets["full"].axes)
        assert set(presets["smoke"].measures) <= set(presets["full"].measures)
        for ablation in presets.values():
            ablation.check()


# --- The same bytes -------------------------------------------------------------------------


def test_shards_in_any_order_give_the_bytes_of_one_run(tmp_path, smoke, capsys):
    options = ["coupling", "--preset", "smoke", "--quiet", "--run-dir", str(tmp_path)]
    assert ablate.main([*options, "--shard", "2/2"]) == 0
    assert "1 of 2 groups are done" in capsys.readouterr().out
    first = (tmp_path / "groups" / "000.json").stat().st_mtime_ns
    assert "missing" in (tmp_path / "report.md").read_text()
    assert len(rows_of(tmp_path)) == 4
    assert ablate.main([*options, "--shard", "1/2"]) == 0
    assert (tmp_path / "groups" / "000.json").stat().st_mtime_ns == first
    assert snapshot(tmp_path) == snapshot(smoke("coupling"))


def test_a_finished_folder_is_left_alone_and_another_ablation_refused(smoke, capsys):
    folder = smoke("coupling")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    options = ["coupling", "--preset", "smoke", "--run-dir", str(folder)]
    assert ablate.main(options) == 0
    assert ablate.main([*options, "--seeds", "3"]) == 1
    assert "seeds: there [0, 1], asked [0, 1, 2]" in capsys.readouterr().err
    assert ablate.main(["coupling", "--run-dir", str(folder)]) == 1
    told = capsys.readouterr().err
    assert "preset: there smoke, asked full" in told
    assert "base.num_steps" in told
    assert ablate.main(["losses", "--preset", "smoke", "--run-dir", str(folder)]) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def change_a_digit(path, number):
    text = path.read_text()
    at = text.index(number)
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


def test_verify_passes_and_finds_a_row_that_was_changed(tmp_path, smoke, capsys):
    folder = smoke("coupling")
    assert ablate.main(["verify", str(folder), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert said.count("reproduces  loss=") == 4
    assert "1 of 2 groups ran again: every row reproduces exactly" in said
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "groups" / "000.json").unlink()  # so that the other is what is chosen
    path = copy / "groups" / "001.json"
    value = json.loads(path.read_text())["rows"][1]["wasserstein"]
    change_a_digit(path, repr(value)[4:])
    assert ablate.main(["report", str(copy)]) == 0
    capsys.readouterr()
    assert ablate.main(["verify", str(copy), "--quiet"]) == 1
    said = capsys.readouterr()
    (differing,) = [line for line in said.out.splitlines() if "DIFFERS  loss=" in line]
    assert "wasserstein: there" in differing
    assert "does not reproduce" in said.err


def test_a_changed_table_is_told_from_its_groups(tmp_path, smoke, capsys):
    folder, copy = smoke("coupling"), tmp_path / "copy"
    shutil.copytree(folder, copy)
    _, ablation = ablate.reopen(copy)
    results = store.read_groups(copy, ablation)
    assert ablate.table_differs(copy, ablation, results) == 0
    change_a_digit(copy / "results.csv", rows_of(copy)[5]["wasserstein"][2:])
    assert ablate.table_differs(copy, ablation, results) == 1
    assert "results.csv line 7" in capsys.readouterr().out


def test_what_cannot_be_asked_is_refused_and_touches_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    for options, told in (
        (["--only", "los=sliced"], "no axis los; nearest: loss"),
        (["--only", "loss=slicd"], "no value slicd; nearest: sliced"),
        (["--only", "loss"], "AXIS=VALUE"),
        (["--shard", "3/2"], "--shard must be i/n"),
        (["--shard", "one"], "--shard must be i/n"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
    ):
        assert ablate.main(["losses", "--preset", "smoke", "--run-dir", str(folder), *options]) == 1
        assert told in capsys.readouterr().err
    for name in ("status", "report", "verify"):
        assert ablate.main([name, str(folder)]) == 1
        assert "no ablation" in capsys.readouterr().err
    assert not folder.exists()


# --- Status, report, statistics -------------------------------------------------------------


def test_status_and_report_say_what_is_done(tmp_path, smoke, capsys):
    folder = smoke("coupling")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "groups" / "001.json").unlink()
    capsys.readouterr()
    assert ablate.main(["status", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 groups done, 4 of 8 rows" in said
    assert "missing  loss=flow_matching_ot" in said
    assert ablate.main(["report", str(copy)]) == 0
    assert "1 of 2 groups missing" in (copy / "report.md").read_text()
    assert len(rows_of(copy)) == 4
    (copy / "groups" / "000.json").unlink()
    assert ablate.main(["report", str(copy)]) == 1
    assert "no finished group" in capsys.readouterr().err
