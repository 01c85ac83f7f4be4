"""The likelihood of images under published weights, through its real command line."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_to_image_cases as cases
from PIL import Image
from weights_cases import load_once

from experiments import imported_likelihood
from experiments.common.command import Refusal
from experiments.images.judging import dequantized
from experiments.pretrained import likelihoods
from jaxdiff import Model, data, likelihood, numerics, pretrained, processes

LEVELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
PROMPTS = ["a cat", "the thing", "a cat"]
ROUGH = ("--tolerance", "1e-2")

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Weights of each kind, by what they make, and images."""
    root = tmp_path_factory.mktemp("weights")
    found = {
        "text": cases.text_pipeline(root / "text"),
        "two": cases.two_text_pipeline(root / "two"),
        "classes": cases.class_pipeline(root / "classes"),
        "flow": cases.flow_folder(root / "flow"),
        "pixels": cases.pixel_pipeline(root / "pixels"),
        "beside": cases.text_pipeline(root / "beside", "unet_inpainting"),
    }
    images = {"images": LEVELS, "labels": np.array([1, 5, 0]), "prompts": np.array(PROMPTS)}
    np.savez(root / "images.npz", **images)
    np.savez(root / "bare.npz", arr_0=LEVELS)
    np.savez(root / "odd.npz", images=LEVELS[:, :7], labels=np.array([1, 6, 0]))
    (root / "broken.npz").write_bytes((root / "bare.npz").read_bytes()[:200])
    np.savez(root / "floats.npz", images=LEVELS / 255.0)
    np.savez(root / "none.npz", images=LEVELS[:0])
    (root / "photos").mkdir()
    for i, levels in enumerate(LEVELS):
        Image.fromarray(levels[:, :, 0]).save(root / "photos" / f"{i}.png")
    (root / "animals/cat").mkdir(parents=True)
    Image.fromarray(LEVELS[0]).save(root / "animals/cat/0.png")
    return {**found, "root": root}


def run(folders, tmp_path, kind, *options, images="images.npz"):
    """Run the command; return what it wrote."""
    paths = ["--weights", str(folders[kind]), "--images", str(folders["root"] / images)]
    out = tmp_path / "made" / "found.json"
    assert imported_likelihood.main([*paths, "--out", str(out), *options]) == 0
    return json.loads(out.read_text())


def by_hand(loaded, x, cond, t_min=1e-3):
    """log p(x) as the library gives it, of all images at once."""
    _, key = jax.random.split(jax.random.key(0))
    process, tolerance = loaded.model.process, 1e-2

    @jax.jit
    def log_prob(params, keys, x, cond):
        denoise = loaded.model.denoiser(params)
        options = {"cond": cond, "key": keys, "num_probes": 1, "t_min": t_min}
        return likelihoods.likelihood.log_prob(
            process, denoise, x, rtol=tolerance, atol=tolerance, **options
        )[0]

    return np.asarray(log_prob(loaded.params, numerics.row_keys(key, len(x)), x, cond))


def one_evaluation(process, denoise, x, *, cond, key, num_probes, rtol, atol, t_min):
    """What takes the place of log p(x): it sees all that this is a function of, by one call."""
    probe = numerics.rademacher(key, x) if num_probes == 1 else x
    given = (x, t_min) if cond is None else (x, t_min, cond)
    return (probe * denoise(*given)).reshape(len(x), -1).sum(axis=1) - rtol, x


def values(found, unit):
    return np.array([each[unit] for each in found["per_image"]])


def test_the_likelihood_of_an_exact_network_is_exact():
    process, std = processes.flow(), 0.5

    def apply(params, x_t, t, cond=None, *, key=None):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return alpha * params * x_t / (alpha**2 * params + sigma**2)

    config = {"in_channels": 1}
    loaded = pretrained.Denoising(Model(apply, process, "x0"), std**2, None, None, config)
    images = data.Images.from_arrays(LEVELS[:, :2, :2, :1])
    with jax.enable_x64(True):
        protocol = likelihoods.Protocol(exact=True, tolerance=1e-6, t_min=0.01, batch_size=2)
        found = likelihoods.measure(loaded, images, [None] * 3, protocol)
        key, _ = jax.random.split(jax.random.key(0))
        x = dequantized(key, images.levels, images).reshape(3, -1)
        log_prob = jax.scipy.stats.norm.logpdf(x, 0.0, (0.99**2 * std**2 + 0.01**2) ** 0.5)
    wanted = -log_prob.mean(axis=1) / np.log(2.0) + 7.0  # bins of 2 / 256
    np.testing.assert_allclose(found.values, wanted, atol=1e-4)
    assert (found.unit, found.num_dims) == ("bits_per_dim", 4)


def judge_latents(folders, tmp_path, kind="text"):
    """Compare those of prompts with by_hand."""
    found = run(folders, tmp_path, kind, *ROUGH, "--dtype", "float64")
    with jax.enable_x64(True):
        loaded = pretrained.load(folders[kind], dtype="float64")
        x = (LEVELS.astype(np.float32) / 127.5 - 1.0).astype(np.float64)
        mean, _ = jax.jit(loaded.autoencoder.encode)(loaded.autoencoder.params, x)
        given = loaded.text.encode(loaded.text.params, loaded.text.tokenize(PROMPTS))
        if kind == "two":
            given["sizes"] = np.tile([8.0, 8.0, 0.0, 0.0, 8.0, 8.0], (3, 1))
        wanted = -by_hand(loaded, mean, given) / 64
    # a made-up network's flow is rough: it multiplies rounding by 1e6
    np.testing.assert_allclose(values(found, "nats_per_latent_dim"), wanted, rtol=1e-5)
    return found, wanted


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
def test_latents_of_prompts_have_the_librarys_likelihood(
    folders, tmp_path, capsys, monkeypatch, fast
):
    if fast:
        monkeypatch.setattr(likelihoods.likelihood, "log_prob", one_evaluation)
    found, wanted = judge_latents(folders, tmp_path)
    assert found["nats_per_latent_dim"] == pytest.approx(wanted.mean(), rel=1e-4)
    error = wanted.std(ddof=1) / 3**0.5
    assert found["nats_per_latent_dim_stderr"] == pytest.approx(error, rel=1e-3)
    assert [each["given"] for each in found["per_image"]] == PROMPTS
    assert (found["num_images"], found["num_dims"], found["not_finite"]) == (3, 64, 0)
    protocol = found["protocol"]
    assert protocol["t_min"] == pytest.approx(1e-3)
    assert protocol["noise_left"] == pytest.approx((0.00085 / 0.99915) ** 0.5, rel=1e-4)
    assert "no statement about bits of pixels" in protocol["of"]
    assert "bits_per_dim" not in found
    assert "nats per latent dim, 3 images of 64 numbers" in capsys.readouterr().out


@pytest.mark.slow
def test_latents_of_two_texts_are_given_both_and_their_size(folders, tmp_path, monkeypatch):
    """By one evaluation: to the made-up network's flow a rounding of 1e-14 is a change of 10%."""
    with monkeypatch.context() as fast:
        fast.setattr(likelihoods.likelihood, "log_prob", one_evaluation)
        judge_latents(folders, tmp_path, "two")
    found = run(folders, tmp_path, "two", *ROUGH, "--num", "1")
    assert (found["num_images"], found["not_finite"]) == (1, 0)


@pytest.mark.slow
def test_zeros_are_given_for_the_empty_prompt_where_they_stand_for_none(folders):
    loaded = pretrained.Denoising(None, None, None, pretrained.load(folders["two"]).text, {})
    given = likelihoods.given_to(loaded, ["a cat", "", "the thing"], (8, 6))
    wanted = loaded.text.encode(loaded.text.params, loaded.text.tokenize(["a cat", "the thing"]))
    for name in ("tokens", "pooled"):
        np.testing.assert_allclose(given[name][::2], wanted[name], rtol=1e-4, atol=1e-5)
        assert not given[name][1].any()
    np.testing.assert_array_equal(given["sizes"], np.tile([8, 6, 0, 0, 8, 6], (3, 1)))
    with jax.enable_x64(True):  # of --dtype float64, where sinusoids of sizes have all digits
        assert likelihoods.given_to(loaded, [""], (8, 6))["sizes"].dtype == np.float64
    spoken = loaded.text._replace(null_is_zero=False)
    given = likelihoods.given_to(loaded._replace(text=spoken), [""], (8, 6))
    assert given["pooled"].any()


def test_each_image_has_its_own_prompt(folders):
    loaded = pretrained.load(folders["text"] / "text_encoder")
    loaded = pretrained.Denoising(None, None, None, loaded, {})
    rows = likelihoods.given_to(loaded, PROMPTS, (8, 8))
    encode = jax.jit(loaded.text.encode)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        wanted = encode(loaded.text.params, loaded.text.tokenize([prompt]))[0]
        np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-5)


def judge_classes(folders, tmp_path):
    """Compare pixels of classes with by_hand."""
    found = run(folders, tmp_path, "flow", "--num", "2", *ROUGH)
    loaded = pretrained.load(folders["flow"])
    key_x, _ = jax.random.split(jax.random.key(0))
    x = dequantized(key_x, LEVELS[:2], data.Images.from_arrays(LEVELS[:2]))
    t_min = likelihood.default_t_min(loaded.model.process)
    log_prob = by_hand(loaded, x, jnp.array([1, 5]), t_min)
    wanted = likelihood.bits_per_dim(log_prob, 192, 2 / 256)
    np.testing.assert_allclose(values(found, "bits_per_dim"), wanted, rtol=1e-4)
    assert [each["given"] for each in found["per_image"]] == [1, 5]
    assert found["protocol"]["divergence"] == "1 Rademacher probes"


def test_pixels_of_classes_are_given_to_the_library(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihoods.likelihood, "log_prob", one_evaluation)
    judge_classes(folders, tmp_path)


@pytest.mark.slow
def test_pixels_of_classes_have_the_librarys_likelihood_in_bits(folders, tmp_path):
    judge_classes(folders, tmp_path)


@pytest.mark.slow
def test_pixels_of_nothing_in_particular_come_from_a_folder(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihoods.likelihood, "log_prob", one_evaluation)
    found = run(folders, tmp_path, "pixels", *ROUGH, images="photos")
    assert [each["image"] for each in found["per_image"]] == ["0.png", "1.png", "2.png"]
    assert not any("given" in each for each in found["per_image"])
    loaded = pretrained.load(folders["pixels"])
    key_x, _ = jax.random.split(jax.random.key(0))
    colours = np.repeat(LEVELS[..., :1], 3, axis=-1)
    x = dequantized(key_x, colours, data.Images.from_arrays(colours))
    wanted = likelihood.bits_per_dim(by_hand(loaded, x, None), 192, 2 / 256)
    np.testing.assert_allclose(values(found, "bits_per_dim"), wanted, rtol=1e-4)


@pytest.mark.slow
def test_neither_batches_nor_devices_change_an_image(folders, tmp_path):
    options = ("--prompt", "", "--latents", "sample", "--num-probes", "2", "--seed", "3")
    # at a rough tolerance the steps of a made-up network make rounding grow without bound
    options += ("--dtype", "float64", "--tolerance", "1e-5")
    all_at_once = run(folders, tmp_path, "text", *options)
    one_by_one = run(folders, tmp_path, "text", *options, "--batch-size", "1", "--num", "2")
    pairs = zip(all_at_once["per_image"], one_by_one["per_image"], strict=False)
    for one, other in pairs:
        assert one["given"] == other["given"] == ""
        name = "nats_per_latent_dim"
        assert one[name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.slow
def test_more_probes_and_digits_come_closer_to_the_exact_one(folders, tmp_path):
    options = ("--label", "2", "--dtype", "float64", "--tolerance", "1e-4")
    unit, images = "nats_per_latent_dim", "images16.npz"
    levels = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.savez(folders["root"] / images, images=levels)
    exact = values(run(folders, tmp_path, "classes", *options, "--exact", images=images), unit)
    errors = [
        abs(values(run(folders, tmp_path, "classes", *options, *probes, images=images), unit))
        for probes in (("--num-probes", "1"), ("--num-probes", "64"))
    ]
    few, many = (np.abs(each - abs(exact)).mean() for each in errors)
    assert many < few


def test_latents_are_the_posteriors_mean_or_a_draw():
    def encode(params, x):
        return params * x[:, ::2, ::2], 1.0 + x[:, ::2, ::2] ** 2

    encoder = pretrained.Autoencoder(np.float32(3.0), encode, None, {})
    levels = np.repeat(LEVELS[:1], 200, axis=0)
    key = jax.random.key(0)
    drawn = likelihoods.encoded(encoder, key, levels, "sample", 200)
    mean, std = encode(3.0, levels[:1].astype(np.float32) / 127.5 - 1.0)
    z = (drawn - mean) / std
    assert z.shape == (200, 4, 4, 3)
    assert abs(z.mean()) < 5 / z.size**0.5
    assert abs(z.std() - 1.0) < 5 / (2 * z.size) ** 0.5
    part = likelihoods.encoded(encoder, key, levels[:3], "sample", 2)
    np.testing.assert_allclose(part, drawn[:3], rtol=1e-5, atol=1e-5)
    means = likelihoods.encoded(encoder, key, levels[:3], "mean", 2)
    np.testing.assert_allclose(means, np.repeat(mean, 3, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "images", "options", "said"),
    [
        ("text", "bare.npz", (), '--prompt must be given, with "" for none'),
        ("text", "bare.npz", ("--label", "1"), "--label must be left out: these weights take text"),
        ("flow", "bare.npz", (), "--label must be given, with 5 for none"),
        ("flow", "bare.npz", ("--label", "6"), r"must be in 0\.\.5"),
        ("flow", "odd.npz", (), r"must be in 0\.\.5"),
        ("flow", "animals", (), "have 1 classes and the weights 5"),
        ("pixels", "bare.npz", ("--prompt", "x"), "--prompt must be left out: .* take nothing"),
        ("text", "odd.npz", ("--prompt", ""), "7 x 8 do not fit the network: .* multiples of 2"),
        ("classes", "bare.npz", ("--label", "1"), "8 x 8 do not fit the network"),
        ("beside", "bare.npz", ("--prompt", ""), "of inpainting"),
        ("pixels", "bare.npz", ("--t-min", "2"), "--t-min must lie between 0 and 1, .* is 0.001"),
        ("pixels", "bare.npz", ("--tolerance", "2"), "--tolerance must be in"),
        ("pixels", "bare.npz", ("--num-probes", "0"), "--num-probes must be at least 1"),
        ("pixels", "bare.npz", ("--image-size", "8"), "--image-size is for a folder"),
        (
            "text",
            "photos",
            ("--prompt", "", "--image-size", "7"),
            "--image-size must be a positive",
        ),
        ("pixels", "broken.npz", (), "broken.npz cannot be read"),
        ("pixels", "floats.npz", (), "cannot be read: `images` must be uint8"),
        ("pixels", "none.npz", (), r"`images` must have shape .* got \(0, 8, 8, 3\)\.$"),
        ("pixels", "bare.npz", ("--num", "0"), "--num must be at least 1; got 0"),
        ("pixels", "none", (), "--images: .*there is no folder"),
        ("root", "bare.npz", (), "--weights: .*has no config.json"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_a_sentence(
    folders, tmp_path, capsys, monkeypatch, kind, images, options, said
):
    monkeypatch.setattr(pretrained, "load", load_once)
    paths = ["--weights", str(folders[kind]), "--images", str(folders["root"] / images)]
    out = tmp_path / "found.json"
    assert imported_likelihood.main([*paths, "--out", str(out), *options]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(said, error), error
    assert not out.exists()


def test_results_are_json(folders):
    with pytest.raises(Refusal, match="--out must end in .json"):
        imported_likelihood.likelihood("x", "y", "z.txt", None, likelihoods.Protocol())
    found = likelihoods.Found(np.array([1.0, np.nan]), "bits_per_dim", 3, {})
    said = imported_likelihood.summary(found)
    assert said["bits_per_dim"] is None
    assert said["bits_per_dim_stderr"] is None
    assert said["not_finite"] == 1
    assert "1 of 2 images" in imported_likelihood.said(found, said)
    one = likelihoods.Found(np.array([1.0]), "bits_per_dim", 3, {})
    assert imported_likelihood.summary(one)["bits_per_dim_stderr"] is None
