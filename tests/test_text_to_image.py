"""Images by published weights from the command line, by tiny pipelines that the tests write."""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import text_to_image_cases as cases
from PIL import Image
from weights_cases import LOADED, load_once

from experiments import text_to_image
from experiments.images import sample_folders
from experiments.pretrained import weights
from experiments.pretrained.conditioning import Asked, condition
from jaxdiff import pretrained, timesteps

PROMPT = "the cat in"
STEPS = 3
OF = {"text": ("--prompt", PROMPT), "flow": ("--label", "2"), "inpainting": ("--prompt", PROMPT)}
SCALES = {"text": 7.5, "flow": 4.0}
KINDS = ["flow", pytest.param("text", marks=pytest.mark.slow)]
ROOT = pathlib.Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {
        "text": cases.text_pipeline(folder / "text"),
        "inpainting": cases.text_pipeline(folder / "inpainting", "unet_inpainting"),
        "classes": cases.class_pipeline(folder / "classes"),
        "pixels": cases.pixel_pipeline(folder / "pixels"),
        "flow": cases.flow_folder(folder / "flow"),
    }


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return cases.Picture.written(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    monkeypatch.setattr(pretrained, "load", load_once)


def known(folder):
    return pretrained.load(str(folder), dtype="float32", place=None)


def run(folder, out, *words, steps=STEPS):
    given = ("--weights", str(folder), "--out", str(out), "--num-steps", str(steps), "--quiet")
    return text_to_image.main([*given, *map(str, words)])


def drawn(folder, out, *words, **options):
    """The images that a command writes into a folder."""
    assert run(folder, out, *words, **options) == 0
    return sample_folders.read(out)[0]


def alike(one, other):
    """Whether images are the same up to one level, in which compiled programs may round apart."""
    return np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_an_image_is_what_ddim_makes_of_the_prompt(folders, tmp_path):
    """Step by step, by the network's calls alone: one for the prompt, one for the negative one."""
    out = tmp_path / "one.png"
    words = ("--prompt", PROMPT, "--negative-prompt", "cat", "--seed", "3")
    assert run(folders["text"], out, *words, "--guidance-scale", "5") == 0
    got = np.asarray(Image.open(out))
    loaded = known(folders["text"])
    process, text, encoder = loaded.model.process, loaded.text, loaded.autoencoder
    tokens = np.asarray(jax.jit(text.encode)(text.params, text.tokenize([PROMPT, "cat"])))
    network = jax.jit(lambda params, x_t, t, c: loaded.model.denoiser(params, c)(x_t, t))

    @jax.jit
    def move(to, away, z, t, s):
        x0_hat = away + 5.0 * (to - away)
        eps_hat = (z - process.alpha(t) * x0_hat) / process.sigma(t)
        return process.alpha(s) * x0_hat + process.sigma(s) * eps_hat

    key_start, _ = jax.random.split(jax.random.key(3))
    ts = np.asarray(timesteps.uniform(process, STEPS))
    z = process.prior_sample(key_start, (1, 4, 4, 4))
    for t, s in itertools.pairwise(ts):
        to, away = (network(loaded.params, z, t, words[None]) for words in tokens)
        z = move(to, away, z, t, s)
    decoded = jax.jit(lambda params, z: weights.to_levels(encoder.decode(params, z)))
    wanted = np.asarray(decoded(encoder.params, z)[0])
    assert got.shape == (8, 8, 3)
    assert alike(got, wanted)
    assert wanted.std() > 20  # it is a picture


@pytest.mark.parametrize("kind", KINDS)
def test_image_i_is_the_same_for_any_batch_and_a_folder_goes_on(
    folders, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(text_to_image, "FILE_BYTES", 2 * 8 * 8 * 3)
    words = (*OF[kind], "--rule", "rescaled")
    many, few = tmp_path / "many", tmp_path / "few"
    first = drawn(folders[kind], many, *words, "--num", "3", "--batch-size", "2")
    times = {path.name: path.stat().st_mtime_ns for path in many.glob("*.npz")}
    assert sorted(times) == ["00000000-00000002.npz", "00000002-00000003.npz"]
    more = drawn(folders[kind], many, *words, "--num", "5", "--batch-size", "2")
    assert (many / "00000000-00000002.npz").stat().st_mtime_ns == times["00000000-00000002.npz"]
    assert alike(more[:3], first)
    monkeypatch.setattr(text_to_image, "FILE_BYTES", 2**20)  # all in one file
    one_by_one = drawn(folders[kind], few, *words, "--num", "5", "--batch-size", "1")
    assert alike(one_by_one, more)
    for i, j in itertools.combinations(range(5), 2):  # whichever files they are in
        assert not alike(more[i], more[j])
    record = json.loads((many / sample_folders.RECORD).read_text())
    assert record["guidance"] == {"scale": SCALES[kind], "rule": "rescaled", "interval": None}
    assert (record["prompt"], record["label"]) == ((PROMPT, None) if kind == "text" else (None, 2))
    assert (record["size"], record["per_file"]) == ([8, 8], 2)


def test_a_folder_of_other_images_is_refused_before_anything_is_drawn(folders, tmp_path, capsys):
    words = ("--label", "1", "--sampler", "euler")
    drawn(folders["flow"], tmp_path / "out", *words)
    for change, said in (
        (("--seed", "1"), r"seed 0 \(asked 1\)"),
        (("--guidance-scale", "2"), "guidance"),
        (("--dtype", "bfloat16"), "weights"),
    ):
        assert run(folders["flow"], tmp_path / "out", *words, *change) == 1
        assert_said(capsys, said)


def assert_said(capsys, pattern):
    error = capsys.readouterr().err
    assert re.search(pattern, error), error
    assert "Traceback" not in error


def test_strength_0_is_the_round_trip_of_the_autoencoder(folders, picture, tmp_path):
    words = ("--prompt", PROMPT, "--init-image", picture.image, "--strength", "0")
    got = drawn(folders["text"], tmp_path / "out", *words, "--num", "2")
    encoder = known(folders["text"]).autoencoder

    @jax.jit
    def there_and_back(params, x):
        return weights.to_levels(encoder.decode(params, encoder.encode(params, x)[0]))

    wanted = there_and_back(encoder.params, weights.from_levels(picture.levels)[None])
    for image in got:
        assert alike(image, np.asarray(wanted[0]))


def test_strength_1_is_noise_alone_where_noise_is_all(folders, picture, tmp_path):
    """Of a flow nothing of the image is left at t = 1; less noise leaves more of it."""
    alone = drawn(folders["flow"], tmp_path / "alone", "--label", "2", "--sampler", "euler")
    far = {}
    for strength in ("1", "0.5", "0"):
        words = ("--label", "2", "--sampler", "euler", "--init-image", picture.image)
        words = (*words, "--strength", strength)
        far[strength] = drawn(folders["flow"], tmp_path / f"at{strength[-1]}", *words)
    assert alike(far["1"], alone)
    assert not alike(far["0.5"], alone)
    np.testing.assert_array_equal(far["0"][0], picture.levels)  # pixels, without an autoencoder


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("inpainting", marks=pytest.mark.slow)])
def test_a_mask_keeps_the_rest_exactly(folders, picture, tmp_path, kind):
    words = (*OF[kind], "--init-image", picture.image, "--mask", picture.mask)
    got = drawn(folders[kind], tmp_path / kind, *words, "--num", "2", "--batch-size", "1")
    keep = np.asarray(Image.open(picture.mask)) < 128
    for image in got:
        np.testing.assert_array_equal(image[keep], picture.levels[keep])
        assert not alike(image[~keep], picture.levels[~keep])
    assert not alike(got[0][~keep], got[1][~keep])


@pytest.mark.slow
def test_leaning_away_from_the_prompt_itself_changes_nothing(folders, tmp_path):
    """The negative prompt stands where guidance has its null."""
    plain = drawn(folders["text"], tmp_path / "a", "--prompt", PROMPT, "--guidance-scale", "1")
    words = ("--prompt", PROMPT, "--negative-prompt")
    same = drawn(folders["text"], tmp_path / "b", *words, PROMPT, "--interval", "0", "1000")
    assert alike(plain, same)
    other = drawn(folders["text"], tmp_path / "c", *words, "cat")
    assert not alike(plain, other)


@pytest.mark.slow
def test_classes_come_in_turn_or_as_asked(folders, tmp_path):
    turn = tmp_path / "turn"
    images = drawn(folders["classes"], turn, "--num", "6", "--dtype", "bfloat16")
    assert images.shape == (6, 16, 16, 3)
    np.testing.assert_array_equal(sample_folders.read(turn)[1], [0, 1, 2, 3, 4, 0])


@pytest.mark.slow
def test_pixels_are_clipped_as_the_scheduler_says(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    images = drawn(folders["pixels"], out, "--sampler", "ancestral", "--height", "4")
    assert images.shape == (1, 4, 8, 3)
    loaded = LOADED[str(folders["pixels"]), "float32"]
    assert loaded.clip == 1.0
    monkeypatch.setitem(LOADED, (str(folders["pixels"]), "float32"), loaded._replace(clip=None))
    words = ("--sampler", "ancestral", "--height", "4")
    assert not alike(images, drawn(folders["pixels"], tmp_path / "loose", *words))


def test_what_of_a_prompt_does_not_fit_is_said(folders, capsys):
    asked = Asked(prompt="The cat " * 5, negative_prompt="the")
    condition(known(folders["text"]), asked, (8, 8))
    said = capsys.readouterr().err
    assert "--prompt has more than the 9 tokens that its encoder takes" in said
    assert "left out: 'cat The cat'" in said
    assert "--negative-prompt" not in said


IMAGE = ("--init-image", "IMAGE")
REFUSED = [
    ("text", (), '--prompt must be given, with "" for none'),
    ("text", ("--negative-prompt", "a"), '--prompt must be given, with "" for none'),
    ("text", ("--prompt", "a", "--num", "0"), "--num must be at least 1; got 0"),
    ("IMAGE", ("--prompt", "a"), "--weights: .*is a picture, not weights. Give the folder"),
    ("text", ("--prompt", "a", "--autoencoder", "IMAGE"), "--autoencoder: .*is a picture, not w"),
    ("text", ("--prompt", "a", "--label", "1"), "--label must be left out: these weights take te"),
    ("classes", ("--prompt", "a"), r"--prompt must be left out.*Give --label, 0\.\.4"),
    ("classes", ("--label", "5"), r"--label must be in 0\.\.4; got 5"),
    ("classes", ("--height", "8"), "--height and --width must be 16 and 16 for a transformer"),
    ("pixels", ("--label", "1"), "--label must be left out: these weights take nothing"),
    ("pixels", ("--guidance-scale", "2"), "--guidance-scale must be 1 for weights without"),
    ("text", ("--prompt", "a", "--guidance-scale", "nan"), "--guidance-scale must be finite"),
    ("text", ("--prompt", "a", "--interval", "2", "1"), "--interval must be LOW HIGH"),
    (
        "text",
        ("--prompt", "a", "--negative-prompt", "b", "--guidance-scale", "1"),
        "--negative-prompt acts by guidance alone",
    ),
    ("text", ("--prompt", "a", "--height", "9"), "--height must be a positive multiple of 2"),
    ("text", ("--prompt", "a", "--strength", "0.5"), "--strength needs --init-image"),
    ("text", ("--prompt", "a", "--mask", "m.png"), "--mask needs --init-image"),
    ("text", ("--prompt", "a", *IMAGE, "--strength", "1.5"), r"--strength must be in \[0, 1\]"),
    ("text", ("--prompt", "a", "--init-image", "none.png"), "--init-image: none.png cannot be"),
    ("inpainting", ("--prompt", "a"), "--init-image and --mask must be given: these weights are"),
    ("text", ("--prompt", "a", "--seed", "-1"), "--seed must lie in"),
    ("text", ("--prompt", "a", "--batch-size", "0"), "--batch-size must be at least 1"),
    ("none", ("--prompt", "a"), "--weights: `path` must be a folder, a file, or a hub id"),
    ("text/vae", ("--prompt", "a"), "--weights must be a pipeline or a denoising network"),
    ("text/tokenizer", ("--prompt", "a"), "--weights: .*has no config.json"),
    ("text/unet", ("--prompt", "a"), "--weights: .*has no text encoder"),
    ("classes/transformer", (), "--autoencoder must be given: .* makes latents of 4 channels"),
    ("flow", ("--autoencoder", "VAE"), "--autoencoder must have the 3 channels"),
]


@pytest.mark.parametrize(("name", "words", "said"), REFUSED)
def test_what_cannot_be_done_is_refused_in_a_sentence(
    folders, picture, tmp_path, capsys, name, words, said
):
    kind, *below = name.split("/")
    words_of = {"IMAGE": picture.image, "VAE": folders["text"] / "vae"}
    folder = folders.get(kind, tmp_path / "none").joinpath(*below)
    folder = words_of.get(name, folder)
    assert run(folder, tmp_path / "out.png", *(words_of.get(word, word) for word in words)) == 1
    assert_said(capsys, said)
    assert not (tmp_path / "out.png").exists()


def test_out_must_be_a_png_or_a_folder(folders, tmp_path, capsys):
    assert run(folders["text"], tmp_path / "a.jpg", "--prompt", "a") == 1
    assert_said(capsys, r"--out must end in \.png, or be a folder")


def test_weights_that_are_not_whole_are_refused_with_what_is_missing(folders, tmp_path, capsys):
    copy = shutil.copytree(folders["text"], tmp_path / "copy")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert run(copy, tmp_path / "a.png", "--prompt", "a") == 1
    assert_said(capsys, "error: --weights: .*unet")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["adaptive", "unipc_2", "edm_churn", "predictor_corrector"])
def test_every_way_of_sampling_keeps_what_is_known(folders, picture, tmp_path, sampler):
    words = ("--label", "2", "--init-image", picture.image, "--mask", picture.mask)
    got = drawn(folders["flow"], tmp_path / "out", *words, "--sampler", sampler, "--num", "2")
    keep = np.asarray(Image.open(picture.mask)) < 128
    np.testing.assert_array_equal(got[0][keep], picture.levels[keep])


def started(folder, out, *words, devices=1):
    """The command in a process of its own, by so many forced devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {os.environ.get('XLA_FLAGS', '')}"
    command = [sys.executable, "-W", "error", "-m", "experiments.text_to_image", "--quiet"]
    given = ("--weights", folder, "--out", out, "--num-steps", STEPS, *words)
    return subprocess.Popen(
        [*command, *map(str, given)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )


def finished(process):
    """What a command says that ends well."""
    said, error = process.communicate()
    assert process.returncode == 0, error
    return said


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["pmap", "mesh"])
def test_images_are_the_same_on_eight_devices(folders, picture, tmp_path, parallel):
    words = ("--prompt", PROMPT, "--num", "5", "--init-image", picture.image)
    words = (*words, "--mask", picture.mask, "--strength", "0.9")
    one = drawn(folders["text"], tmp_path / "one", *words)
    words = (*words, "--batch-size", "1", "--parallel", parallel)
    finished(started(folders["text"], tmp_path / parallel, *words, devices=8))
    assert alike(sample_folders.read(tmp_path / parallel)[0], one)


def kept(folder):
    """The bytes of a folder's files, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_folder_that_was_killed_goes_on_to_the_bytes_of_the_unharmed_one(folders, tmp_path):
    """Killed when one file is there and the next is drawn, and again when another is."""
    words = ("--prompt", PROMPT, "--num", "2300", "--batch-size", "16")
    unharmed, killed = tmp_path / "unharmed", tmp_path / "killed"
    finished(started(folders["text"], unharmed, *words))
    wanted = kept(unharmed)
    assert len(wanted) == 4  # three files and the record
    for num_files in (1, 2):
        process = started(folders["text"], killed, *words)
        while len(list(killed.glob("*.npz"))) < num_files and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        files = {name: held for name, held in kept(killed).items() if name.endswith(".npz")}
        assert num_files <= len(files) < 3
        assert files.items() <= wanted.items()
    by_pmap = shutil.copytree(killed, tmp_path / "by_pmap")
    there = f"3 files, {len(files)} of them there before"
    assert there in finished(started(folders["text"], killed, *words))
    assert kept(killed) == wanted
    others = started(folders["text"], by_pmap, *words, "--parallel", "pmap", devices=4)
    assert there in finished(others)
    assert kept(by_pmap) == wanted
