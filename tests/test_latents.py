"""A model told by text, from nothing: its stages, what joins them, and what they are judged by."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import loading_cases
import numpy as np
import pytest
import text_to_image_cases
from latents_cases import AUTOENCODER, DENOISER, JUDGING, run, words

from experiments.common.command import Refusal
from experiments.latents import autoencoder as autoencoders
from experiments.latents import bounds, drawing, encoding, obedience, report, stages
from experiments.latents import denoiser as denoisers_stage
from experiments.latents.autoencoder import Config
from experiments.latents.judges import of_factors, templates
from jaxdiff import plotting
from jaxdiff.data import scenes, stored

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run whose autoencoder and denoiser were trained, for a few steps each."""
    directory = tmp_path_factory.mktemp("runs") / "home"

    class Quiet:
        @staticmethod
        def readouterr():
            return type("Out", (), {"out": "", "err": ""})

    quiet = Quiet()
    assert run(quiet, "autoencoder", directory, *words(AUTOENCODER), "--quiet")[0] == 0
    assert run(quiet, "encode", directory, "--num-tokens", 300, "--quiet")[0] == 0
    asked = *words(DENOISER), "--no-evaluate", "--quiet"
    assert run(quiet, "train", directory, *asked)[0] == 0
    return directory


@pytest.fixture(scope="module")
def trained(home):
    with jax.enable_x64(False):
        return drawing.read(home)


@pytest.fixture(scope="module")
def drawn(trained):
    return drawing.make_drawing(trained, sampler="euler", num_steps=2)


def state_of(stage, run_dir):
    return stage.restore(run_dir)[1].state


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- The stages ---------------------------------------------------------------------------------


def test_the_record_of_a_denoiser_says_what_made_its_latents(home):
    store = stored.open(home / "latents")
    record = json.loads((home / "denoiser" / "config.json").read_bytes())
    assert record["autoencoder"] == store.attributes["autoencoder"]
    assert record["text"] == store.attributes["text"]
    assert len(store) == AUTOENCODER["num-scenes"]


def test_stored_latents_have_mean_0_and_variance_1_as_the_denoiser_sees_them(home):
    store = encoding.read(home / "latents", "")
    rows = store.records.rows(np.arange(len(store.records)))
    mean = store.scale * (rows["mean"] - store.shift)
    power = np.mean(mean**2 + (store.scale * rows["deviation"]) ** 2)
    np.testing.assert_allclose([mean.mean(), power], [0.0, 1.0], atol=1e-4)


def test_stored_latents_and_tokens_are_those_of_the_pictures(home, trained):
    pictures = scenes.Scenes(AUTOENCODER["num-scenes"], size=16)
    store, chosen = trained.store.records, np.array([40, 3])
    x = (pictures.rows(chosen)["image"].astype(np.float32) * 2 + 1) / 256 - 1
    with jax.enable_x64(False):
        mean, deviation = trained.autoencoder.encode(trained.decoder, x)
    found = store.rows(chosen)
    np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found["deviation"], deviation, atol=1e-5)
    equal(found["text"], trained.text.encode(pictures.captions(chosen)))


def test_encoding_that_was_cut_short_goes_on_to_the_same_bytes(home, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(home / "autoencoder", other / "autoencoder")
    shutil.copytree(home / "latents", other / "latents")
    (other / "latents" / "index.json").unlink()
    for path in (other / "latents").glob("00000*.npy"):
        path.write_bytes(path.read_bytes()[:-5])
        break
    assert run(capsys, "encode", other, "--num-tokens", 300)[0] == 0
    for path in (home / "latents").iterdir():
        assert (other / "latents" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow  # every stage is trained by training.fit, of which this is known
def test_a_denoiser_extended_is_the_one_trained_at_once(home, tmp_path, capsys):
    asked = {**DENOISER, "decay-steps": 6, "num-steps": 6}
    shared = "--latents-of", home, "--no-evaluate", "--quiet"
    assert run(capsys, "train", tmp_path / "once", *words(asked), *shared)[0] == 0
    asked["num-steps"] = 2
    assert run(capsys, "train", tmp_path / "twice", *words(asked), *shared)[0] == 0
    more = "--num-steps", 6, "--no-evaluate", "--quiet"
    assert run(capsys, "train", tmp_path / "twice", *more)[0] == 0
    stage = denoisers_stage.STAGE
    equal(state_of(stage, tmp_path / "once"), state_of(stage, tmp_path / "twice"))


def test_a_run_whose_folder_alone_is_given_does_nothing_more(home, capsys):
    before = state_of(denoisers_stage.STAGE, home)
    assert run(capsys, "train", home, "--no-evaluate", "--quiet")[0] == 0
    equal(before, state_of(denoisers_stage.STAGE, home))


@pytest.mark.parametrize(
    ("subcommand", "argv", "said"),
    [
        ("encode", (), "experiments.latents autoencoder"),
        ("sample", ("--prompt", "a star", "--out", "x.png"), "experiments.latents train"),
        ("evaluate", (), "experiments.latents train"),
    ],
)
def test_a_stage_that_is_missing_is_named_with_its_command(
    subcommand, argv, said, tmp_path, capsys
):
    code, _, err = run(capsys, subcommand, tmp_path / "none", *argv)
    assert code == 1
    assert said in err


def test_latents_of_another_autoencoder_are_refused(home, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(home, other)
    index = json.loads((other / "latents" / "index.json").read_bytes())
    index["attributes"]["autoencoder"] = "0" * 64
    (other / "latents" / "index.json").write_text(json.dumps(index))
    for command, argv in (
        ("sample", ("--prompt", "a star", "--out", tmp_path / "x.png")),
        ("train", ("--num-steps", 8, "--no-evaluate")),
    ):
        code, _, err = run(capsys, command, other, *argv)
        assert code == 1, command
        assert "autoencoder" in err
        assert "latents" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("autoencoder", "--adversarial", "-1"), "--adversarial"),
        (("autoencoder", "--perceptual", "1.0"), "--perceptual-weights"),
        (("autoencoder", "--data-dir", "x"), "--data-dir"),
        (("autoencoder", "--widths", "4", "4", "4", "4", "4", "--image-size", "16"), "--widths"),
        (("train", "--network", "unet", "--text-attention", "joint"), "--text-attention"),
        (("train", "--drop-cond", "2"), "--drop-cond"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_by_name(argv, said, tmp_path, capsys):
    subcommand, *rest = argv
    code, _, err = run(capsys, subcommand, tmp_path / "run", *rest)
    assert code == 1
    assert said in err


# --- Pictures -----------------------------------------------------------------------------------


def test_picture_i_is_the_same_however_many_are_drawn(home, tmp_path, capsys):
    asked = "--prompt", "a red star", "--num-steps", 2, "--quiet", "--guidance-scale", 2
    for num in (3, 70):
        out = tmp_path / str(num)
        assert run(capsys, "sample", home, *asked, "--num", num, "--out", out)[0] == 0
    few, many = (np.load(next((tmp_path / str(num)).glob("*.npz")))["arr_0"] for num in (3, 70))
    assert many.shape == (70, 16, 16, 3)
    np.testing.assert_array_equal(few, many[:3])
    assert len(np.unique(many.reshape(70, -1), axis=0)) == 70


def test_one_prompt_or_another_is_what_lies_at_the_ends_between_them(trained, as_users_run_it):
    told = [denoisers_stage.told(trained.text, [p]) for p in ("a red star", "a blue ring")]
    mixing = drawing.make_drawing(trained, sampler="euler", num_steps=2, mixes=True)
    plain = drawing.make_drawing(trained, sampler="euler", num_steps=2)
    key = jax.random.key(3)
    ends = mixing.draw(drawing.between(*told, np.array([0.0, 1.0])), key, 2.0)
    for i in (0, 1):
        alone = plain.draw(told[i], key, 2.0, first=i)
        assert np.abs(ends[i].astype(int) - alone[0]).max() <= 1


def test_a_prompt_that_is_too_long_is_refused(home, tmp_path, capsys):
    asked = "--prompt", "red star " * 40, "--out", tmp_path / "x.png"
    code, _, err = run(capsys, "sample", home, *asked)
    assert code == 1
    assert "--prompt" in err


def test_guidance_of_a_run_that_never_dropped_a_caption_is_refused():
    denoisers_stage.check_scale(denoisers_stage.Config(drop_cond=0.0), 1.0)
    with pytest.raises(Refusal, match="--drop-cond 0.1"):
        denoisers_stage.check_scale(denoisers_stage.Config(drop_cond=0.0), 2.0)


# --- Judging ------------------------------------------------------------------------------------


def test_a_run_that_was_not_judged_stands_beside_none(home, tmp_path, capsys):
    code, _, err = run(capsys, "evaluate", home, "--beside", tmp_path, "--quiet")
    assert code == 1
    assert f"--beside {tmp_path}" in err


def test_runs_stand_side_by_side():
    bits = {"bits_per_dim": 4.0, "bits_per_dim_stderr": 0.5, "best_guidance_scale": 2.0}
    share = {"seen": {"1": {"all": 0.1, "all_stderr": 0}, "2": {"all": 0.5, "all_stderr": 0.01}}}
    latents = {**bits, "latent_bits_per_dim": 1.0, "obeyed": share}
    assert (
        report.side_by_side({"this": latents, "pixels": {**bits, "frechet": 0.25}})
        == """\
|  | this | pixels |
| --- | --- | --- |
| bits per dimension of pixels, given the caption | at most 4.000 ± 0.500 | 4.000 ± 0.500 |
| best guidance scale | 2 | 2 |
| prompts obeyed at it, seen, in percent | 50.0 ± 1.0 |  |
| Fréchet distance of pictures |  | 0.250 |"""
    )


def test_the_levels_of_a_pixel_have_probability_1_in_all(as_users_run_it):
    levels = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    for at, scale in ((0.3, 0.01), (-1.0, 0.2), (1.4, 0.05)):
        nats = bounds._logistic_nats(levels, np.full((256, 1, 1, 1), at, np.float32), scale)
        assert np.exp(-np.asarray(nats, np.float64)).sum() == pytest.approx(1.0, abs=2e-4)


def test_real_pictures_obey_in_all_and_each_others_prompts_hardly():
    config = Config(scene_shares=(0.4, 0.3, 0.3))
    asked = obedience.cells(config, 12)
    assert [cell.name for cell in asked] == [
        "seen",
        "held_out",
        "two_objects_seen",
        "two_objects_held_out",
        "two_objects_held_out_order",
        "several_objects_seen",
        "several_objects_held_out",
    ]
    by_bytes = {
        picture.tobytes(): (cell, i) for cell in asked for i, picture in enumerate(cell.pictures())
    }

    def never_wrong(pictures):
        found = [by_bytes[picture.tobytes()] for picture in pictures]
        read = [of_factors(cell.factors) for cell, _ in found]
        rows = [[field[i] for field in r] for r, (_, i) in zip(read, found, strict=True)]
        return type(read[0])(*(np.stack(list(field)) for field in zip(*rows, strict=True)))

    judges = obedience.Judges(never_wrong, templates.read)

    def draw(scale, cell):  # at the scale 1 of others' prompts
        pictures = cell.pictures()
        return pictures if scale == 2.0 else np.roll(pictures, 1, axis=0)

    found = obedience.measure(judges, asked, [1.0, 2.0], draw, lambda x: x, lambda what: None)
    assert found.best_scale == found.numbers["best_guidance_scale"] == 2.0
    for cell in asked:
        at = found.numbers["obeyed"][cell.name]
        assert at["2"]["all"] == 1.0
        assert at["1"]["all"] <= 0.2
        assert found.numbers["obeyed_shuffled"][cell.name]["2"]["all"] <= 0.2
        assert found.numbers["ceiling"][cell.name]["all"] == 1.0
    assert found.numbers["obeyed_by_templates"]["held_out"]["2"]["all"] == 1.0
    assert "two_objects_seen" not in found.numbers["obeyed_by_templates"]


def test_no_picture_of_a_cell_is_one_to_train_on():
    config = Config(num_scenes=64)
    seen = obedience.cells(config, 32)[0]
    trained_on = {x.tobytes() for x in scenes.Scenes(64).rows(np.arange(64))["image"]}
    assert not trained_on & {x.tobytes() for x in seen.pictures()}


def test_a_run_is_judged_and_drawn(home, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(home, run_dir)
    code, out, err = run(capsys, "evaluate", run_dir, *words(JUDGING), "--quiet")
    assert code == 0, err
    found = json.loads((run_dir / "evaluation.json").read_bytes())
    assert found["step"] == DENOISER["num-steps"]
    assert set(found["obeyed"]) == {"seen", "held_out"}
    assert set(found["obeyed"]["seen"]) == {"2"}
    assert {"all", "all_stderr", "shape", "colour", "place"} <= set(found["obeyed"]["seen"]["2"])
    assert found["best_guidance_scale"] == 2.0
    assert found["bits_per_dim"] == pytest.approx(
        found["latent_bits_per_dim"] + found["decoder_bits_per_dim"]
    )
    for name in ("psnr", "ssim", "frechet", "ceiling"):
        assert name in found
    for line in out.splitlines():
        if line.startswith("!["):
            assert (run_dir / line.partition("(")[2].rstrip(")")).is_file(), line


def test_what_a_stage_is_recorded_as_is_what_is_asked_for_again(home):
    stage = denoisers_stage.STAGE
    record = stage.recorded(home)["config"]
    assert stage.record_of(stage.asked_again(record)) == record
    assert stages.FREE


# --- Other kinds --------------------------------------------------------------------------------


def started(*argv, env=None):
    words = [sys.executable, "-m", "experiments.latents", *argv, "--quiet"]
    return subprocess.Popen([str(word) for word in words], cwd=ROOT, env=env)


MODES = {
    "pmap": ("--parallel", "pmap"),
    "mesh": ("--parallel", "mesh", "--fsdp", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_eight_devices_make_the_run_of_one(mode, home, tmp_path, capsys):
    asked = *words(DENOISER), "--latents-of", home, "--no-evaluate", *MODES[mode]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    assert started("train", "--run-dir", tmp_path / mode, *asked, env=env).wait() == 0
    one, many = (
        denoisers_stage.STAGE.restore(run_dir)[1].state for run_dir in (home, tmp_path / mode)
    )
    for name in ("params", "ema"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one[name], many[name]
        )
    for run_dir, extra in ((home, {}), (tmp_path / mode, MODES[mode][:2])):
        drawn = "--prompt", "a star", "--num", "5", "--num-steps", "2", *extra
        out = tmp_path / f"{run_dir.name}-out"
        assert started("sample", "--run-dir", run_dir, "--out", out, *drawn, env=env).wait() == 0
    pictures = [
        np.load(next((tmp_path / f"{name}-out").glob("*.npz")))["arr_0"].astype(int)
        for name in ("home", mode)
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.slow
def test_stages_killed_on_their_way_end_with_the_bits_of_the_unharmed_ones(tmp_path):
    """Each by SIGKILL, somewhere after the first of what it makes is there."""
    unharmed, killed, rng = tmp_path / "unharmed", tmp_path / "killed", random.Random(5)
    longer = {"num-steps": 60, "checkpoint-every": 4}
    asked = {
        "autoencoder": words(AUTOENCODER | longer),
        "encode": ["--num-tokens", 300],
        "train": [*words(DENOISER | longer), "--no-evaluate"],
    }
    made = {"autoencoder": "autoencoder/checkpoints", "encode": "latents"}
    codes = []
    for subcommand, options in asked.items():
        assert started(subcommand, "--run-dir", unharmed, *options).wait() == 0
        process = started(subcommand, "--run-dir", killed, *options)
        folder = killed / made.get(subcommand, "denoiser/checkpoints")
        while not (folder.exists() and list(folder.iterdir())) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.3) * (subcommand != "encode"))
        process.kill()
        codes.append(process.wait())
        assert started(subcommand, "--run-dir", killed, *options).wait() == 0
    assert codes.count(-signal.SIGKILL) >= 2, codes
    for stage in (autoencoders.STAGE, denoisers_stage.STAGE):
        equal(state_of(stage, unharmed), state_of(stage, killed))
    for path in (unharmed / "latents").iterdir():
        assert (killed / "latents" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_an_autoencoder_against_a_discriminator_then_encodes(tmp_path, capsys):
    asked = {**AUTOENCODER, "adversarial": 0.1, "adversarial-from": 1}
    asked["discriminator-widths"] = (4, 8)
    assert run(capsys, "autoencoder", tmp_path, *words(asked), "--quiet")[0] == 0
    assert run(capsys, "encode", tmp_path, "--num-tokens", 300)[0] == 0
    state = state_of(autoencoders.STAGE, tmp_path)
    assert set(state["params"]) == {"autoencoder", "discriminator"}
    _, built, params = drawing.read_autoencoder(tmp_path)
    equal(params, state["ema"]["autoencoder"])
    assert built.latent_shape == (4, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"space": "pixels", "patch-size": 4}, {"text-attention": "joint"}, {"network": "unet"}],
    ids=lambda change: next(iter(change.values())),
)
def test_other_denoisers_are_trained_judged_and_drawn(change, home, tmp_path, capsys):
    asked = {**DENOISER, **change}
    shared = "--latents-of", home, "--no-evaluate", "--quiet"
    run_dir = tmp_path / "run"
    assert run(capsys, "train", run_dir, *words(asked), *shared)[0] == 0
    judging = {**JUDGING, "num-prompts": 2}
    assert run(capsys, "evaluate", run_dir, *words(judging), "--quiet")[0] == 0
    found = json.loads((run_dir / "evaluation.json").read_bytes())
    assert found["bits_per_dim"] > 0.0
    judging["beside"] = run_dir
    shutil.copytree(home, tmp_path / "home")
    code, out, _ = run(capsys, "evaluate", tmp_path / "home", *words(judging), "--quiet")
    assert code == 0
    assert f"{found['bits_per_dim']:.3f}" in out


@pytest.mark.slow
def test_a_folder_with_captions_is_learned_and_drawn(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    made = scenes.Scenes(40, size=24)
    lines = []
    for i, (picture, text) in enumerate(
        zip(made.rows(np.arange(40))["image"], made.captions(np.arange(40)), strict=True)
    ):
        plotting.save_image(photos / f"{i}.png", picture)
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    run_dir = tmp_path / "run"
    asked = words({**AUTOENCODER, "data": photos})
    assert run(capsys, "autoencoder", run_dir, *asked, "--quiet")[0] == 0
    assert run(capsys, "encode", run_dir, "--num-tokens", 300)[0] == 0
    argv = *words(DENOISER), "--no-evaluate", "--quiet"
    assert run(capsys, "train", run_dir, *argv)[0] == 0
    judging = words({**JUDGING, "guidance-scales": (1.0, 2.0)})
    code, out, err = run(capsys, "evaluate", run_dir, *judging, "--quiet")
    assert code == 0, err
    found = json.loads((run_dir / "evaluation.json").read_bytes())
    assert "obeyed" not in found
    assert found["best_guidance_scale"] in (1.0, 2.0)
    assert "obeyed.png" not in out
    shutil.rmtree(photos)
    out = tmp_path / "star.png"
    argv = "--prompt", "a red star", "--num", 2, "--num-steps", 2, "--out", out
    assert run(capsys, "sample", run_dir, *argv)[0] == 0
    assert out.is_file()


@pytest.mark.slow
def test_an_autoencoder_may_see_by_an_imported_network(tmp_path, capsys):
    weights = tmp_path / "dinov2"
    loading_cases.component(weights, "dinov2_plain", "Dinov2Model", stem="model")
    asked = {**AUTOENCODER, "perceptual": 0.5, "perceptual-weights": weights}
    code, _, err = run(capsys, "autoencoder", tmp_path / "run", *words(asked), "--quiet")
    assert code == 0, err
    lines = (tmp_path / "run" / "autoencoder" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["perceptual"] > 0.0
    state = state_of(autoencoders.STAGE, tmp_path / "run")
    assert not jax.tree.leaves(state.get("frozen", ()))


@pytest.mark.slow
def test_captions_may_be_encoded_by_an_imported_network(home, tmp_path, capsys):
    weights = text_to_image_cases.text_pipeline(tmp_path / "weights")
    run_dir = tmp_path / "run"
    shutil.copytree(home / "autoencoder", run_dir / "autoencoder")
    assert run(capsys, "encode", run_dir, "--text-weights", weights)[0] == 0
    asked = *words(DENOISER), "--no-evaluate", "--quiet"
    assert run(capsys, "train", run_dir, *asked)[0] == 0
    argv = "--prompt", "a red star", "--num", 2, "--num-steps", 2
    assert run(capsys, "sample", run_dir, *argv, "--out", tmp_path / "a.png")[0] == 0
    weights.rename(tmp_path / "moved")
    code, _, err = run(capsys, "sample", run_dir, *argv, "--out", tmp_path / "b.png")
    assert code == 1
    assert "--text-weights" in err
    argv = *argv, "--text-weights", tmp_path / "moved", "--out", tmp_path / "b.png"
    assert run(capsys, "sample", run_dir, *argv)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
