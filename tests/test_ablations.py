"""Ablations through their command line: the same bytes whoever runs what, in whatever order."""

import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
from scipy import stats

from experiments import ablate, fitting, toy2d
from experiments.ablations import bench_seeds, images, judging, plane, statistics, store, training
from experiments.ablations.catalogue import MAKERS
from experiments.ablations.definition import Ablation, cells, fit_type, groups
from jaxdiff import data
from jaxdiff import training as library


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


def rows_of(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def snapshot(folder):
    """Return the bytes of all that reproduces: no seconds among them."""
    kept = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".csv", ".png")}
    kept.pop("timings.csv")
    kept["results.json"] = (folder / "results.json").read_bytes()
    groups_ = [json.loads(p.read_text())["rows"] for p in sorted(folder.glob("groups/*"))]
    return kept | {"groups": groups_}


TINY = dataclasses.replace(
    plane.Config(),
    width=8,
    depth=1,
    batch_size=32,
    num_steps=10,
    decay_steps=10,
    warmup_steps=2,
    eval_points=64,
    ema_decay=0.9,
)


def tiny(**options):
    given = {"base": TINY, "axes": {}, "measures": ("score_error",), "seeds": 2} | options
    return Ablation(question="", world=plane.WORLD, **given)


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


def kill_at_random(folder, times, rng):
    """Start the same command again and again, killing it, then let it end; return the kills."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(ablate.__file__)))
    command = [sys.executable, "-m", "experiments.ablate", "coupling", "--preset", "smoke"]
    command += ["--quiet", "--run-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": root}
    kills = 0
    for _ in range(times):
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(1.0, 9.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, check=True)
    return kills


def check_kills(tmp_path, smoke, times):
    kills = kill_at_random(tmp_path / "run", times, random.Random(times))
    print(f"{kills} kills")
    assert kills > 0
    assert snapshot(tmp_path / "run") == snapshot(smoke("coupling"))


def test_three_kills_change_nothing(tmp_path, smoke):
    check_kills(tmp_path, smoke, 3)


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path, smoke):
    check_kills(tmp_path, smoke, 10)


# --- Groups ---------------------------------------------------------------------------------


def relative(tree, other):
    gap = optax.tree.norm(jax.tree.map(lambda a, b: a - b, tree, other))
    return float(gap / optax.tree.norm(other))


def train_alone(config, batches, init_params, loss):
    optimizer = fitting.build_optimizer(config)
    decay = config.ema_decay
    state = library.init(init_params(), optimizer, ema_decay=decay)
    update = jax.jit(library.make_update(loss, optimizer, ema_decay=decay))
    for _ in range(config.num_steps):
        state, _ = update(state, jax.random.key(config.seed), next(batches))
    return state.ema


def test_seeds_and_rates_side_by_side_are_what_runs_of_toy2d_are():
    ablation = tiny(axes={"learning_rate": (1.5e-3, 1e-2)}, seeds=2)
    (group,) = groups(ablation)
    trained = training.train(ablation.world.problem(group.config), group)
    assert len(group.members) == 4
    assert trained.finite.all()
    for i, member in enumerate(group.members):
        config = dataclasses.replace(TINY, **member)
        model = toy2d.build_model(config)
        drawn = toy2d.batches(config, model.target, 0)
        alone = train_alone(config, drawn, model.init_params, toy2d.build_loss(config, model))
        assert relative(jax.tree.map(lambda x, i=i: x[i], trained.ema), alone) < 1e-5


def test_images_side_by_side_are_what_a_run_of_digits_is():
    base = dataclasses.replace(MAKERS["ends"]()["smoke"].base, decay_steps=6, ema_decay=0.9)
    ablation = Ablation("", images.WORLD, base, {"beta_max": (8.0, 20.0)}, ("frechet",), seeds=2)
    (group,) = groups(ablation)
    trained = training.train(ablation.world.problem(group.config), group)
    config = dataclasses.replace(base, **group.members[3])
    assert (config.beta_max, config.seed) == (20.0, 1)
    train = data.load_images("digits", "train")
    model = images.image_model.build_model(config, train)
    drawn = data.batches(train, config.batch_size, seed=config.seed)
    loss = images.image_model.build_loss(config, model, train.num_levels)
    alone = train_alone(config, drawn, model.init_params, loss)
    assert relative(jax.tree.map(lambda x: x[3], trained.ema), alone) < 1e-5


def test_neither_only_nor_shards_change_groups():
    ablation = MAKERS["prediction"]()["full"]
    whole = groups(ablation)
    assert len(whole) == 27
    assert [len(group.members) for group in whole] == [3] * 27
    for count in (1, 2, 5):
        for base in (0, 1):
            shards = [store.chosen(ablation, {}, (base + i, count)) for i in range(count)]
            assert sorted(g.index for shard in shards for g in shard) == list(range(27))
    only = ablate.parse_only(ablation, ["prediction=v", "process=vp", "process=flow"])
    found = store.chosen(ablation, only, (0, 1))
    assert len(found) == 6
    assert all(group == whole[group.index] for group in found)
    assert len(store.chosen(ablation, ablate.parse_only(ablation, ["seed=2"]), (0, 1))) == 27


def test_axes_of_sampling_and_of_numbers_share_a_group():
    ablation = tiny(
        axes={
            "loss": ("denoising", "sliced"),
            "ema_decay": (0.9, 0.5),
            "beta_max": (20.0, 10.0),
            "sampler": ("heun", "ddim"),
        }
    )
    made = groups(ablation)
    assert [group.fixed for group in made] == [{"loss": "denoising"}, {"loss": "sliced"}]
    assert len(made[0].members) == 2 * 2 * 2
    assert len(made[0].samplings) == 2


def test_an_axis_over_seeds_gives_them():
    ablation = tiny(axes={"seed": (3, 5, 11)})
    assert ablation.seed_values == (3, 5, 11)
    assert [member["seed"] for member in groups(ablation)[0].members] == [3, 5, 11]
    assert cells(ablation) == [{}]


def test_several_averages_come_of_one_run():
    base = dataclasses.replace(TINY, more_ema_decays=(0.0, 0.99), average=0.9)
    ablation = tiny(base=base, axes={"average": (0.0, 0.9, 0.99)})
    (group,) = groups(ablation)
    result = judging.run_group(ablation, group)
    by_average = {}
    for row in result["rows"]:
        by_average.setdefault(row["average"], []).append(row["score_error"])
    assert len({tuple(values) for values in by_average.values()}) == 3


def test_a_diverged_run_is_empty_and_hurts_no_other(tmp_path):
    ablation = tiny(axes={"weight_decay": (1e-4, 1e12)}, measures=("score_error",), seeds=2)
    base = dataclasses.replace(TINY, num_steps=30, learning_rate=1e3, warmup_steps=1)
    ablation = dataclasses.replace(ablation, base=base)
    (group,) = groups(ablation)
    rows = judging.run_group(ablation, group)["rows"]
    assert [row["score_error"] is None for row in rows][2:] == [True, True]
    table = statistics.tabulate(ablation, rows)
    assert statistics.summarize(table)[1]["score_error_mean"] is None
    assert statistics.compare(table, "score_error") == []


# --- Refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"axes": {"beta_mx": (1.0,)}}, ValueError, "beta_mx.*nearest: `beta_max`"),
        ({"axes": {"learning_rte": (1.0,)}}, ValueError, "nearest: `learning_rate`"),
        ({"axes": {"beta_max": (20.0, "big")}}, TypeError, "`beta_max` takes float; got 'big'"),
        ({"axes": {"width": (8, 8.5)}}, TypeError, "`width` takes int; got 8.5"),
        ({"axes": {"width": (8, True)}}, TypeError, "`width` takes int"),
        ({"axes": {"loss": ("denoising", "slicd")}}, ValueError, "nearest: 'sliced'"),
        ({"axes": {"width": (16,)}}, ValueError, "must hold the base's 8"),
        ({"axes": {"width": (8, 8)}}, ValueError, "each once"),
        ({"axes": {"beta_max": (20.0, float("nan"))}}, ValueError, "finite"),
        ({"measures": ("score_eror",)}, ValueError, "nearest: `score_error`"),
        ({"base": toy2d.Config()}, TypeError, "must be a .*plane.Config"),
        ({"seeds": 0}, ValueError, "needs a measure and a seed"),
    ],
)
def test_an_axis_that_cannot_be_meant_fails_before_anything_trains(options, error, match):
    with pytest.raises(error, match=match):
        tiny(**options)


def test_values_become_what_their_field_is():
    assert fit_type("x", float, 3) == 3.0
    assert isinstance(fit_type("x", float, 3), float)
    assert fit_type("x", tuple[float, ...], [1, 2]) == (1.0, 2.0)
    assert fit_type("x", float | None, None) is None


def test_an_ablation_of_ones_own_is_refused_or_run(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_ablation.py").write_text(
        "import dataclasses\n"
        "from experiments.ablations import plane\n"
        "from experiments.ablations.definition import Ablation\n"
        "def make(**axes):\n"
        "    base = plane.Config(width=8, depth=1, batch_size=16, num_steps=2, eval_points=16)\n"
        "    return Ablation('Mine?', plane.WORLD, base, axes, ('score_error',), seeds=1)\n"
        "MINE = make(clip_norm=(1.0, 2.0))\n"
        "BAD = make(batch_size=(16, -1))\n"
        "def __getattr__(name):\n"
        "    return make(clip_nrm=(1.0,))\n"
    )
    out = tmp_path / "out"
    for name, told in (
        ("WRONG", "nearest: `clip_norm`"),
        ("BAD", "--batch-size must be at least 1"),
    ):
        assert ablate.main([f"my_ablation:{name}", "--run-dir", str(out)]) == 1
        assert told in capsys.readouterr().err
        assert not out.exists()
    assert ablate.main(["my_ablation:MINE", "--run-dir", str(out)]) == 0
    assert [row["clip_norm"] for row in rows_of(out)] == ["1", "2"]
    assert ablate.main(["verify", str(out)]) == 0


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


def made_table(values, **axes):
    ablation = tiny(axes=axes, seeds=len(next(iter(values.values()))))
    rows = [
        {**dict(zip(axes, cell, strict=True)), "seed": i, "score_error": value}
        | {"nfe": None, "train_flops": 1.0, "sample_flops": None}
        for cell, each in values.items()
        for i, value in enumerate(each)
    ]
    return statistics.tabulate(ablation, rows)


def test_comparisons_are_paired_and_corrected():
    values = {
        (8,): [1.0, 2.0, 3.0, 4.0],
        (16,): [1.5, 2.4, 3.6, 4.5],
        (32,): [1.1, 1.8, 3.1, 4.2],
    }
    table = made_table(values, width=(8, 16, 32))
    found = statistics.compare(table, "score_error")
    wanted = [stats.ttest_rel(values[cell,], values[8,]) for cell in (16, 32)]
    for difference, test in zip(found, wanted, strict=True):
        assert difference.p == pytest.approx(test.pvalue)
        interval = test.confidence_interval()
        assert (difference.low, difference.high) == pytest.approx(tuple(interval))
    low, high = (test.pvalue for test in wanted)
    assert [d.corrected for d in found] == pytest.approx([2 * low, max(2 * low, high)])
    best, ties = statistics.best_of(table, "score_error")
    assert best == (8,)
    assert ties == {(32,)}
    mean, error = statistics.mean_and_error(table.values["score_error"][8,])
    assert (mean, error) == pytest.approx((2.5, stats.sem(values[8,])))


def test_an_axis_is_judged_with_the_others_averaged_over():
    values = {
        (8, 1): [1.0, 2.0],
        (8, 2): [2.0, 4.0],
        (16, 1): [2.0, 3.5],
        (16, 2): [3.0, 5.0],
    }
    table = made_table(values, width=(8, 16), depth=(1, 2))
    found = {each.name: each.mean for each in statistics.effects(table, "score_error")}
    assert found == pytest.approx({"width=16": 1.125, "depth=2": 1.375})


def test_the_bench_of_seeds_ends_with_a_ratio(monkeypatch, capsys):
    monkeypatch.setattr(bench_seeds, "_command", lambda folder, num, seed: (3.0 + num, 2.0 * num))
    bench_seeds.seeds(num=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["training alone 1.000", "ratio 0.438"]
