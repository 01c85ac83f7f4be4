"""The digits experiment, through its command line."""

import dataclasses
import gc
import hashlib
import json
import math
import os
import pathlib
import signal
import subprocess
import time
from unittest import mock

import jax
import numpy as np
import pytest
from digits_cases import run
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from experiments import bench, digits
from experiments.common import command, flows
from experiments.common.devices import Running
from experiments.common.optimization import build_optimizer, build_schedule
from experiments.images import data as image_data
from experiments.images import judging as digits_likelihood
from experiments.images import report as digits_report
from experiments.images import sample_folders as streaming
from experiments.images import sources as image_sources
from experiments.images import trained as image_trained
from experiments.images.model import PRESETS, open_images
from jaxdiff import data, training
from jaxdiff.data import NotPreparedError, batch_indices
from jaxdiff.training import loop, signals, throughput
from jaxdiff.training.export import import_params
from jaxdiff.training.run import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
FIGURES = ("samples.png", "noising.png", "reverse.png", "reverse.gif", "loss.png")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Programs are kept as users keep them: most tests here train by the same one."""
    changes = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in changes}
    for values in (changes, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is changes:
            yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the smoke preset, by the command line; `test_smokes.py` has it in a new process."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        assert digits.main(["train", "--preset", "smoke", "--run-dir", str(folder)]) == 0
    return folder


def listing(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_train_leaves_everything_that_others_rely_on(trained):
    record = json.loads((trained / "config.json").read_text())
    assert {"config", "hash", "versions", "device", "git_commit"} <= record.keys()
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [5, 10, 15, 20]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    results = json.loads((trained / "evaluation.json").read_text())
    for name in (
        "held_out_bits_per_dim",
        "held_out_bits_per_dim_stderr",
        "mixture_bits_per_dim",
        "train_bits_per_dim",
        "steps_per_second",
        "samples_per_second",
    ):
        assert math.isfinite(results[name])
        assert results[name] > 0
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["10", "20"]
    report = (trained / "report.md").read_text()
    assert record["hash"] in report
    for name in FIGURES:
        assert name in report
        with Image.open(trained / name) as image:
            assert min(image.size) > 100
            assert name != "reverse.gif" or image.n_frames >= 5


def test_the_same_command_or_the_folder_alone_on_a_finished_run_changes_nothing(trained, capsys):
    before = listing(trained)
    for preset in (("--preset", "smoke"), ()):
        code, out, err = run(capsys, "train", *preset, "--run-dir", trained)
        assert code == 0, err
        assert "report.md" in out
        assert listing(trained) == before


def fit(folder, num_steps):
    """Train without the report; return the checkpoint."""
    config = dataclasses.replace(PRESETS["smoke"], num_steps=num_steps, decay_steps=20)
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        images = open_images(config, "train")
        uncounted = mock.patch.object(throughput, "count_flops", return_value=None)
        with command.compiling_for("smoke"), uncounted:  # the program of `trained`
            digits.fit(config, images, folder, Running(), progress=False)
        return digits.restore(folder)[1]


def test_a_run_is_read_back_in_python_without_its_data(trained, no_data):
    run = image_trained.load(trained)
    assert (run.step, run.description.shape, run.config.width) == (20, (8, 8, 1), 32)
    labels = np.arange(3)
    with jax.enable_x64(False):
        x0_hat = run.model.denoiser(run.params, labels)(np.zeros((3, 8, 8, 1), np.float32), 0.5)
    assert x0_hat.shape == (3, 8, 8, 1)
    found = training.load_run(trained)
    assert found.config == json.loads((trained / "config.json").read_text())["config"]
    for got, wanted in zip(jax.tree.leaves(found.params), jax.tree.leaves(run.params), strict=True):
        np.testing.assert_array_equal(got, wanted)


def assert_same_bits(one, two):
    for (path, a), (_, b) in zip(
        *(jax.tree.leaves_with_path(each.state) for each in (one, two)), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_a_run_in_two_parts_ends_with_the_bits_of_the_run_in_one(trained, tmp_path, monkeypatch):
    """And holds its state once where it goes on."""

    class Here(Exception):
        pass

    def look(state, *args, **options):
        held = sum(leaf.nbytes for leaf in jax.live_arrays()) - before
        raise Here(held / sum(leaf.nbytes for leaf in jax.tree.leaves(state)))

    fit(tmp_path, 10)
    gc.collect()
    before = sum(leaf.nbytes for leaf in jax.live_arrays())
    with monkeypatch.context() as looking:
        looking.setattr(loop, "fit", look)
        with pytest.raises(Here) as caught:
            fit(tmp_path, 20)
    assert caught.value.args[0] < 1.2
    assert_same_bits(fit(tmp_path, 20), digits.restore(trained)[1])


@pytest.fixture
def no_data(monkeypatch):
    """Any attempt to open a data set fails."""

    def gone(*args, **options):
        raise AssertionError("a data set was opened")

    monkeypatch.setattr("jaxdiff.data.load_images", gone)


@pytest.mark.usefixtures("no_data")
def test_samples_by_other_random_numbers_are_refused(trained, capsys, tmp_path):
    """Image i depends on the run, the seed and i only: one file and a folder have one rule."""
    for out in ("a.png", "folder"):
        with jax.default_matmul_precision("highest"):
            code, _, err = run(capsys, "sample", "--run-dir", trained, "--out", tmp_path / out)
        assert code == 1
        assert "The samples would be others" in err
        assert "JAX_DEFAULT_MATMUL_PRECISION: there None, here highest" in err
        assert not (tmp_path / out).exists()


@pytest.mark.usefixtures("no_data")
def test_guided_samples_are_others_and_a_folder_holds_one_kind(trained, capsys, tmp_path):
    options = ("sample", "--run-dir", trained, "--num-steps", 2, "--num", 4, "--quiet")
    guided = ("--guidance-scale", 2, "--interval", 0.1, 5, "--out", tmp_path / "guided")
    code, _, err = run(capsys, *options, *guided, "--weaker-run", trained)
    assert code == 0, err
    said = json.loads((tmp_path / "guided" / "samples.json").read_text())["guidance"]
    assert said["weaker_run"].keys() == {"run", "step"}
    assert (said["scale"], said["rule"], said["interval"]) == (2.0, "linear", [0.1, 5.0])
    for other in ((), ("--guidance-scale", 3), ("--guidance-scale", 2, "--rule", "projected")):
        code, _, err = run(capsys, *options, "--out", tmp_path / "guided", *other)
        assert code == 1
        assert "holds other images: guidance {'scale': 2.0" in err


@pytest.mark.usefixtures("no_data")
def test_sample_draws_the_asked_images(trained, capsys, tmp_path):
    out = tmp_path / "made" / "here.png"
    options = ("--run-dir", trained, "--num-steps", 4, "--seed", 3)
    code, _, err = run(capsys, "sample", *options, "--num", 10, "--label", 3, "--out", out)
    assert code == 0, err
    with Image.open(out) as image:
        ten = np.asarray(image)
    again = tmp_path / "again.png"
    run(capsys, "sample", *options, "--num", 8, "--label", 3, "--out", again)
    with Image.open(again) as image:  # the first row of eight is the same in any batch
        eight = np.asarray(image)
    np.testing.assert_array_equal(ten[: eight.shape[0] - 8], eight[:-8])
    run(capsys, "sample", *options, "--num", 8, "--sampler", "unipc_3", "--out", again)
    with Image.open(again) as image:
        assert np.asarray(image).shape == eight.shape


def test_what_the_data_are_is_recorded_and_exported(trained, capsys, tmp_path):
    out = tmp_path / "params.npz"
    code, _, err = run(capsys, "export", "--run-dir", trained, "--out", out)
    assert code == 0, err
    names = [str(digit) for digit in range(10)]
    known = {"shape": [8, 8, 1], "num_levels": 17, "num_classes": 10, "class_names": names}
    recorded = json.loads((trained / "config.json").read_text())["data"]
    assert known.items() <= recorded.items()
    exported = import_params(out)[1]
    assert known.items() <= exported.items()
    assert exported["step"] == 20


def test_a_report_says_what_it_is_of(trained):
    of = json.loads((trained / "judged.json").read_text())
    assert (of["step"], of["average"], of["eval_split"]) == (20, "main", "test")
    results = json.loads((trained / "evaluation.json").read_text())
    assert results["step"] == 20
    assert all(math.isfinite(value) for value in results.values())
    assert (
        "step 20, average `main` (decay 0.99), by digits/test"
        in (trained / "report.md").read_text()
    )


def test_a_run_is_judged_by_what_is_asked_and_the_last_step_has_the_last_word(
    trained, capsys, tmp_path, monkeypatch
):
    """Those that `evaluate` is told, of whatever step there is; what fails is said."""
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", trained, folder], check=True)
    subprocess.run(["rm", "-r", folder / "checkpoints" / "20"], check=True)

    def unsolved(*args, **options):
        raise flows.Unsolved("the solver stopped")

    def draw(config, *args, **options):
        drawn.append(config.sample_steps)
        return 1.0

    drawn = []
    with monkeypatch.context() as broken:
        broken.setattr(digits_report, "draw", draw)
        broken.setattr(digits_likelihood.likelihood, "log_prob", unsolved)
        options = ("--eval-examples", 4, "--mixture-components", 1, 3, "--sample-steps", 2)
        code, out, err = run(capsys, "evaluate", "--run-dir", folder, *options)
    assert code == 0, err
    assert "step 10 of 20" in out
    assert "The likelihood of the held-out images is not known: the solver stopped." in out
    results = json.loads((folder / "evaluation.json").read_text())
    of = json.loads((folder / "judged.json").read_text())
    assert (of["step"], of["eval_examples"], of["sample_steps"]) == (10, 4, 2)
    assert drawn == [2]
    assert results["step"] == 10
    assert results["mixture_components"] in (1, 3)
    assert "held_out_bits_per_dim" not in results
    assert "4 held-out images" in err  # progress
    config = dataclasses.replace(PRESETS["smoke"], num_steps=20)
    held_out = arrays("test", [0, 1])
    assert not digits.is_judged(config, folder, held_out)
    assert digits.is_judged(config, trained, held_out)
    other = dataclasses.replace(config, sample_steps=9)
    assert digits.is_judged(other, trained, held_out)
    assert "sample_steps 8 (asked 9); `evaluate` makes another" in capsys.readouterr().err


def test_a_run_whose_data_moved_is_judged_where_they_are(trained, capsys, tmp_path, monkeypatch):
    config = dataclasses.replace(PRESETS["smoke"], data="mnist", data_dir=str(tmp_path / "gone"))
    seen = []

    def load(name, split, *, data_dir, image_size):
        seen.append(data_dir)
        raise NotPreparedError(f"{name} is not prepared in {data_dir}: say by `data_dir`")

    monkeypatch.setattr("jaxdiff.data.load_images", load)
    monkeypatch.delenv("JAXDIFF_DATA_DIR", raising=False)
    with pytest.raises(command.Refusal, match="--data-dir: mnist is not prepared"):
        open_images(config, "train", recorded=True)
    monkeypatch.setenv("JAXDIFF_DATA_DIR", str(tmp_path))
    with pytest.raises(command.Refusal):
        open_images(config, "train", recorded=True)
    (tmp_path / "gone").mkdir()  # it is there after all
    with pytest.raises(command.Refusal):
        open_images(config, "train", recorded=True)
    code, _, err = run(capsys, "evaluate", "--run-dir", trained, "--data-dir", tmp_path / "here")
    assert code == 1
    assert "--data-dir" in err
    gone = str(tmp_path / "gone")
    assert seen == [gone, None, gone, str(tmp_path / "here")]
    assert image_sources.absolute("data") == str(pathlib.Path("data").absolute())
    assert image_sources.absolute("gs://bucket/data") == "gs://bucket/data"


def arrays(split, labels, shape=(8, 8, 1)):
    levels = np.zeros((len(labels), *shape), np.uint8)
    return data.Images.from_arrays(
        levels, np.array(labels), num_levels=17, num_classes=10, name="mine", split=split
    )


def test_data_that_cannot_be_trained_on_or_judged_by_are_refused_at_once(capsys):
    config = dataclasses.replace(PRESETS["smoke"], batch_size=4)
    train = arrays("train", [0, 1, 2, 3])
    image_data.check(config, train, arrays("validation", [0, 1]))
    assert "mine/train has no image of label 4, 5, 6, 7, 8, 9" in capsys.readouterr().err
    image_data.check(config, train, None)
    for changes, held_out, said in (
        ({"batch_size": 5}, arrays("test", [0, 1]), "--batch-size"),
        ({}, arrays("test", [0]), "--eval-split: mine/test must hold 2 images"),
        ({}, arrays("test", [0, 1], (4, 4, 1)), "--eval-split test must hold such images"),
        ({"mixture_components": (5, 9)}, arrays("test", [0, 1]), "--mixture-components must"),
    ):
        with pytest.raises(command.Refusal, match=said):
            image_data.check(dataclasses.replace(config, **changes), train, held_out)
    assert "trained on" not in capsys.readouterr().err
    part = arrays("train[50%:]", [0, 1])
    image_data.check(dataclasses.replace(config, mixture_components=()), train, part)
    assert "--eval-split train[50%:] judges by images trained on." in capsys.readouterr().err
    unlabelled = [{"image": np.zeros((8, 8, 1), np.uint8), "label": -1}] * 3
    hidden = data.Images("mine", "test", 3, (8, 8, 1), 17, 10, unlabelled)
    with pytest.raises(command.Refusal, match="--eval-split: mine/test should hold labels in 0"):
        image_data.check(config, train, hidden)
    np.testing.assert_array_equal(digits_report.shown_classes(arrays("test", [7, 2, 2])), [2, 7])


def test_a_loss_on_the_prediction_itself_is_recorded_as_such(trained, capsys, tmp_path):
    asked = dataclasses.replace(PRESETS["smoke"], loss_on=None, prediction="x0")
    assert digits.resolved(asked, None).loss_on == "x0"
    assert digits.resolved(asked, {"config": {"loss_on": None}}).loss_on is None  # of before
    code, _, err = run(
        capsys, "train", "--preset", "smoke", "--run-dir", trained, "--loss-on", "None"
    )
    assert code == 1
    assert "--loss-on: there eps, asked v" in err


def test_images_by_the_thousand_go_on_where_they_stopped(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PER_FILE", 16)
    folder = tmp_path / "many"
    options = ("sample", "--run-dir", trained, "--num-steps", 2, "--seed", 3, "--out", folder)
    code, out, err = run(capsys, *options, "--num", 24)
    assert code == 0, err
    assert "24 images in 2 files, 0 of them there before" in out
    first = listing(folder)
    assert sorted(first) == ["00000000-00000016.npz", "00000016-00000024.npz", "samples.json"]
    code, out, _ = run(capsys, *options, "--num", 40)
    assert "40 images in 3 files, 1 of them there before" in out
    assert listing(folder)["00000000-00000016.npz"] == first["00000000-00000016.npz"]
    images, labels = streaming.read(folder)
    assert images.shape == (40, 8, 8, 1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.arange(40) % 10)
    monkeypatch.setattr(streaming, "PER_FILE", 64)  # image i is the same in any file
    whole = tmp_path / "whole"
    run(capsys, *options[:-1], whole, "--num", 40)
    gap = np.abs(streaming.read(whole)[0].astype(int) - images)
    assert (gap > 0).mean() < 0.001  # a rounding may fall on the other side of a level
    before = listing(folder)
    code, _, err = run(capsys, *options, "--num", 40, "--sampler", "heun")
    assert code == 1
    assert "sampler ddim (asked heun)" in err
    code, _, err = run(capsys, *options[:-1], tmp_path, "--num", 40)
    assert "holds other files" in err
    assert listing(folder) == before


def test_damaged_files_of_images_are_made_again(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PER_FILE", 8)
    folder = tmp_path / "many"
    command = ("sample", "--run-dir", trained, "--num-steps", 2, "--out", folder, "--num", 20)
    run(capsys, *command)
    whole = listing(folder)
    (folder / "00000008-00000016.npz").write_bytes(b"PK" + bytes(100))
    (folder / "00000016-00000018.npz").write_bytes(b"of a smaller number")
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert "20 images in 3 files, 2 of them there before" in out
    assert whole.items() <= listing(folder).items()
    assert len(streaming.read(folder)[0]) == 20
    (folder / "samples.json").write_text("{")
    code, _, err = run(capsys, *command)
    assert code == 1
    assert "samples.json cannot be read" in err
    assert "Traceback" not in err


def test_averages_are_kept_chosen_made_and_exported(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "count_flops", lambda *args: None)
    config = dataclasses.replace(
        PRESETS["smoke"], width=16, decay_steps=20, more_ema_decays=(0.5,), ema_stds=(0.05, 0.2)
    )
    running = Running(keep_every=5)
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        config = dataclasses.replace(config, checkpoint_every=5, num_steps=10)
        digits.fit(config, open_images(config, "train"), tmp_path, running, progress=False)
    exported = {}
    for name, options in {
        "main": (),
        "kept": ("--ema", "0.5"),
        "wide": ("--ema", "std_0.2"),
        "made": ("--ema-std", "0.2"),
        "other": ("--ema-std", "0.1"),
        "raw": ("--raw",),
    }.items():
        out = tmp_path / "exported" / f"{name}.npz"
        code, _, err = run(capsys, "export", "--run-dir", tmp_path, "--out", out, *options)
        assert code == 0, err
        params, record = import_params(out)
        assert record["ema_stds"] == [0.05, 0.2]
        exported[name] = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])

    def gap(one, other):
        return np.linalg.norm(exported[one] - exported[other])

    assert gap("made", "wide") < 1e-4 * gap("raw", "wide")  # kept, and found again
    assert min(gap("other", "raw"), gap("other", "wide")) > 0  # how close: test_ema.py
    assert 0 < gap("raw", "kept") < gap("raw", "main")
    largest = max((tmp_path / "checkpoints/5").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    out = tmp_path / "exported" / "without.npz"
    code, _, err = run(capsys, "export", "--run-dir", tmp_path, "--out", out, "--ema-std", "0.2")
    assert code == 0
    assert "5 is corrupt" in err
    assert import_params(out)[0].keys() == import_params(out.with_name("made.npz"))[0].keys()
    for options, said in (
        (("--ema", "0.7"), "--ema must be one of main, 0.5, std_0.05, std_0.2; got 0.7"),
        (("--ema-std", "0.5"), "--ema-std"),
        (("--ema-std", "0.1", "--ema", "0.5"), "give one of them"),
    ):
        out = tmp_path / "no.npz"
        code, _, err = run(capsys, "export", "--run-dir", tmp_path, "--out", out, *options)
        assert code == 1
        assert said in err
        assert not out.exists()


@pytest.mark.slow
def test_bfloat16_computes_and_float32_is_kept(tmp_path, trained, monkeypatch):
    """Also: recomputed blocks, gradients in parts, several steps a call change no mathematics."""
    config = dataclasses.replace(PRESETS["smoke"], decay_steps=20, dtype="bfloat16", remat=True)
    cache = tmp_path / "cache"
    running = Running(accumulate=2, steps_per_call=5, compilation_cache=str(cache))
    seen, in_parts, loop_fit = {}, training.GradientUpdate.in_parts, loop.fit

    def made(update, accumulate):
        seen["accumulate"] = max(accumulate, seen.get("accumulate", 1))
        return in_parts(update, accumulate)

    def fitted(state, steps, *args, **options):
        seen["steps_per_call"] = steps.per_call
        return loop_fit(state, steps, *args, **options)

    monkeypatch.setattr(training.GradientUpdate, "in_parts", made)
    monkeypatch.setattr(loop, "fit", fitted)
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        running.start()
        digits.fit(config, open_images(config, "train"), tmp_path, running, progress=False)
        jax.config.update("jax_compilation_cache_dir", before)
        _, restored, _ = digits.restore(tmp_path)
    compilation_cache.reset_cache()
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(restored.state)}
    assert dtypes == {np.dtype(np.float32), np.dtype(np.int32)}
    lines, in_float32 = (read_metrics(each / "metrics.jsonl") for each in (tmp_path, trained))
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    for line, other in zip(lines, in_float32, strict=True):
        assert line["loss"] != other["loss"]
        assert line["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert line.get("model_flops_per_second", 1.0) > 0
    assert "model_flops_per_second" in lines[-1]
    assert seen == {"accumulate": 2, "steps_per_call": 5}
    assert any(cache.iterdir())


@pytest.mark.parametrize(
    ("schedule", "half", "end"),
    [
        ("cosine", 0.505, 0.01),
        ("linear", 0.505, 0.01),
        ("constant", 1.0, 1.0),
        ("inverse_sqrt", (10 / 55) ** 0.5, (10 / 100) ** 0.5),
    ],
)
def test_learning_rates_rise_and_go_on_as_named(schedule, half, end):
    config = dataclasses.replace(
        PRESETS["full"], schedule=schedule, num_steps=100, warmup_steps=10, learning_rate=1.0
    )
    rate = build_schedule(config)
    for step, wanted in ((0, 0.0), (5, 0.5), (10, 1.0), (55, half), (100, end)):
        assert float(rate(step)) == pytest.approx(wanted, abs=1e-6), step


def test_gradients_are_clipped():
    optimizer = build_optimizer(dataclasses.replace(PRESETS["full"], weight_decay=0.0))

    def second_update(first_gradient):
        params = {"w": np.zeros(2)}
        state = optimizer.init(params)
        for gradient in (first_gradient, 1.0):
            updates, state = optimizer.update({"w": np.array([gradient, 0.0])}, state, params)
        return updates["w"]

    np.testing.assert_allclose(second_update(1e6), second_update(1.0), rtol=1e-6)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_where_asked(tmp_path, capsys):
    config = dataclasses.replace(
        PRESETS["smoke"], decay_steps=20, learning_rate=1e10, clip_norm=1e10, warmup_steps=0
    )
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        images, running = open_images(config, "train"), Running(nonfinite="skip")
        digits.fit(config, images, tmp_path, running, progress=False)
    assert "is not finite and was skipped" in capsys.readouterr().err
    _, restored, _ = digits.restore(tmp_path)
    assert restored.step == 20
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.state))


def test_sigterm_outside_training_exits_as_ctrl_c_does(capsys, monkeypatch):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))

    def wait():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # another at once says nothing new

    assert command.run("digits", wait, []) == loop.STOPPED_EXIT_CODE
    assert "Interrupted" in capsys.readouterr().err
    monkeypatch.setattr(signals, "SUCCESSION", 0.0)
    signal.raise_signal(signal.SIGTERM)
    assert heard == [True]
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_step_that_is_not_finite_is_said_and_skipped_where_asked(
    tmp_path, capsys, monkeypatch, nonfinite
):
    """What becomes of the run: test_trainer.py, and below."""
    asked = {}

    def fit(directory, make_state, update, batches_from, **options):
        asked.update(options, update=update)
        raise loop.NotFinite(7, {"loss": math.inf})

    monkeypatch.setattr(training, "fit", fit)
    options = ("--preset", "smoke", "--seed", 3, "--nonfinite", nonfinite)
    code, _, err = run(capsys, "train", "--run-dir", tmp_path, *options)
    assert code == 1
    assert "Step 7 is not finite: loss=inf" in err
    assert asked["update"].skip_nonfinite == (nonfinite == "skip")
    images = open_images(PRESETS["smoke"], "train")
    indices = batch_indices(len(images), 32, 3, 6)
    assert asked["report"].repeat(6) == {"seed": 3, "indices": indices.tolist()}


@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_what_repeats_it(tmp_path, capsys):
    code, _, err = run(
        capsys,
        *("train", "--preset", "smoke", "--run-dir", tmp_path, "--quiet"),
        *("--learning-rate", "1e10", "--clip-norm", "1e10", "--warmup-steps", "0"),
    )
    assert code == 1
    found = json.loads((tmp_path / "nonfinite.json").read_text())
    assert f"Step {found['step']} is not finite" in err
    images = open_images(PRESETS["smoke"], "train")
    indices = batch_indices(len(images), 32, 0, found["step"] - 1)
    assert found["indices"] == indices.tolist()
    assert len(found["key_data"]) == 2


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(trained, capsys, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", trained, copy], check=True)
    largest = max((copy / "checkpoints/20").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    code, _, err = run(
        capsys, "sample", "--run-dir", copy, "--num-steps", 2, "--num", 1, "--out", copy / "a.png"
    )
    assert code == 0
    assert "corrupt" in err
    assert str(copy / "checkpoints/20") in err
    assert_same_bits(fit(copy, 20), digits.restore(trained)[1])
    assert (copy / "metrics.jsonl").read_text().count("\n") == 4


def test_another_config_is_refused_by_the_names_of_its_fields(trained, capsys):
    before = listing(trained)
    code, _, err = run(
        capsys, "train", "--preset", "smoke", "--run-dir", trained, "--width", 64, "--seed", 1
    )
    assert code == 1
    assert "--seed: there 0, asked 1" in err
    assert "--width: there 32, asked 64" in err
    code, _, err = run(capsys, "train", f"--run-dir={trained}", "--width", 64)
    assert code == 1
    assert err.splitlines()[1:-1] == ["  --width: there 32, asked 64"]  # the rest as recorded
    code, _, err = run(capsys, "train", "--run-dir", trained, "--preset", "full", "--width", 32)
    assert code == 1  # a preset that is given is given whole
    assert "--batch-size: there 32, asked 64" in err
    assert "--width" not in err
    assert listing(trained) == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("sample", "--run-dir", "{tmp}", "--out", "a.png"), "experiments.digits train"),
        (("evaluate", "--run-dir", "{tmp}"), "experiments.digits train"),
        (("train", "--run-dir", "{tmp}", "--learning-rate", "nan"), "--learning-rate must be"),
        (("train", "--run-dir", "{tmp}", "--num-steps", "0"), "--num-steps must be at least 1"),
        (
            ("train", "--run-dir", "{tmp}", "--mixture-components", "--num-steps", "0"),
            "--num-steps must be at least 1",  # no mixture is a choice
        ),
        (("train", "--run-dir", "{tmp}", "--ema-decay", "1.5"), "--ema-decay must be in"),
        (("train", "--run-dir", "{tmp}", "--batch-size", "2000"), "--batch-size: `batch_size`"),
        (("train", "--run-dir", "{tmp}", "--patch-size", "3"), "--patch-size: `patch_size`"),
        (("train", "--run-dir", "{tmp}", "--width", "10"), "--width: `width`"),
        (("train", "--run-dir", "{tmp}", "--network", "unet", "--width", "3"), "--width: `num_h"),
        (("train", "--run-dir", "{tmp}", "--seed", "4294967296"), "--seed must be in [0, 4294967"),
        (("train", "--run-dir", "{tmp}", "--log-snr-high", "200"), "--log-snr-high must be in"),
        (("train", "--run-dir", "{tmp}", "--mixture-components", "9999"), "--mixture-components"),
        (("train", "--run-dir", "{tmp}", "--eval-examples", "1"), "--eval-examples must be at l"),
        (("train", "--run-dir", "{tmp}", "--eval-split", "valid"), "--eval-split: `split` must"),
        (("train", "--run-dir", "{tmp}", "--data", "/a/folder"), "--image-size must be given"),
        (("evaluate", "--run-dir", "{run}", "--eval-tolerance", "0"), "--eval-tolerance must be"),
        (("evaluate", "--run-dir", "{run}", "--mixture-components", "0"), "--mixture-components"),
        (("sample", "--run-dir", "{run}", "--out", "a.png", "--seed", "-1"), "--seed must lie in"),
        (("train", "--run-dir", "{tmp}/file/x"), "file"),
        (("train", "--run-dir", "{tmp}", "--fsdp", "2"), "--fsdp 2 needs --parallel mesh"),
        (
            ("train", "--run-dir", "{tmp}", "--parallel", "mesh", "--fsdp", "3"),
            "--fsdp must divide",
        ),
        (("train", "--run-dir", "{tmp}", "--accumulate", "7"), "--batch-size must be a multiple"),
        (("train", "--run-dir", "{tmp}", "--steps-per-call", "0"), "--steps-per-call"),
        (("train", "--run-dir", "{tmp}", "--keep-last", "2"), "--keep-last must be at least 3"),
        (("train", "--run-dir", "{tmp}", "--ema-stds", "0.5"), "`ema_decay['std_0.5']`.std"),
        (("train", "--run-dir", "{tmp}", "--more-ema-decays", "1.5"), "`ema_decay['1.5']`"),
        (("train", "--run-dir", "{tmp}", "--distributed"), "--distributed needs --parallel"),
        (("train", "--run-dir", "{tmp}", "--process-id", "0"), "need --distributed"),
        (
            ("train", "--run-dir", "{tmp}", "--distributed", "--parallel", "pmap")
            + ("--coordinator-address", "nowhere", "--num-processes", "2", "--process-id", "0"),
            "HOST:PORT",
        ),
        (
            ("train", "--run-dir", "{tmp}", "--distributed", "--parallel", "pmap")
            + ("--num-processes", "2", "--process-id", "0"),
            "`coordinator_address` must be given too",
        ),
        (
            ("train", "--run-dir", "{tmp}", "--data", "mnist", "--data-dir", "{tmp}/none"),
            "{tmp}/none",
        ),
        (("train", "--run-dir", "{tmp}", "--data", "fashion_mnis"), "--data: `name` must be know"),
        (("sample", "--run-dir", "{run}", "--out", "{tmp}/a.txt"), "--out must end in .png"),
        (
            ("sample", "--run-dir", "{run}", "--out", "{tmp}/a.png", "--interval", "2", "1"),
            "--interval must be LOW HIGH",
        ),
        (
            ("sample", "--run-dir", "{run}", "--out", "{tmp}/a.png", "--weaker-run", "{tmp}/no"),
            "--weaker-run {tmp}/no does not exist. Train one first",
        ),
        (("sample", "--run-dir", "{run}", "--out", "{tmp}/file/a.png"), "--out"),
        (("sample", "--run-dir", "{run}", "--out", "{tmp}/file"), "got a file without it {tmp}/fi"),
        (("sample", "--run-dir", "{run}", "--out", ""), "or a folder; got an empty name"),
        (("sample", "--run-dir", "{run}", "--out", "{tmp}/a.png", "--label", "10"), "--label"),
        (("sample", "--run-dir", "{run}", "--out", "{tmp}/a.png", "--num", "0"), "--num"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_few_lines(trained, capsys, tmp_path, argv, said):
    (tmp_path / "file").write_text("")
    names = {"tmp": tmp_path, "run": trained}
    code, _, err = run(capsys, *(word.format(**names) for word in argv))
    assert code == 1
    assert said.format(**names) in err
    assert "Traceback" not in err
    assert len(err.splitlines()) < 8
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("train", "--run-dir", "x", "--sed", "1"), "--seed"),
        (("train",), "--run-dir"),
        (("sample", "--run-dir", "x", "--out", "y.png", "--sampler", "dim"), "ddim"),
    ],
)
def test_unknown_options_name_the_nearest(capsys, argv, said):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert said in err


@pytest.mark.slow
def test_bench_ends_with_its_ratio(capsys):
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        assert bench.main(["train_step", "--preset", "smoke", "--rounds", "2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("ratio ")
    assert float(last.split()[1]) > 0
