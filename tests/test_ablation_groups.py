"""What ablations are made of: groups, seeds side by side, comparisons; what kills do to them."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ablation_cases import (
    NAME,
    QUICK,
    made_once,
    relative,
    snapshot,
    told_untrained,
    train_alone,
)
from cases import rows_of
from scipy import stats

from experiments import ablate
from experiments.ablations import (
    images,
    judging,
    plane,
    plots,
    report,
    statistics,
    store,
    told,
    training,
)
from experiments.ablations.catalogue import MAKERS
from experiments.ablations.definition import Ablation, cells, groups, record
from experiments.ablations.fields import fit_type
from experiments.ablations.world import Member
from experiments.benches import seeds as seeds_bench
from experiments.common import optimization
from experiments.common.options import Role
from experiments.toy2d import model as toy2d
from jaxdiff import plotting
from jaxdiff import training as library
from jaxdiff.training.loop import STOPPED_EXIT_CODE


@pytest.fixture(scope="module", autouse=True)
def ready():
    with made_once():
        yield


pytestmark = pytest.mark.usefixtures("as_users_run_it")


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


# --- Groups ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_seeds_and_rates_side_by_side_are_what_runs_of_toy2d_are():
    axes = {"learning_rate": (1.5e-3, 1e-2), "ema_decay": (0.9, 0.5)}
    ablation = tiny(axes=axes, seeds=2)
    (group,) = groups(ablation)
    trained = training.train(ablation.world.problem(group.config), group)
    assert len(group.members) == 8
    assert trained.finite.all()
    for i, member in [(7, group.members[7])]:  # with each axis off its base
        config = dataclasses.replace(TINY, **member)
        model = toy2d.build_model(config)
        drawn = toy2d.batches(config, model.target, 0)
        alone = train_alone(config, drawn, model.init_params, toy2d.build_loss(config, model))
        assert relative(jax.tree.map(lambda x, i=i: x[i], trained.ema), alone) < 1e-5


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
        base=dataclasses.replace(TINY, process="vp"),
        measures=("wasserstein",),
        axes={
            "loss": ("denoising", "sliced"),
            "ema_decay": (0.9, 0.5),
            "beta_max": (20.0, 10.0),
            "sampler": ("heun", "ddim"),
        },
    )
    made = groups(ablation)
    assert [group.fixed for group in made] == [{"loss": "denoising"}, {"loss": "sliced"}]
    assert len(made[0].members) == 2 * 2 * 2
    assert len(made[0].samplings) == 2


def test_what_a_config_does_not_read_makes_no_rows():
    axes = {"process": ("vp", "cosine"), "beta_max": (20.0, 10.0, 5.0)}
    ablation = tiny(base=dataclasses.replace(TINY, process="vp"), axes=axes)
    assert cells(ablation) == [
        *({"process": "vp", "beta_max": value} for value in (20.0, 10.0, 5.0)),
        {"process": "cosine", "beta_max": 20.0},
    ]
    assert [len(list(group.rows())) for group in groups(ablation)] == [6, 2]
    only = ablate.parse_only(ablation, ["process=cosine", "beta_max=10"])
    assert store.chosen(ablation, only, (0, 1)) == []
    values = {tuple(c.values()): [10.0 * i, 10.0 * i + 1.0] for i, c in enumerate(cells(ablation))}
    table = made_table(values, base=ablation.base, **axes)
    found = {each.name: each.mean for each in statistics.effects(table, "score_error")}
    assert found == pytest.approx({"process=cosine": 30.0, "beta_max=10": 10.0, "beta_max=5": 20.0})


def test_a_program_is_made_anew_for_a_field_that_configs_gain():
    @dataclasses.dataclass(frozen=True)
    class Config(plane.Config):
        temperature: Annotated[float, Role.SAMPLING] = 1.0

    world = plane.WORLD._replace(config=Config)
    ablation = Ablation("", world, Config(), {"temperature": (1.0, 0.5)}, ("wasserstein",), seeds=2)
    (group,) = groups(ablation)
    assert [how["temperature"] for how in group.samplings] == [1.0, 0.5]
    members, traced = training.members_of(group), []

    def draw(member, params):
        traced.append(member.config)
        return member.config.temperature * params

    mapped = members.map(draw)
    for how in (*group.samplings, *group.samplings):
        drawn = mapped(dataclasses.replace(members.config, **how), np.ones(2))
        assert np.array_equal(drawn, [how["temperature"]] * 2)
    assert len(traced) == 2


def watched(base, refused):
    """Return a config that writes down which fields are read of it, and does not give some."""
    read = set()

    class Watched(type(base)):
        def __getattribute__(self, name):
            if name in refused:
                raise AssertionError(f"{name} is read of the config, not of the numbers")
            read.add(name)
            return super().__getattribute__(name)

    config = object.__new__(Watched)
    config.__dict__.update(base.__dict__)
    return config, read


@pytest.mark.parametrize(
    ("world", "base"),
    [
        (plane.WORLD, dataclasses.replace(TINY, process="vp", times="stratified")),
        (images.WORLD, dataclasses.replace(MAKERS["ends"]()["smoke"].base, weighting="min_snr")),
        pytest.param(
            images.WORLD,
            dataclasses.replace(MAKERS["ends"]()["smoke"].base, network="unet"),
            marks=pytest.mark.slow,
        ),
        (
            told.WORLD._replace(problem=told_untrained),
            dataclasses.replace(MAKERS["binding"]()["smoke"].base, optimizer="muon"),
        ),
    ],
    ids=["plane", "dit", "unet", "told"],
)
def test_a_problem_reads_numbers_apart_and_a_field_that_it_does_not_read_is_said(world, base):
    config, read = watched(base, world.numbers)
    numbers = {name: jnp.float32(getattr(base, name)) for name in world.numbers}
    member = Member(config, numbers, jax.random.key(0))
    problem = world.problem(base)

    def everything():
        params = problem.init_params(member)
        table = jax.tree.map(jnp.asarray, problem.table(base))
        batch = problem.batch(member, table, jnp.int32(0))
        loss = problem.loss(member)(params, member.key, batch)
        optimizer = training.build_optimizer(member).init(params)
        found = [m.of_model(problem, member, params) for m in world.measures.values() if m.of_model]
        return (
            loss,
            optimizer,
            optimization.ema_decays(config, 0.5),
            found,
            problem.draw(member, params),
        )

    jax.eval_shape(everything)
    problem.calls(config)
    fields = {field.name for field in dataclasses.fields(base)} - world.numbers - {"seed"}
    fields -= world.averages | {"num_steps", "batch_size", "data"}  # read before a member is made
    fields -= {"num_scenes", "scene_shares", "autoencoder_steps"}  # likewise
    silent = fields - read
    assert silent <= world.unread(base).keys()


def test_an_average_in_the_plane_forgets_its_start():
    for num_steps in (10, 1000, 14_000):
        config = plane.Config(num_steps=num_steps)
        assert library.ema.initial_share(config.ema_decay, num_steps) < 1e-4
    assert plane.Config(ema_decay=0.5).ema_decay == 0.5


def test_averages_that_remember_their_start_are_said(capsys):
    optimization.warn_of_start([(0.9997, 1000), (0.99, 1000), (0.9997, 1000)])
    (told,) = capsys.readouterr().err.splitlines()
    assert "after 1000 steps 74% of the average of decay 0.9997 is still the initial" in told
    assert "at most 0.99 " in told


def test_an_axis_over_seeds_gives_them():
    ablation = tiny(axes={"seed": (3, 5, 11)})
    assert ablation.seed_values == (3, 5, 11)
    assert [member["seed"] for member in groups(ablation)[0].members] == [3, 5, 11]
    assert cells(ablation) == [{}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "measures",
    [
        ("score_error", "wasserstein"),
        pytest.param(("bend", "nll_gap"), marks=pytest.mark.slow),
    ],
)
def test_several_averages_come_of_one_run(measures):
    base = dataclasses.replace(TINY, more_ema_decays=(0.0,), average=0.9)
    ablation = tiny(base=base, axes={"average": (0.0, 0.9)}, measures=measures)
    (group,) = groups(ablation)
    result = judging.run_group(ablation, group)
    by_average = {}
    for row in result["rows"]:
        by_average.setdefault(row["average"], []).append([row[name] for name in measures])
    values = np.array(list(by_average.values()))  # (averages, seeds, measures)
    assert values.shape == (2, 2, 2)
    assert (np.ptp(values, axis=0) > 0.0).all()


def test_a_diverged_run_is_empty_and_hurts_no_other(tmp_path):
    steps = {"num_steps": 30, "learning_rate": 1e3, "warmup_steps": 1}
    base = dataclasses.replace(QUICK.base, **steps)
    axes = {"weight_decay": (1e-4, 1e12)}
    ablation = dataclasses.replace(QUICK, base=base, axes=axes, measures=("norm",))
    (group,) = groups(ablation)
    rows = judging.run_group(ablation, group)["rows"]
    assert [row["norm"] is None for row in rows][2:] == [True, True]
    table = statistics.tabulate(ablation, rows)
    assert statistics.summarize(table)[1]["norm_mean"] is None
    assert statistics.compare(table, "norm") == []


# --- Refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"axes": {"beta_mx": (1.0,)}}, ValueError, "beta_mx.*nearest: `beta_max`"),
        ({"axes": {"network": ("mlp",)}}, ValueError, "`network` is no field.*vary `width` and"),
        ({"axes": {"xyz": (1,)}}, ValueError, "`xyz` is no field.*There are: `.*`learning_rate`"),
        ({"axes": {"width": 8}}, TypeError, "`width` must hold a tuple of values; got 8"),
        ({"axes": {"beta_max": (8.0, 20.0)}}, ValueError, "`beta_max` changes nothing.*cosine has"),
        ({"axes": {"log_every": (100, 9)}}, ValueError, "`log_every` changes nothing at 9"),
        ({"axes": {"sampler": ("heun", "ddim")}}, ValueError, "no measure is of samples"),
        ({"measures": "score_error"}, ValueError, "`measures` must be a tuple of names"),
        ({"measures": ("bend", "bend")}, ValueError, "each once"),
        ({"seeds": 2.0}, TypeError, "`seeds` must be a whole number; got 2.0"),
        ({"axes": {"seed": (0, 2**32)}}, ValueError, "`seed` must lie in 0..4294967295"),
        ({"axes": {"learning_rte": (1.0,)}}, ValueError, "nearest: `learning_rate`"),
        ({"axes": {"beta_max": (20.0, "big")}}, TypeError, "`beta_max` takes float; got 'big'"),
        ({"axes": {"width": (8, 8.5)}}, TypeError, "`width` takes int; got 8.5"),
        ({"axes": {"width": (8, True)}}, TypeError, "`width` takes int"),
        ({"axes": {"loss": ("denoising", "slicd")}}, ValueError, "nearest: 'sliced'"),
        ({"axes": {"width": (16,)}}, ValueError, "must hold the base's 8"),
        ({"axes": {"width": (8, 8)}}, ValueError, "each once"),
        ({"axes": {"beta_max": (20, 20.0)}}, ValueError, "each once"),
        ({"axes": {"width": (8,)}}, ValueError, "`width` changes nothing: it has one value, 8"),
        (
            {"axes": {"decay_steps": (10, None)}},
            ValueError,
            "`decay_steps` changes nothing at None",
        ),
        ({"axes": {"eval_tolerance": (1e-3, 1e-2)}}, ValueError, "no measure.*of the likelihood"),
        ({"base": dataclasses.replace(TINY, more_ema_decays=[0.5])}, TypeError, "tuples, no lists"),
        ({"axes": {"beta_max": (20.0, float("nan"))}}, ValueError, "finite"),
        ({"measures": ("score_eror",)}, ValueError, "nearest: `score_error`"),
        ({"base": toy2d.Config()}, TypeError, "must be a .*plane.Config"),
        ({"seeds": 0}, ValueError, "`seeds` must be at least 1"),
    ],
)
def test_an_axis_that_cannot_be_meant_fails_before_anything_trains(options, error, match):
    with pytest.raises(error, match=match):
        tiny(**options)


def test_a_resolved_ablation_is_what_json_makes_of_it():
    base = dataclasses.replace(TINY, more_ema_decays=(0.5, 0.7))
    resolved = record("mine", "full", tiny(base=base, axes={"width": (8, 16)}))
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["base.more_ema_decays"] == [0.5, 0.7]
    assert resolved["axis.width"] == [8, 16]


def test_values_become_what_their_field_is():
    assert fit_type("x", float, 3) == 3.0
    assert isinstance(fit_type("x", float, 3), float)
    assert fit_type("x", tuple[float, ...], [1, 2]) == (1.0, 2.0)
    assert fit_type("x", float | None, None) is None


def test_an_ablation_of_ones_own_is_refused_or_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "draw", lambda table, folder: [])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_ablation.py").write_text(
        "import dataclasses\n"
        "from ablation_cases import QUICK\n"
        "def make(**axes):\n"
        "    return dataclasses.replace(QUICK, axes=axes, measures=('norm',), seeds=1)\n"
        "MINE = make(clip_norm=(1.0, 2.0))\n"
        "BAD = make(batch_size=(4, -1))\n"
        "BOTH = {'full': MINE, 'smoke': make()}\n"
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
    assert ablate.main(["verify", str(out), "--definition", "my_ablation:MINE"]) == 0
    smoke = ["--preset", "smoke", "--run-dir", str(tmp_path / "smoke")]
    assert ablate.main(["my_ablation:MINE", *smoke]) == 1
    assert "has no preset smoke" in capsys.readouterr().err
    assert ablate.main(["my_ablation:BOTH", *smoke]) == 0
    assert len(rows_of(tmp_path / "smoke")) == 1


# --- Statistics ----------------------------------------------------------------------------


def made_table(values, base=TINY, measure="score_error", **axes):
    seeds = len(next(iter(values.values())))
    ablation = tiny(base=base, axes=axes, seeds=seeds, measures=(measure,))
    rows = [
        {**dict(zip(axes, cell, strict=True)), "seed": i, measure: value}
        | {"nfe": axes.get("sample_steps") and cell[-1], "train_flops": 1.0, "sample_flops": None}
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


def told(table, done=None):
    """Return the report of a table, of results."""
    name = table.ablation.measures[0]
    found = [{name: fn(table, name)} for fn in (statistics.compare, statistics.effects)]
    lock = {"preset": "full", "name": "mine"}
    return report.report(lock, table, done or {}, *found, figures=[])


def test_a_report_says_which_runs_diverged_and_only_then():
    values = {(8,): [1.0, 2.0], (16,): [1.5, np.nan], (32,): [np.nan, np.nan]}
    text = told(made_table(values, width=(8, 16, 32)))
    assert "| 16 | *1 of 2 diverged* |" in text
    assert "| 32 | *diverged* |" in text
    assert "*Diverged*: a run did" in text
    assert "There is no other; 2 diverged." in text
    text = told(made_table({(8,): [1.0, 2.0], (16,): [1.5, 2.0]}, width=(8, 16)))
    assert "iverged" not in text


@pytest.mark.parametrize(
    ("device", "flags", "repeats"),
    [
        ("2 x cpu (cpu)", "", True),
        ("1 x NVIDIA H200 (gpu)", "", False),
        ("1 x NVIDIA H200 (gpu)", f"--xla_dump_to=x {judging.DETERMINISTIC}", True),
    ],
)
def test_a_report_promises_the_same_bytes_only_where_they_come_again(device, flags, repeats):
    seconds = dict.fromkeys(("compile", "train", "judge"), 1.0)
    made = {"seconds": seconds, "environment": {"device": device, "xla_flags": flags}}
    text = told(made_table({(8,): [1.0, 2.0], (16,): [1.5, 2.0]}, width=(8, 16)), {0: made})
    assert ("byte for byte on one kind of machine" in text) == repeats
    assert (f"without XLA_FLAGS={judging.DETERMINISTIC}" in text) != repeats


def test_a_report_says_what_is_not_run_and_what_stands_in_a_line_above():
    base = dataclasses.replace(TINY, process="vp")
    values = {("vp", 20.0): [1.0, 2.0], ("vp", 8.0): [1.0, 2.0], ("cosine", 20.0): [2.0, 3.0]}
    text = told(made_table(values, base=base, process=("vp", "cosine"), beta_max=(20.0, 8.0)))
    assert "`beta_max` other than 20, 1 combination: process cosine has no range of beta." in text
    ablation = tiny(measures=("wasserstein", "bend"), axes={"sampler": ("heun", "ddim")})
    rows = [
        {"sampler": sampler, "seed": seed, "wasserstein": 1.0, "bend": 0.25}
        | {"nfe": 5, "train_flops": 1.0, "sample_flops": 1.0}
        for sampler in ("heun", "ddim")
        for seed in (0, 1)
    ]
    text = told(statistics.tabulate(ablation, rows))
    assert "| ddim | 1 ± 0 ≈ | (0.25 ± 0) |" in text
    assert "In brackets: as in a line above" in text


def test_no_panel_has_more_lines_than_colors_nor_a_legend_over_the_data(tmp_path, monkeypatch):
    axes = {
        "process": ("vp", "cosine", "flow"),
        "prediction": ("v", "eps"),
        "sampler": ("heun", "ddim", "euler", "unipc_2"),
        "sample_steps": (50, 5),
    }
    base, figures = dataclasses.replace(TINY, process="vp"), []
    every = itertools.product(*axes.values())
    table = made_table({c: [1.0, 1.0 + c[-1]] for c in every}, base, "wasserstein", **axes)
    monkeypatch.setattr(plotting, "save", lambda figure, path: figures.append(figure))
    names = plots.draw(table, tmp_path)
    assert names == ["wasserstein.png", "wasserstein_by_calls.png", "pareto.png"]
    for figure in figures:
        assert figure.legends
        for axis in figure.axes:
            assert axis.get_legend() is None
            assert not axis.patches  # no bars
    panels = [axis for axis in figures[1].axes if axis.get_visible()]
    assert [len(axis.containers) for axis in panels] == [4] * 6


def test_the_front_is_of_those_that_none_beats_in_both():
    points = {"a": (1, 5.0), "b": (2, 6.0), "c": (2, 4.0), "d": (3, 4.0), "e": (9, 1.0)}
    assert plots.pareto_front(points) == ["a", "c", "e"]


def test_the_bench_of_seeds_ends_with_a_ratio(monkeypatch, capsys):
    monkeypatch.setattr(seeds_bench, "_command", lambda folder, num, seed: (3.0 + num, 2.0 * num))
    seeds_bench.seeds(num=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["training alone 1.000", "ratio 0.438"]


# --- Kills ---------------------------------------------------------------------------------


def check_kills(tmp_path, times):
    """Kill the same command at random until it was killed so often; what it ends with is the same.

    Where it ends before it is killed, it starts anew in another folder.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(ablate.__file__)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((root, os.path.dirname(__file__)))}
    options = [NAME, "--quiet", "--run-dir"]
    start = time.perf_counter()
    assert ablate.main([*options, str(tmp_path / "whole")]) == 0
    longest = time.perf_counter() - start + 4.0  # seconds of starting Python
    rng, kills, folders = random.Random(times), 0, [tmp_path / "0"]
    while kills < times:
        command = [sys.executable, "-m", "experiments.ablate", *options, str(folders[-1])]
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.0, longest))
            folders.append(tmp_path / str(len(folders)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    print(f"{kills} kills in {len(folders)} folders")
    for folder in folders:
        assert ablate.main([*options, str(folder)]) == 0
        assert snapshot(folder) == snapshot(tmp_path / "whole")


def test_a_signal_stops_between_two_steps_and_stores_no_half(tmp_path, monkeypatch, capsys):
    real = judging.run_group

    def run_group(ablation, group, tick):
        if group.index == 1:
            signal.raise_signal(signal.SIGTERM)
        tick(1)
        return real(ablation, group, tick)

    monkeypatch.setattr(judging, "run_group", run_group)
    command = [NAME, "--quiet", "--run-dir", str(tmp_path)]
    assert ablate.main(command) == STOPPED_EXIT_CODE
    assert "Run the same command to go on" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "groups").iterdir()] == ["000.json"]


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    check_kills(tmp_path, 10)
