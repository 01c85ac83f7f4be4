"""diffusers' U-Nets: equal to their source, and complete for the published files."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_cases as cases
import pytest
from peers.common import read, read_keys
from unet_cases import PUBLISHED

from jaxdiff import Model, guidance, sample, samplers
from jaxdiff.pretrained import naming, schedulers, unet

SIZES = {
    "unet_sd15": 859_520_964,
    "unet_sd15_inpainting": 859_535_364,
    "unet_sd21": 865_910_724,
    "unet_sdxl": 2_567_463_684,
    "unet_ddpm_cifar10": 35_746_307,
}
SLOW = [pytest.mark.slow]
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def inputs(golden):
    """What the network takes: (x, t, cond)."""
    given = {name: x for name, x in golden.arrays.items() if name != "y"}
    x, t = given.pop("x"), given.pop("t")
    return x, t, (given.get("tokens") if set(given) <= {"tokens"} else given)


@pytest.mark.parametrize(
    "name",
    [
        "ddpm",  # and those of sd1 in test_pretrained_loading, of sd2 along a trajectory
        *(
            pytest.param(name, marks=SLOW)
            for name in ("inpainting", "sd1", "sd2", "sdxl", "scaled")
        ),
    ],
)
def test_outputs_equal_the_source_in_all_digits(name):
    golden = read(f"unet_{name}")
    params, apply = cases.loaded(unet, golden, "float64")
    assert apply.time == "step"
    y = jax.jit(apply)(params, *inputs(golden))
    assert cases.error(y, golden.arrays["y"]) < cases.TOLERANCE["float64"]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=SLOW)])
def test_outputs_equal_the_source_as_it_rounds_steps(dtype):
    golden = read("unet_rounded")
    params, apply = cases.loaded(unet, golden, dtype)
    x, t, tokens = (jnp.asarray(given, jnp.float32) for given in inputs(golden))
    y = jax.jit(apply)(params, x, t, tokens)
    assert y.dtype == jnp.float32
    tolerance = cases.TOLERANCE["float32"] if dtype == "float32" else 0.05  # 8 bits
    assert cases.error(y, golden.arrays["y"]) < tolerance


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        pytest.param("trajectory_sd1", "epsilon", marks=SLOW),
        ("trajectory_sd2", "v_prediction"),
    ],
)
def test_guided_latents_of_ddim_equal_those_of_diffusers(name, prediction):
    golden = read(f"unet_{name}")
    params, apply = cases.loaded(unet, golden, "float64")
    schedule = schedulers.read(SCHEDULER | {"prediction_type": prediction})

    def at_time(params, x_t, t, cond, *, key=None):
        return apply(params, x_t, schedule.step(t), cond)

    model = Model(at_time, schedule.process, schedule.prediction)
    x_T, tokens, null = (golden.arrays[each] for each in ("x", "tokens", "null"))
    # Step n is at (n + 1) / 1000; the source ends at the first step, 1 / 1000.
    ts = (np.append(golden.arrays["steps"], 0) + 1) / 1000

    @jax.jit
    def latents(params):
        denoise = guidance.classifier_free_batched(model.denoiser(params), tokens, null, 5.0)
        return sample(jax.random.key(0), samplers.ddim(model.process, denoise), x_T, ts)

    # The source accumulates its schedule in float32.
    assert cases.error(latents(params), golden.arrays["latents"]) < 1e-5


def test_the_first_names_of_attention_mean_the_same():
    golden = read("unet_ddpm")
    new_names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

    def new(key):
        for old, name in new_names.items():
            key = key.replace(f".{old}.", f".{name}.")
        return key

    first = {}
    for key, shape in golden.shapes.items():
        for old, name in new_names.items():
            key = key.replace(f".{name}.", f".{old}.")
        first[key] = shape
    assert "mid_block.attentions.0.proj_attn.bias" in first
    like, _ = cases.abstract(unet, golden.config)
    expected, found = (naming.plan(unet.TABLE, x, like).sources for x in (golden.shapes, first))
    renamed = {
        path: tuple(source._replace(key=new(source.key)) for source in sources)
        for path, sources in found.items()
    }
    assert renamed == expected


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("unet_sd15", "unet_ddpm_cifar10") else SLOW)
        for name in PUBLISHED
    ],
)
def test_published_files_are_mapped_one_to_one(name):
    shapes = read_keys(name)
    assert cases.num_mapped(unet, PUBLISHED[name], shapes) == SIZES[name]
    assert sum(math.prod(shape) for shape in shapes.values()) == SIZES[name]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_denoising_step_of_full_size_runs_with_parameters_as_arguments(dtype):
    run = subprocess.run(
        [sys.executable, "-m", "unet_run", dtype],
        env={key: x for key, x in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": ".."},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    said = json.loads(run.stdout)
    assert said["finite"]
    assert said["arguments"] > SIZES["unet_sd15"] * jnp.dtype(dtype).itemsize
    assert said["peak"] < 9e9  # XLA on a CPU computes in float32, and keeps the weights in it


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
