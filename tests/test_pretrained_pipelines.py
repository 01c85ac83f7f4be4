"""Pipelines make what diffusers' make of the same weights and noise: latents, and pictures."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_cases
import pytest
import text_to_image_cases as cases
from peers.common import read
from PIL import Image

from experiments.common.command import Refusal
from experiments.pretrained import generator
from experiments.pretrained.conditioning import Asked, Guidance, Guided, condition
from experiments.pretrained.editing import Editing, edit
from experiments.pretrained.weights import open_weights
from jaxdiff import pretrained
from jaxdiff.processes import Process

GOLDEN = read("pipelines")
ASKED, ARRAYS = GOLDEN.config, GOLDEN.arrays
FOLDERS = {
    "text": cases.text_pipeline,
    "inpainting": lambda folder: cases.text_pipeline(folder, "unet_inpainting"),
    "two": cases.two_text_pipeline,
}

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """What the command draws from the golden's noise: (pixels, what they are decoded from)."""

    def prior_sample(self, key, shape, *, t, **_):
        return self.sigma(jnp.asarray(t)) * jnp.broadcast_to(ARRAYS["noise"], shape)

    monkeypatch.setattr(Process, "prior_sample", prior_sample)
    seen, make_decode = [], generator.make_decode

    def making(*given):
        decode = make_decode(*given)
        return lambda x0: (seen.append(x0), decode(x0))[1]

    monkeypatch.setattr(generator, "make_decode", making)
    for name in ("image", "mask"):
        Image.fromarray(ARRAYS[name]).save(tmp_path / f"{name}.png")

    def draw(kind, asked, **editing):
        names = ("init_image", "mask")
        editing = {k: str(tmp_path / v) if k in names else v for k, v in editing.items()}
        loaded = open_weights(str(FOLDERS[kind](tmp_path / kind)))
        guided = Guided(loaded, Guidance(), ASKED["scale"])
        size = ARRAYS["image"].shape[:2]
        labels = np.zeros(1, np.int64)
        made = generator.make_draw(
            guided,
            condition(loaded, asked, size),
            jax.random.key(0),
            labels,
            size,
            sampler="ddim",
            num_steps=ASKED["num_steps"],
            edit=edit(loaded, Editing(**editing), size),
        )
        return made(0, 1)[0], seen[-1]

    return draw


def check(found, name, where=True):
    pixels, latents = found
    assert pretrained_cases.error(latents, ARRAYS[f"{name}_latents"]) < 1e-4
    wanted = 255 * ARRAYS[f"{name}_images"][0]
    assert wanted.std() > 20  # it is a picture
    where = np.broadcast_to(where, pixels.shape)
    assert np.abs(pixels - wanted)[where].max() <= 1.01  # one level, by rounding


BOTH = Asked(ASKED["prompt"], ASKED["negative_prompt"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "asked"),
    [
        ("text", "text", BOTH),
        ("two_texts", "two", BOTH),
        ("zeros", "two", Asked(ASKED["prompt"])),
    ],
)
def test_images_of_text_are_those_of_diffusers(drawn, name, kind, asked):
    check(drawn(kind, asked), name)


@pytest.mark.slow
def test_edited_images_are_those_of_diffusers(drawn):
    check(drawn("text", BOTH, init_image="image.png", strength=0.6), "edited")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strength"), [("painted", None), ("half_painted", 0.6)])
def test_painted_images_are_those_of_diffusers_where_they_are_painted(drawn, name, strength):
    edits = {"init_image": "image.png", "mask": "mask.png", "strength": strength}
    found = drawn("inpainting", BOTH, **edits)
    check(found, name, where=ARRAYS["mask"][:, :, np.newaxis] >= 128)


def test_prompts_are_encoded_by_two_encoders_as_diffusers_does(tmp_path):
    text = pretrained.load(cases.two_text_pipeline(tmp_path / "two")).text
    tokens = text.tokenize(ASKED["prompt"])
    assert tokens.shape == (1, 2, 9)
    assert (tokens[0, 0] != tokens[0, 1]).any()  # what fills up
    found = jax.jit(text.encode)(text.params, tokens)
    for name in ("tokens", "pooled"):
        assert pretrained_cases.error(found[name], ARRAYS[name]) < 1e-5


def test_two_encoders_are_whole_or_refused(tmp_path):
    folder = cases.two_text_pipeline(tmp_path / "two")
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(pretrained.WeightsError, match="text_encoder_2 has no tokenizer"):
        pretrained.load(folder).text.tokenize("a")
    index = json.loads((folder / "model_index.json").read_text())
    refiner = index | {"text_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(refiner))
    with pytest.raises(pretrained.WeightsError, match="text_encoder_2 beside it"):
        pretrained.load(folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    with pytest.raises(Refusal, match="takes sizes in pixels, as that of SDXL, which its autoenc"):
        open_weights(str(folder), decodes=False)
    del index["text_encoder_2"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(Refusal, match="two text encoders must lie beside it"):
        open_weights(str(folder))
