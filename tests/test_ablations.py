"""Ablations through their command line: the same bytes whoever runs what, in whatever order."""

import dataclasses
import json
import pathlib
import shutil
import time

import jax
import numpy as np
import pytest
from ablation_cases import rows_of, snapshot

from experiments import ablate
from experiments.ablations import store
from experiments.ablations.catalogue import MAKERS
from experiments.ablations.definition import cells, groups, row_hash
from jaxdiff.training.run import config_hash


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
    _, ablation = ablate.reopen(copy, None)
    group = groups(ablation)[1]
    result = store.read_group(copy, ablation, group)
    result["rows"][1]["wasserstein"] += 1e-6
    store.write_group(copy, group, result)
    assert ablate.main(["report", str(copy)]) == 0
    capsys.readouterr()
    assert ablate.main(["verify", str(copy), "--quiet"]) == 1
    said = capsys.readouterr()
    (differing,) = [line for line in said.out.splitlines() if "DIFFERS  loss=" in line]
    assert "wasserstein: there" in differing
    assert "does not reproduce" in said.err


def seal(content):
    return json.dumps({**content, "checksum": config_hash(content)})


def damage(name, text, other):
    """Return the text of a group's file after one of the ways to spoil it."""
    content = json.loads(text)
    content.pop("checksum")
    first = content["rows"][0]
    if name == "empty":
        return seal({**content, "rows": []})
    if name == "row lost":
        return seal({**content, "rows": content["rows"][1:]})
    if name == "rows swapped":
        return seal({**content, "rows": content["rows"][::-1]})
    if name == "not a number":
        return seal({**content, "rows": [{**first, "wasserstein": "1"}, *content["rows"][1:]]})
    if name == "value":
        at = text.index('"wasserstein": ') + len('"wasserstein": ') + 4
        return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    return {"copy": other, "cut": text[: len(text) // 2], "list": "[]", "sealed": "{}"}[name]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("empty", "holds 0 rows for 4"),
        ("row lost", "holds 3 rows for 4"),
        ("rows swapped", "rows are not those of this group"),
        ("not a number", "no finite wasserstein"),
        ("value", "checksum"),
        ("copy", "copy of group 1"),
        ("cut", "cannot be read"),
        ("list", "holds no object"),
        ("sealed", "has no `group`"),
    ],
)
def test_a_group_that_is_not_what_was_written_is_corrupt(name, told, tmp_path, smoke, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(smoke("coupling"), copy)
    path, other = (copy / "groups" / f"00{i}.json" for i in range(2))
    path.write_text(damage(name, path.read_text(), other.read_text()))
    before = path.read_bytes()
    again = ["coupling", "--preset", "smoke", "--run-dir", str(copy)]
    for command in (["status", str(copy)], ["report", str(copy)], ["verify", str(copy)], again):
        assert ablate.main(command) == 1
        said = capsys.readouterr()
        assert f"{path} is corrupt: " in said.err
        assert told in said.err
        assert "remove it to run anew" in said.err
        assert command[0] != "status" or "1 of 2 groups done, 4 of 8 rows" in said.out
    assert path.read_bytes() == before


def test_stray_files_and_links_in_the_way_are_left_alone(tmp_path, smoke, capsys):
    copy, outside = tmp_path / "copy", tmp_path / "outside"
    shutil.copytree(smoke("coupling"), copy)
    outside.write_text("mine")
    (copy / "groups" / ".DS_Store").write_text("stray")
    (copy / "groups" / "002.json").write_text("stray")
    for name in (".results.csv..tmp", ".report.md..tmp", ".results.csv.0of1.tmp"):
        (copy / name).symlink_to(outside)
    before = snapshot(smoke("coupling"))
    assert ablate.main(["report", str(copy)]) == 0
    assert "2 of 2 groups done" in capsys.readouterr().out + status_of(copy, capsys)
    assert outside.read_text() == "mine"
    assert (copy / "results.csv").read_bytes() == before["results.csv"]


def status_of(folder, capsys):
    assert ablate.main(["status", str(folder)]) == 0
    return capsys.readouterr().out


def test_reading_a_folder_runs_nothing_that_it_names(tmp_path, smoke, capsys, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(smoke("coupling"), copy)
    (tmp_path / "planted.py").write_text(
        f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from experiments.ablations.catalogue import MAKERS\n"
        "COUPLING = MAKERS['coupling']()\n"
        "LOSSES = MAKERS['losses']()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    lock = json.loads((copy / "ablation.json").read_text())
    lock.pop("hash")
    lock["name"] = "planted:COUPLING"
    (copy / "ablation.json").write_text(json.dumps({"hash": config_hash(lock), **lock}))
    for name in ("status", "report", "verify"):
        assert ablate.main([name, str(copy)]) == 1
        assert "--definition planted:COUPLING" in capsys.readouterr().err
        assert ablate.main([name, str(copy), "--definition", "losses"]) == 1
        assert "holds another ablation" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert ablate.main(["status", str(copy), "--definition", "planted:COUPLING"]) == 0
    assert (tmp_path / "ran").exists()


def test_rows_of_other_random_numbers_are_not_mixed_in(smoke, capsys):
    folder = smoke("coupling")
    again = ["coupling", "--preset", "smoke", "--run-dir", str(folder)]
    with jax.default_prng_impl("rbg"):
        for command in (again, ["verify", str(folder)]):
            assert ablate.main(command) == 1
            told = capsys.readouterr().err
            assert "JAX_DEFAULT_PRNG_IMPL: there threefry2x32, here rbg" in told
        assert ablate.main(["status", str(folder)]) == 0


def test_fields_that_configs_gain_do_not_orphan_a_folder(tmp_path, smoke):
    copy = tmp_path / "copy"
    shutil.copytree(smoke("coupling"), copy)
    lock = json.loads((copy / "ablation.json").read_text())
    for key in ("hash", "base.grid_size"):  # as if grid_size had been added since
        lock.pop(key)
    (copy / "ablation.json").write_text(json.dumps({"hash": config_hash(lock), **lock}))
    _, ablation = ablate.reopen(copy, None)
    assert ablation.hashed == {key[5:] for key in lock if key.startswith("base.")} | {"seed"}
    for group in groups(ablation):
        path = copy / "groups" / f"{group.index:03d}.json"
        content = json.loads(path.read_text())
        content.pop("checksum")
        for row, values in zip(content["rows"], group.rows(), strict=True):
            row["hash"] = row_hash(ablation, dataclasses.replace(group.config, **values))
        path.write_text(seal(content))
    assert ablate.main(["report", str(copy)]) == 0
    assert ablate.main(["coupling", "--preset", "smoke", "--run-dir", str(copy)]) == 0


def test_what_was_committed_is_sound_and_its_tables_are_those_of_its_groups():
    root = pathlib.Path(ablate.__file__).parent / "results" / "ablations"
    folders = sorted(root.iterdir())
    assert len(folders) == 6
    for folder in folders:
        _, ablation = ablate.reopen(folder, None)
        results = store.read_groups(folder, ablation)
        assert len(results) == len(groups(ablation))
        assert ablate.table_differs(folder, ablation, results) == 0


def test_a_full_disk_is_a_sentence_and_hurts_no_report(tmp_path, smoke, capsys, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(smoke("coupling"), copy)

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("jaxdiff.files.write_text", full)
    assert ablate.main(["report", str(copy)]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert str(copy) in said
    monkeypatch.undo()
    assert ablate.main(["report", str(copy)]) == 0


def test_a_changed_table_is_told_from_its_groups(tmp_path, smoke, capsys):
    folder, copy = smoke("coupling"), tmp_path / "copy"
    shutil.copytree(folder, copy)
    _, ablation = ablate.reopen(copy, None)
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
