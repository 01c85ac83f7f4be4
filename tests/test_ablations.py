"""Ablations through their command line: the same bytes whoever runs what, in whatever order."""

import dataclasses
import json
import pathlib
import shutil
import time

import ablation_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ablation_cases import NAME, TOLD, made_once, relative, snapshot, train_alone
from cases import rows_of

from experiments import ablate
from experiments.ablations import images, plots, store, training
from experiments.ablations.catalogue import MAKERS
from experiments.ablations.definition import cells, groups, record, row_hash
from experiments.ablations.results import ordered_rows
from experiments.ablations.world import Shared
from experiments.common.command import Refusal
from experiments.common.options import later as later_field
from jaxdiff import data
from jaxdiff.training.run import config_hash


@pytest.fixture(scope="module", autouse=True)
def ready():
    with made_once():
        yield


pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture
def undrawn(monkeypatch):
    """Reports have no figures."""
    monkeypatch.setattr(plots, "draw", lambda table, folder: [])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Return the folder of an ablation that takes no time, finished."""
    folder = tmp_path_factory.mktemp("quick")
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        assert run(folder) == 0
    return folder


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Return a function that runs the smoke of an ablation once; its folder and what trained."""
    folders, trained = {}, []

    def kept(*args, real=training.train):
        trained.append(real(*args))
        return trained[-1]

    def made(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "train", kept)
                options = ["--preset", "smoke", "--quiet", "--run-dir", str(folder)]
                assert ablate.main([name, *options]) == 0
            folders[name] = folder, trained[-1]
        return folders[name]

    return made


def run(folder, *options, name=NAME):
    return ablate.main([name, "--quiet", "--run-dir", str(folder), *options])


# --- Every ready ablation -------------------------------------------------------------------


def but(fast, slow=pytest.mark.slow):
    """Return the names of the ready ablations, all but some of which are slow."""
    return [name if name in fast else pytest.param(name, marks=slow) for name in MAKERS]


@pytest.mark.parametrize("name", but({"ends"}))
def test_the_smoke_ends_with_tables_comparisons_and_figures(name, smoke):
    start = time.perf_counter()
    folder, _ = smoke(name)
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


def test_images_side_by_side_are_what_a_run_of_digits_is(smoke):
    _, trained = smoke("ends")
    ablation = MAKERS["ends"]()["smoke"]
    (group,) = groups(ablation)
    config = dataclasses.replace(ablation.base, decay_steps=6, **group.members[3])
    assert (config.beta_max, config.seed) == (20.0, 1)
    train = data.load_images("digits", "train")
    model = images.image_model.build_model(config, train)
    drawn = data.batches(train, config.batch_size, seed=config.seed)
    loss = images.image_model.build_loss(config, model, train.num_levels)
    alone = train_alone(config, drawn, model.init_params, loss)
    assert relative(jax.tree.map(lambda x: x[3], trained.ema), alone) < 1e-5


@pytest.mark.parametrize("name", but(MAKERS.keys() - {"prediction_wide"}))
def test_the_full_presets_are_what_the_smoke_presets_are_of(name):
    presets = MAKERS[name]()
    assert presets.keys() == {"full", "smoke"}
    assert set(presets["smoke"].axes) <= set(presets["full"].axes)
    assert set(presets["smoke"].measures) <= set(presets["full"].measures)
    for ablation in presets.values():
        ablation.check()


# --- The same bytes -------------------------------------------------------------------------


def test_shards_in_any_order_give_the_bytes_of_one_run(tmp_path, quick, capsys):
    assert run(tmp_path, "--shard", "2/2") == 0
    assert "1 of 2 groups are done" in capsys.readouterr().out
    first = (tmp_path / "groups" / "000.json").stat().st_mtime_ns
    assert "missing" in (tmp_path / "report.md").read_text()
    assert len(rows_of(tmp_path)) == 4
    assert run(tmp_path, "--shard", "1/2") == 0
    assert (tmp_path / "groups" / "000.json").stat().st_mtime_ns == first
    assert snapshot(tmp_path) == snapshot(quick)


@pytest.mark.slow
def test_a_network_reproduces_in_another_run(tmp_path, smoke):
    options = ["coupling", "--preset", "smoke", "--quiet", "--run-dir", str(tmp_path)]
    for shard in ("2/2", "1/2"):
        assert ablate.main([*options, "--shard", shard]) == 0
    assert snapshot(tmp_path) == snapshot(smoke("coupling")[0])
    assert ablate.main(["verify", str(tmp_path), "--quiet"]) == 0


def test_a_finished_folder_is_left_alone_and_another_ablation_refused(quick, capsys):
    before = {path: path.stat().st_mtime_ns for path in quick.rglob("*")}
    assert run(quick) == 0
    assert run(quick, "--seeds", "3") == 1
    assert "seeds: there [0, 1], asked [0, 1, 2]" in capsys.readouterr().err
    assert run(quick, "--preset", "smoke", name="coupling") == 1
    told = capsys.readouterr().err
    assert "preset: there full, asked smoke" in told
    assert "base.width: there 64, asked 8" in told
    assert run(quick, name="ablation_cases:OTHER") == 1
    assert "axis.learning_rate: there [0.0015, 0.01], asked None" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in quick.rglob("*")} == before


def change_a_digit(path, number):
    text = path.read_text()
    at = text.index(number)
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


@pytest.mark.usefixtures("undrawn")
def test_verify_passes_and_finds_a_row_that_was_changed(tmp_path, quick, capsys):
    assert ablate.main(["verify", str(quick), "--quiet", *TOLD]) == 0
    said = capsys.readouterr().out
    assert said.count("reproduces  loss=") == 4
    assert "1 of 2 groups ran again: every row reproduces exactly" in said
    copy = tmp_path / "copy"
    shutil.copytree(quick, copy)
    (copy / "groups" / "000.json").unlink()  # so that the other is what is chosen
    _, ablation = ablate.reopen(copy, NAME)
    group = groups(ablation)[1]
    result = store.read_group(copy, ablation, group)
    result["rows"][1]["norm"] += 1e-6
    store.write_group(copy, group, result)
    assert ablate.main(["report", str(copy), *TOLD]) == 0
    capsys.readouterr()
    assert ablate.main(["verify", str(copy), "--quiet", *TOLD]) == 1
    said = capsys.readouterr()
    (differing,) = [line for line in said.out.splitlines() if "DIFFERS  loss=" in line]
    assert "norm: there" in differing
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
        return seal({**content, "rows": [{**first, "norm": "1"}, *content["rows"][1:]]})
    if name == "value":
        at = text.index('"norm": ') + len('"norm": ') + 4
        return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    return {"copy": other, "cut": text[: len(text) // 2], "list": "[]", "sealed": "{}"}[name]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("empty", "holds 0 rows for 4"),
        ("row lost", "holds 3 rows for 4"),
        ("rows swapped", "rows are not those of this group"),
        ("not a number", "no finite norm"),
        ("value", "checksum"),
        ("copy", "copy of group 1"),
        ("cut", "cannot be read"),
        ("list", "holds no object"),
        ("sealed", "has no `group`"),
    ],
)
def test_a_group_that_is_not_what_was_written_is_corrupt(name, told, tmp_path, quick, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(quick, copy)
    path, other = (copy / "groups" / f"00{i}.json" for i in range(2))
    path.write_text(damage(name, path.read_text(), other.read_text()))
    before = path.read_bytes()
    reading = [[name, str(copy), *TOLD] for name in ("status", "report", "verify")]
    for command in (*reading, [NAME, "--run-dir", str(copy)]):
        assert ablate.main(command) == 1
        said = capsys.readouterr()
        assert f"{path} is corrupt: " in said.err
        assert told in said.err
        assert "remove it to run anew" in said.err
        assert command[0] != "status" or "1 of 2 groups done, 4 of 8 rows" in said.out
    assert path.read_bytes() == before


@pytest.mark.usefixtures("undrawn")
def test_stray_files_and_links_in_the_way_are_left_alone(tmp_path, quick, capsys):
    copy, outside = tmp_path / "copy", tmp_path / "outside"
    shutil.copytree(quick, copy)
    outside.write_text("mine")
    (copy / "groups" / ".DS_Store").write_text("stray")
    (copy / "groups" / "002.json").write_text("stray")
    for name in (".results.csv..tmp", ".report.md..tmp", ".results.csv.0of1.tmp"):
        (copy / name).symlink_to(outside)
    before = snapshot(quick)
    assert ablate.main(["report", str(copy), *TOLD]) == 0
    assert "2 of 2 groups done" in capsys.readouterr().out + status_of(copy, capsys)
    assert outside.read_text() == "mine"
    assert (copy / "results.csv").read_bytes() == before["results.csv"]


def status_of(folder, capsys):
    assert ablate.main(["status", str(folder), *TOLD]) == 0
    return capsys.readouterr().out


def test_reading_a_folder_runs_nothing_that_it_names(tmp_path, quick, capsys, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(quick, copy)
    (tmp_path / "planted.py").write_text(
        f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from ablation_cases import QUICK as MINE\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    lock = json.loads((copy / "ablation.json").read_text())
    lock.pop("hash")
    lock["name"] = "planted:MINE"
    (copy / "ablation.json").write_text(json.dumps({"hash": config_hash(lock), **lock}))
    for name in ("status", "report", "verify"):
        assert ablate.main([name, str(copy)]) == 1
        assert "--definition planted:MINE" in capsys.readouterr().err
        assert ablate.main([name, str(copy), "--definition", "losses"]) == 1
        assert "holds another ablation" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert ablate.main(["status", str(copy), "--definition", "planted:MINE"]) == 0
    assert (tmp_path / "ran").exists()


def test_rows_of_other_random_numbers_are_not_mixed_in(quick, capsys):
    with jax.default_prng_impl("rbg"):
        for command in ([NAME, "--run-dir", str(quick)], ["verify", str(quick), *TOLD]):
            assert ablate.main(command) == 1
            told = capsys.readouterr().err
            assert "JAX_DEFAULT_PRNG_IMPL: there threefry2x32, here rbg" in told
        assert ablate.main(["status", str(quick), *TOLD]) == 0


def grown(ablation, **values):
    """Return an ablation of a later version, whose configs have two more fields."""
    fields = [("since", float, later_field(1.0)), ("also", tuple[int, ...], (1, 2))]
    kind = dataclasses.make_dataclass("Grown", fields, bases=(type(ablation.base),), frozen=True)
    world = ablation.world._replace(config=kind)
    base = kind(**dataclasses.asdict(ablation.base), **values)
    return dataclasses.replace(ablation, world=world, base=base)


COMMITTED = sorted((pathlib.Path(ablate.__file__).parent / "results" / "ablations").iterdir())


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_fields_that_configs_gain_do_not_orphan_what_was_committed(folder):
    lock, ablation = ablate.reopen(folder, None)
    before = [row["hash"] for row in rows_of(folder)]
    later = grown(ablation)
    there = store.as_there(folder, lock, record(lock["name"], lock["preset"], later), later)
    results = store.read_groups(folder, there)
    assert len(results) == len(groups(there))
    assert ablate.table_differs(folder, there, results) == 0
    assert [row["hash"] for row in ordered_rows(there, results)] == before
    other = grown(ablation, since=2.0)
    with pytest.raises(Refusal, match=r"base.since: there 1.0, asked 2.0"):
        store.as_there(folder, lock, record(lock["name"], lock["preset"], other), other)


def test_a_folder_goes_on_when_configs_gain_fields(tmp_path, quick, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(quick, copy)
    (copy / "groups" / "001.json").unlink()
    monkeypatch.setattr(ablation_cases, "QUICK", grown(ablation_cases.QUICK))
    assert "1 of 2 groups done" in status_of(copy, capsys)
    assert run(copy) == 0
    assert snapshot(copy) == snapshot(quick)
    assert ablate.main(["verify", str(copy), "--quiet", *TOLD]) == 0


def test_a_later_field_counts_in_a_row_where_it_is_off_its_default():
    ablation = grown(ablation_cases.QUICK)
    held = dataclasses.replace(ablation, hashed=frozenset(row_fields(ablation_cases.QUICK)))
    base, moved = ablation.base, dataclasses.replace(ablation.base, since=2.0)
    before = row_hash(ablation_cases.QUICK, ablation_cases.QUICK.base)
    assert row_hash(held, base) == before
    assert len({row_hash(ablation, base), row_hash(ablation, moved), before}) == 3
    assert row_hash(held, moved) != before
    assert "base.since" not in record("mine", "full", ablation)
    assert record("mine", "full", grown(ablation_cases.QUICK, since=2.0))["base.since"] == 2.0


def row_fields(ablation):
    return dataclasses.asdict(ablation.base)


def shared_out(**values):
    """Return an ablation with an axis of tuples, and of data that its members share."""
    fields = [("shares", tuple[float, ...], (0.5, 0.5))]
    base = ablation_cases.QUICK.base
    kind = dataclasses.make_dataclass("Shares", fields, bases=(type(base),), frozen=True)

    class Problem(ablation_cases.Point):
        def table(self, config):
            return {"own": super().table(config), "all": Shared(jnp.asarray(config.shares))}

        def batch(self, member, table, step):
            assert table["all"].arrays.shape == (2,)
            drawn = super().batch(member, table["own"], step)["x0"]
            return {"x0": drawn + table["all"].arrays}

    return dataclasses.replace(
        ablation_cases.QUICK,
        world=ablation_cases.QUICK.world._replace(config=kind, problem=Problem),
        base=kind(**{**dataclasses.asdict(base), **values}),
        axes={"shares": ((0.5, 0.5), (0, 1))},
    )


SHARED_OUT = shared_out()


@pytest.mark.usefixtures("undrawn")
def test_an_axis_of_tuples_has_rows_that_are_found_and_verified(tmp_path, capsys):
    name = "test_ablations:SHARED_OUT"
    assert run(tmp_path, name=name) == 0
    rows = rows_of(tmp_path)
    assert [row["shares"] for row in rows[::2]] == ["(0.5, 0.5)", "(0.0, 1.0)"]
    assert len({row["norm"] for row in rows}) == 4
    told = "--definition", name
    assert ablate.main(["verify", str(tmp_path), "--num", "2", "--quiet", *told]) == 0
    assert "every row reproduces exactly" in capsys.readouterr().out
    assert run(tmp_path, "--only", "shares=(0.0, 1.0)", name=name) == 0


def test_what_members_share_is_what_each_would_have_of_its_own():
    (group, _) = groups(SHARED_OUT)
    shared = training.train(SHARED_OUT.world.problem(group.config), group).ema

    class Owned(SHARED_OUT.world.problem):
        def table(self, config):
            return {"own": super().table(config)["own"], "all": np.asarray(config.shares)}

        def batch(self, member, table, step):
            return super().batch(member, {**table, "all": Shared(table["all"])}, step)

    owned = training.train(Owned(group.config), group).ema
    np.testing.assert_array_equal(shared["x"], owned["x"])
    assert np.ptp(np.asarray(shared["x"]), axis=0).min() > 0.0


def test_what_was_committed_is_sound_and_its_tables_are_those_of_its_groups():
    assert len(COMMITTED) == 8
    for folder in COMMITTED:
        _, ablation = ablate.reopen(folder, None)
        results = store.read_groups(folder, ablation)
        assert len(results) == len(groups(ablation))
        assert ablate.table_differs(folder, ablation, results) == 0


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_is_a_sentence_and_hurts_no_report(tmp_path, quick, capsys, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(quick, copy)

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as disk:
        disk.setattr("jaxdiff.files.write_text", full)
        assert ablate.main(["report", str(copy), *TOLD]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert str(copy) in said
    assert ablate.main(["report", str(copy), *TOLD]) == 0


def test_a_changed_table_is_told_from_its_groups(tmp_path, quick, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(quick, copy)
    _, ablation = ablate.reopen(copy, NAME)
    results = store.read_groups(copy, ablation)
    assert ablate.table_differs(copy, ablation, results) == 0
    change_a_digit(copy / "results.csv", rows_of(copy)[5]["norm"][2:])
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


@pytest.mark.usefixtures("undrawn")
def test_status_and_report_say_what_is_done(tmp_path, quick, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(quick, copy)
    (copy / "groups" / "001.json").unlink()
    capsys.readouterr()
    assert ablate.main(["status", str(copy), *TOLD]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 groups done, 4 of 8 rows" in said
    assert "missing  loss=flow_matching_ot" in said
    assert ablate.main(["report", str(copy), *TOLD]) == 0
    assert "1 of 2 groups missing" in (copy / "report.md").read_text()
    assert len(rows_of(copy)) == 4
    (copy / "groups" / "000.json").unlink()
    assert ablate.main(["report", str(copy), *TOLD]) == 1
    assert "no finished group" in capsys.readouterr().err
