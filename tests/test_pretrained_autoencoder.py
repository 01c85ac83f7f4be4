"""Autoencoders: what diffusers makes of the same weights, and the published files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_cases as cases
import pytest
from flax import nnx
from peers.common import read, read_keys

from jaxdiff import nn
from jaxdiff.pretrained import autoencoder, naming

SD = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
FLUX = SD | {
    "force_upcast": True,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
FIRST_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@functools.cache
def both_ways(name, dtype):
    """The parameters of a golden, encode and decode."""
    golden = read(name)
    like, encode = cases.abstract(autoencoder, golden.config, dtype, "encode")
    _, decode = cases.abstract(autoencoder, golden.config, dtype, "decode")
    params = naming.fill(autoencoder.TABLE, golden.weights(), like, dtype)
    return params, jax.jit(encode), jax.jit(decode)


def errors(name, dtype):
    """The errors of mean, standard deviation and decoded images."""
    golden, (params, encode, decode) = read(name), both_ways(name, dtype)
    mean, std = encode(params, golden.arrays["x"])
    found = {"mean": mean, "std": std, "decoded": decode(params, golden.arrays["z"])}
    assert all(array.dtype == jnp.promote_types(dtype, "float32") for array in found.values())
    return [cases.error(array, golden.arrays[name]) for name, array in found.items()]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("flux", "float32"),
        ("plain", "float64"),
        pytest.param("sd", "float64", marks=pytest.mark.slow),  # as part of a pipeline by default
        pytest.param("sd", "float32", marks=pytest.mark.slow),
        pytest.param("flux", "float64", marks=pytest.mark.slow),
    ],
)
def test_both_ways_are_those_of_diffusers(name, dtype):
    assert max(errors(f"autoencoder_{name}", dtype)) < cases.TOLERANCE[dtype]


@pytest.mark.slow
def test_bfloat16_is_near():
    assert max(errors("autoencoder_plain", "bfloat16")) < 0.04  # 8 bits, 15 convolutions


def test_first_names_and_convolutions_of_one_pixel_are_the_same_weights():
    golden = read("autoencoder_sd")
    weights, others = golden.weights(), {}
    for key, array in weights.items():
        for name, first in FIRST_NAMES.items():
            if f".{name}.weight" in key:
                array = array[:, :, np.newaxis, np.newaxis]
            key = key.replace(name, first)
        others[key] = array
    like, _ = cases.abstract(autoencoder, golden.config, method="encode")
    new, old = (naming.fill(autoencoder.TABLE, each, like, "float32") for each in (weights, others))
    assert others.keys() != weights.keys()
    assert jax.tree.all(jax.tree.map(np.array_equal, new, old))


def test_log_variance_is_kept_in_its_range():
    golden = read("autoencoder_plain")
    params, encode, _ = both_ways("autoencoder_plain", "float64")
    for bias, bound in ((-1e3, -30.0), (1e3, 20.0)):
        shifted = params | {"mix_out": params["mix_out"] | {"bias": jnp.full(8, bias)}}
        _, std = encode(shifted, golden.arrays["x"])
        np.testing.assert_allclose(std, 0.18215 * np.exp(bound / 2), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [
        ("autoencoder_sd", SD, 83_653_863),
        pytest.param("autoencoder_flux", FLUX, 83_819_683, marks=pytest.mark.slow),
    ],
)
def test_published_files_are_mapped_one_to_one(name, config, count):
    assert cases.num_mapped(autoencoder, config, read_keys(name), method="encode") == count


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"_class_name": "VQModel"}, "`_class_name` of the config must be Auto.*got VQModel"),
        ({"act_fn": "relu"}, "`act_fn` of the config must be 'silu' or 'swish'; got 'relu'"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "`up_block_types` of the config"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 3}, "`down_block_types` .* must be 4"),
        ({"latents_mean": [0.0] * 4}, "`latents_mean` of the config must be None"),
        ({"norm_num_groups": 48}, "`norm_num_groups` of the config must divide all"),
        ({"spatial_norm": True}, "`spatial_norm` of the config is not known; got True"),
        ({"scaling_factor": 0.0}, "`scale` must .* got 0.0"),
        ({"block_out_channels": []}, "`down_block_types` of the config must be 0"),
    ],
)
def test_other_configs_are_refused_by_name(change, match):
    with pytest.raises(ValueError, match=match):
        cases.abstract(autoencoder, SD | change, method="encode")


def test_other_images_and_latents_are_refused():
    network = nnx.eval_shape(lambda: nn.Autoencoder(widths=(8, 8), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, H, W, 3\); got \(2, 4, 4, 4\)"):
        network.encode(np.zeros((2, 4, 4, 4)))
    with pytest.raises(ValueError, match="`x` must have H and W divisible by 2; got"):
        network.encode(np.zeros((2, 4, 5, 3)))
    with pytest.raises(ValueError, match=r"`z` must have shape \(B, H, W, 4\); got \(2, 4, 4, 3\)"):
        network.decode(np.zeros((2, 4, 4, 3)))
    with pytest.raises(TypeError, match="`z` must hold real numbers"):
        network.decode(None)
    with pytest.raises(TypeError, match="`module` must have a __call__; Autoencoder has none"):
        nn.functional(network)
