"""DINOv2 under all its names, against what transformers makes of images of three sizes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_cases as cases
import pytest
from peers.common import read, read_keys

from jaxdiff.nn.vision import bicubic
from jaxdiff.pretrained import dinov2, naming

SLOW = pytest.mark.slow
CASES = ("plain", "gated", "registers", "newer", "original")


@pytest.mark.parametrize("name", [*CASES, pytest.param("original_gated", marks=SLOW)])
def test_it_makes_of_images_what_its_source_makes(name):
    golden = read(f"dinov2_{name}")
    params, apply = cases.loaded(dinov2, golden, "float64")
    apply = jax.jit(apply)
    for size in ("same", "fewer", "more"):
        wanted = golden.arrays[f"{size}_output"]
        assert cases.error(apply(params, golden.arrays[size]), wanted) < 1e-10, size


@pytest.mark.parametrize(
    ("dtype", "within"), [("float32", 1e-5), pytest.param("bfloat16", 0.05, marks=SLOW)]
)
def test_lower_precision_is_near(dtype, within):
    golden = read("dinov2_registers")
    params, apply = cases.loaded(dinov2, golden, dtype)
    output = jax.jit(apply)(params, golden.arrays["fewer"])
    assert output.dtype == jnp.float32
    assert cases.error(output, golden.arrays["fewer_output"]) < within


LARGE = {
    "architectures": ["Dinov2Model"],
    "image_size": 518,
    "patch_size": 14,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
BASE = LARGE | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
GIANT = LARGE | {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}
GIANT |= {"use_swiglu_ffn": True}
REGISTERS = BASE | {"architectures": ["Dinov2WithRegistersModel"], "num_register_tokens": 4}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("base", BASE),
        pytest.param("large", LARGE, marks=SLOW),
        pytest.param("giant", GIANT, marks=SLOW),
        pytest.param("base_registers", REGISTERS, marks=SLOW),
        pytest.param("vitl14", None, marks=SLOW),
        ("vitb14_reg", None),
    ],
)
def test_the_published_weights_are_those_of_the_published_sizes(name, config):
    shapes = read_keys(f"dinov2_{name}")
    config = dinov2.config_of(shapes) if config is None else config
    mask = sum(math.prod(shape) for key, shape in shapes.items() if "mask_token" in key)
    num_weights = sum(map(math.prod, shapes.values()))
    assert cases.num_mapped(dinov2, config, shapes) == num_weights - mask


def test_the_sizes_of_a_file_without_config_are_told_from_it():
    config = dinov2.config_of(read_keys("dinov2_vitl14"))
    assert {key: config[key] for key in LARGE} == LARGE
    assert config["interpolate_offset"] == 0.1
    config = dinov2.config_of(read_keys("dinov2_vitb14_reg"))
    assert {key: config[key] for key in REGISTERS} == REGISTERS
    assert config["interpolate_offset"] == 0.0
    assert dinov2.config_of(read("dinov2_original_gated").shapes)["use_swiglu_ffn"]
    with pytest.raises(ValueError, match="cannot be told from it: 'patch_embed.proj.weight'"):
        dinov2.config_of({"a": (1,)})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["Dinov2ForImageClassification"]}, "`architectures` of the config"),
        ({"hidden_act": "relu"}, "`hidden_act` of the config must be 'gelu'; got 'relu'"),
        ({"qkv_bias": False}, "`qkv_bias` of the config must be True"),
        ({"image_size": [28, 14]}, r"`image_size` of the config must be one number; got \[28, 14"),
        ({"image_size": 100}, "`patch_size` must divide `image_size`"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, said):
    with pytest.raises(ValueError, match=said):
        dinov2.make(config)


def test_other_images_and_other_files_are_refused():
    golden = read("dinov2_plain")
    params, apply = cases.loaded(dinov2, golden, "float32")
    with pytest.raises(ValueError, match=r"`x` must have H and W divisible by 7.*\(1, 21, 20, 3\)"):
        apply(params, np.zeros((1, 21, 20, 3)))
    with pytest.raises(ValueError, match=re.escape("`x` must have shape (B, H, W, 3)")):
        apply(params, np.zeros((1, 21, 21, 1)))
    with pytest.raises(naming.NamingError, match="block_00.inner.kernel"):
        cases.loaded(dinov2, golden._replace(config=read("dinov2_gated").config), "float32")


@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_keeps_lines_inside_and_numbers_that_stay(antialias):
    np.testing.assert_allclose(bicubic(6, 6, antialias=antialias), np.eye(6), atol=1e-12)
    for new in (5, 12, 17):
        matrix = bicubic(12, new, antialias=antialias)
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
        places = (np.arange(new) + 0.5) * 12 / new - 0.5
        inside = (places > 5) & (places < 6)
        line = matrix @ np.arange(12.0)
        np.testing.assert_allclose(line[inside], places[inside], atol=1e-12 if new > 5 else 0.1)
