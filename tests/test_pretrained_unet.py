"""diffusers' U-Nets: equal to what the source made of them, and complete for the published files."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_cases as cases
import pytest
from peers.common import read, read_keys
from unet_cases import PUBLISHED

from jaxdiff import nn
from jaxdiff.pretrained import naming, unet

NAMES = ("sd1", "sd1_resized", "sd2", "sdxl", "inpainting", "ddpm", "scaled")
SIZES = {
    "unet_sd15": 859_520_964,
    "unet_sd15_inpainting": 859_535_364,
    "unet_sd21": 865_910_724,
    "unet_sdxl": 2_567_463_684,
    "unet_ddpm_cifar10": 35_746_307,
}


def inputs(golden):
    """What the network takes: (x, t, cond)."""
    given = {name: x for name, x in golden.arrays.items() if name != "y"}
    x, t = given.pop("x"), given.pop("t")
    return x, t, (given.get("tokens") if set(given) <= {"tokens"} else given)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_the_source_in_all_digits(name):
    golden = read(f"unet_{name}")
    params, apply = cases.loaded(unet, golden, "float64")
    assert apply.time == "step"
    y = jax.jit(apply)(params, *inputs(golden))
    assert cases.error(y, golden.arrays["y"]) < cases.TOLERANCE["float64"]


def test_outputs_equal_the_source_as_it_rounds_steps_in_float32():
    golden = read("unet_sd1_float32")
    params, apply = cases.loaded(unet, golden, "float32")
    x, t, tokens = (jnp.asarray(given, jnp.float32) for given in inputs(golden))
    y = jax.jit(apply)(params, x, t, tokens)
    assert y.dtype == jnp.float32
    assert cases.error(y, golden.arrays["y"]) < cases.TOLERANCE["float32"]
    params, apply = cases.loaded(unet, golden, "bfloat16")
    y = jax.jit(apply)(params, x, t, tokens)
    assert y.dtype == jnp.float32
    assert cases.error(y, golden.arrays["y"]) < 0.05  # 8 bits


def test_the_first_names_of_attention_mean_the_same():
    golden = read("unet_ddpm")
    first = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = golden.weights()
    for new, old in first.items():
        weights = {key.replace(f".{new}.", f".{old}."): x for key, x in weights.items()}
    assert weights.keys() != golden.weights().keys()
    like, _ = cases.abstract(unet, golden.config)
    found = naming.fill(unet.TABLE, weights, like, "float32")
    jax.tree.map(np.testing.assert_array_equal, found, cases.loaded(unet, golden, "float32")[0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_mapped_one_to_one(name):
    shapes = read_keys(name)
    assert cases.num_mapped(unet, PUBLISHED[name], shapes) == SIZES[name]
    assert sum(math.prod(shape) for shape in shapes.values()) == SIZES[name]


SD15, DDPM = PUBLISHED["unet_sd15"], PUBLISHED["unet_ddpm_cifar10"]


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"_class_name": "UNet3D"}, "`_class_name` must be one of UNet2DModel, .* got 'UNet3D'"),
        (SD15 | {"act_fn": "mish"}, "`act_fn` of the config must be 'silu' or 'swish'; got 'mish'"),
        (SD15 | {"num_class_embeds": 10}, "`num_class_embeds` of the config must be None; got 10"),
        (SD15 | {"only_cross_attention": [True] * 4}, "`only_cross_attention` of the config"),
        (SD15 | {"encoder_hid_dim_type": "image_proj"}, "`encoder_hid_dim_type` of the config"),
        (SD15 | {"something": 1}, "`something` of the config is not known; got 1"),
        (SD15 | {"down_block_types": ["DownBlock2D"]}, "`down_block_types` .* must be 4"),
        (SD15 | {"attention_head_dim": 7}, "`attention_head_dim` .* must divide 320 channels"),
        (SD15 | {"attention_head_dim": [5, 10]}, "`attention_head_dim` .* each of 4 levels"),
        (SD15 | {"out_channels": 8}, "`out_channels` .* learned variance is not supported"),
        (SD15 | {"addition_embed_type": "text_time"}, "must say projection_class_embeddings_"),
        (DDPM | {"downsample_type": "resnet"}, "`downsample_type` of the config must be 'conv'"),
        (
            DDPM | {"up_block_types": ["CrossAttnUpBlock2D"] * 4},
            "`up_block_types` of the config must be of UpBlock2D, AttnUpBlock2D; got 'CrossAttn",
        ),
        (DDPM | {"norm_num_groups": 48}, "`norm_num_groups` .* must divide all .* 48 and 128"),
    ],
)
def test_other_configs_are_refused_by_name(config, match):
    with pytest.raises(ValueError, match=match):
        unet.make(config)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("sd1", {"cond": None}, "`cond` must be a mapping of tokens for this network; got none"),
        ("sd1", {"cond": np.zeros((2, 5, 11))}, r"`cond\[\"tokens\"\]` must have shape \(2, L, 12"),
        ("sd1", {"x": np.zeros((2, 8, 4, 3))}, r"`x` must have shape \(B, H, W, 4\)"),
        ("sd1", {"t": np.zeros(3)}, r"`t` must have shape \(\) or \(2,\); got \(3,\)"),
        ("inpainting", {"cond": np.zeros((2, 5, 12))}, "a mapping of tokens, beside"),
        ("sdxl", {"cond": {"tokens": np.zeros((2, 5, 12))}}, "tokens, pooled, sizes .* got tokens"),
        ("ddpm", {"cond": np.zeros((2, 5))}, "`cond` must be None for this network"),
        ("ddpm", {"x": np.zeros((2, 7, 4, 3))}, "`x` must have H and W divisible by 2"),
    ],
)
def test_other_inputs_are_refused(name, change, match):
    golden = read(f"unet_{name}")
    params, apply = cases.abstract(unet, golden.config)
    given = dict(zip(("x", "t", "cond"), inputs(golden), strict=True)) | change
    if change.keys() != {"cond"} and name == "ddpm":
        given["cond"] = None
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda params: apply(params, **given), params)
