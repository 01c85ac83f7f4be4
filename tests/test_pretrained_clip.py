"""CLIP's text encoders: what transformers makes of the same weights, and the published files."""

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_cases as cases
import pytest
from flax import nnx
from peers.common import read, read_keys

from jaxdiff import nn
from jaxdiff.pretrained import clip, naming

SD15 = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "eos_token_id": 2,
}
SD21 = SD15 | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
}
SDXL_2 = SD21 | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float64") for name in ("sd1", "sd2", "projected")),
        ("projected", "float32"),
        *(pytest.param(name, "float32", marks=pytest.mark.slow) for name in ("sd1", "sd2")),
    ],
)
def test_text_is_encoded_as_transformers_does(name, dtype):
    golden = read(f"clip_{name}")
    params, apply = cases.loaded(clip, golden, dtype)
    tokens = golden.arrays["tokens"]
    found, skipped = (
        jax.jit(apply, static_argnames="skip")(params, tokens, skip=n) for n in (0, 1)
    )
    for array, key in ((found.tokens, "hidden"), (found.pooled, "pooled"), (skipped[0], "skipped")):
        assert array.dtype == dtype
        assert cases.error(array, golden.arrays[key]) < cases.TOLERANCE[dtype], key
    np.testing.assert_array_equal(skipped.pooled, found.pooled)


@pytest.mark.slow
def test_bfloat16_is_near():
    golden = read("clip_sd1")
    params, apply = cases.loaded(clip, golden, "bfloat16")
    found = jax.jit(apply)(params, golden.arrays["tokens"])
    assert found.tokens.dtype == jnp.bfloat16
    assert cases.error(found.tokens, golden.arrays["hidden"]) < 0.03  # 8 bits


def test_a_token_sees_those_before_it_alone():
    golden = read("clip_sd1")
    params, apply = cases.loaded(clip, golden, "float64")
    tokens = golden.arrays["tokens"]
    apply = jax.jit(apply)
    changed = apply(params, np.where(np.arange(tokens.shape[1]) < 4, tokens, 0))
    whole = apply(params, tokens)
    np.testing.assert_array_equal(changed.tokens[:, :4], whole.tokens[:, :4])
    assert np.all(np.abs(changed.tokens[1:, 4:] - whole.tokens[1:, 4:]).max(axis=(1, 2)) > 0.01)


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [
        ("clip_sd15", SD15, 123_060_480),
        ("clip_sd21", SD21, 340_387_840),
        pytest.param("clip_sdxl_2", SDXL_2, 694_659_840, marks=pytest.mark.slow),
    ],
)
def test_published_files_are_mapped_one_to_one(name, config, count):
    shapes = read_keys(name)
    bare = {key.removeprefix("text_model."): shape for key, shape in shapes.items()}
    assert cases.num_mapped(clip, config, shapes, bare) == count


def test_a_file_without_a_bias_is_refused():
    shapes = read_keys("clip_sd15")
    del shapes["text_model.encoder.layers.3.self_attn.v_proj.bias"]
    like, _ = cases.abstract(clip, SD15)
    with pytest.raises(naming.NamingError, match=r"block_03\.qkv\.bias \[2304\], part 2 of 3"):
        naming.plan(clip.TABLE, shapes, like)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": ["CLIPModel"]}, "`architectures` of the config .* got CLIPModel"),
        ({"hidden_act": "relu"}, "`hidden_act` of the config .* quick_gelu, gelu; got relu"),
        ({"eos_token_id": [1, 2]}, "`eos_token_id` of the config must be one token"),
        ({"num_attention_heads": 5}, "`width` must be a multiple of num_heads = 5; got 768"),
    ],
)
def test_other_configs_are_refused_by_name(change, match):
    with pytest.raises(ValueError, match=match):
        cases.abstract(clip, SD15 | change)


@pytest.mark.parametrize(
    ("tokens", "options", "kind", "match"),
    [
        (np.zeros((2, 10), int), {}, ValueError, r"`tokens` must have shape \(B, L\), L at most 9"),
        (np.zeros(3, int), {}, ValueError, r"`tokens` must have shape .* got \(3,\)"),
        (np.full((1, 2), 40), {}, ValueError, r"`tokens` must be in 0\.\.39"),
        (np.zeros((1, 2)), {}, TypeError, "`tokens` must hold integers"),
        (np.zeros((1, 2), int), {"skip": 3}, ValueError, "`skip` must be at most 2"),
    ],
)
def test_other_tokens_are_refused(tokens, options, kind, match):
    sizes = {"width": 16, "depth": 2, "num_heads": 4, "hidden": 24, "length": 9}
    network = nnx.eval_shape(lambda: nn.TextEncoder(40, **sizes, rngs=nnx.Rngs(0)))
    with pytest.raises(kind, match=match):
        network(tokens, **options)
