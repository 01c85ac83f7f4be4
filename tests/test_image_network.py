"""The networks of images as the command line asks for them."""

import dataclasses

import jax
import pytest

from experiments import digits
from experiments.common.command import Refusal
from experiments.images import model as image_model
from jaxdiff import data

IMAGES = data.load_images("digits", "train")
SMOKE = image_model.PRESETS["smoke"]


def names_of(**fields):
    """Return the parameters of a network by their dotted names, as shapes."""
    model = image_model.build_model(dataclasses.replace(SMOKE, **fields), IMAGES)
    leaves = jax.tree.leaves_with_path(jax.eval_shape(model.init_params))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves
    }


def test_fields_reach_the_network():
    assert names_of() == names_of(num_heads=8)
    assert names_of(mlp_ratio=3)["block_00.inner.kernel"] == (32, 96)
    unet = names_of(network="unet", width=8, multipliers=(1, 3), attention_levels=(0,), num_heads=2)
    assert unet["down_attention_00_00.qkv.kernel"] == (8, 24)
    assert unet["down_01_00.conv_in.kernel"] == (3, 3, 8, 24)


def test_a_record_keeps_what_is_given_and_what_is_not():
    config = dataclasses.replace(SMOKE, network="unet", multipliers=(1, 3), decay_steps=20)
    assert image_model.from_record(image_model.to_record(config)) == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--multipliers", "1", "2"), "--multipliers is not one of the dit's options."),
        (("--network", "unet", "--mlp-ratio", "2"), "--mlp-ratio is not one of the unet's"),
        (("--num-heads", "3"), "--width: `width` must be a multiple of 4 and of num_heads = 3"),
        (("--network", "unet", "--num-heads", "5"), "--num-heads: `num_heads` must divide"),
        (("--network", "unet", "--attention-levels", "1", "3"), "--attention-levels: `attention"),
        (("--network", "unet", "--attention-levels", "-1"), "--attention-levels must be at least"),
        (("--network", "unet", "--multipliers", "1", "0"), "--multipliers must be at least 1"),
        (("--network", "unet", "--multipliers", *"11111"), "--multipliers: `shape` must have H"),
    ],
)
def test_what_a_network_does_not_take_is_refused(tmp_path, capsys, options, said):
    argv = ["train", "--preset", "smoke", "--run-dir", str(tmp_path / "run"), *options]
    assert digits.main(argv) != 0
    assert said in capsys.readouterr().err


def test_an_option_of_another_network_is_a_refusal():
    with pytest.raises(Refusal, match="--attention-levels"):
        names_of(attention_levels=(0,))
