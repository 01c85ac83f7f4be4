"""The diffusion transformer of both sets of names, against what its sources make of images."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_cases as cases
import pytest
from flax import nnx
from peers.common import read, read_keys

from jaxdiff import denoisers, guidance, losses, nn, processes, samplers
from jaxdiff.pretrained import dit, naming

SLOW = pytest.mark.slow
CASES = ("dit_original", "dit_plain", "dit_diffusers")


def weights(golden):
    """The golden's weights, with what is fixed or copied as its source has it."""
    found = golden.weights()
    if "pos_embed" in golden.arrays:
        found["pos_embed"] = golden.arrays["pos_embed"]
    for key in found:
        block, embedders, rest = key.partition(".norm1.emb.")
        if embedders and block != "transformer_blocks.0":
            found[key] = found[f"transformer_blocks.0.norm1.emb.{rest}"]
    return found


@functools.cache
def loaded(name, dtype="float64"):
    """Return (params, apply, golden)."""
    golden = read(name)
    like, apply = cases.abstract(dit, golden.config, dtype)
    return naming.fill(dit.TABLE, weights(golden), like, dtype), apply, golden


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float64") for name in CASES),
        *((name, "float32") for name in ("dit_original", "dit_diffusers")),
        pytest.param("dit_plain", "float32", marks=SLOW),
    ],
)
def test_it_makes_of_images_what_its_source_makes(name, dtype):
    params, apply, (*_, arrays) = loaded(name, dtype)
    x, t = (jnp.asarray(arrays[key], dtype) for key in "xt")
    output = jax.jit(apply)(params, x, t, arrays["y"])
    wanted = arrays["output" if dtype == "float64" else "output_float32"]
    assert output.dtype == dtype
    assert cases.error(output, wanted) < cases.TOLERANCE[dtype]


def test_steps_are_embedded_in_float32_as_diffusers_does():
    arrays = loaded("dit_diffusers")[2].arrays
    waves = nn.Steps(shift=1.0).embed(jnp.asarray(arrays["t"], jnp.float32))
    np.testing.assert_allclose(waves, arrays["waves_float32"], atol=2e-4)  # angles to 1000


@pytest.mark.slow
def test_bfloat16_is_near():
    params, apply, (*_, arrays) = loaded("dit_original", "bfloat16")
    output = jax.jit(apply)(params, arrays["x"], jnp.asarray(arrays["t"], "f4"), arrays["y"])
    assert output.dtype == jnp.float32
    assert cases.error(output, arrays["output"]) < 0.05


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_ten_guided_steps_end_where_those_of_diffusers_end(scale):
    params, apply, golden = loaded("dit_diffusers")
    model, x, y = dit.model(apply), golden.arrays["x"], golden.arrays["y"]
    null = jnp.full_like(y, golden.config["num_embeds_ada_norm"])
    denoise = guidance.classifier_free(
        model.denoiser(params, y), model.denoiser(params, null), scale
    )
    ts = jnp.asarray([*np.arange(901, 0, -100), 0]) / 1000
    sampler = samplers.ddim(model.process, denoise)
    sample = jax.jit(lambda x: samplers.sample(jax.random.key(0), sampler, x, ts))(x)
    assert cases.error(sample, golden.arrays[f"guided_{scale:.0f}"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "count"),
    [("dit_xl_2", 675_129_632), pytest.param("dit_xl_2_diffusers", 749_826_464, marks=SLOW)],
)
def test_the_published_weights_are_those_of_the_published_size(name, count):
    shapes = read_keys(name)
    assert sum(map(math.prod, shapes.values())) == count
    published = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    published |= {"out_channels": 8, "cross_attention_dim": None, "patch_size": 2}
    like, _ = cases.abstract(dit, dit.config_of(shapes) if name == "dit_xl_2" else published)
    plan = naming.plan(dit.TABLE, shapes, like)
    needed = sum(map(len, plan.sources.values()))
    assert needed + len(plan.copies) + len(plan.constants) == len(shapes)
    num_params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like))
    assert num_params == 675_129_632 - 256 * 1152  # the number less the positions, which are fixed


def test_the_sizes_of_a_file_without_config_are_told_from_it():
    config = dit.config_of(read_keys("dit_xl_2"))
    assert config == {
        "input_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 1152,
        "depth": 28,
        "num_heads": 16,
        "mlp_ratio": 4.0,
        "num_classes": 1000,
        "learn_sigma": True,
    }
    golden = read("dit_plain")
    with pytest.raises(ValueError, match="2 blocks of width 16, which is none of the published"):
        dit.config_of(golden.shapes)
    with pytest.raises(ValueError, match="cannot be told from it: 'x_embedder.proj.weight'"):
        dit.config_of({"a": (1,)})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"norm_type": "ada_norm_single"}, "`norm_type` of the config must be 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "`activation_fn` of the config must be 'gelu-approximate'"),
        ({"attention_bias": False}, "`attention_bias` of the config must be True; got False"),
        ({"cross_attention_dim": 64}, "`cross_attention_dim` of the config is not known; got 64"),
        ({**read("dit_plain").config, "qk_norm": True}, "`qk_norm` of the config is not known"),
        ({"out_channels": 5}, "`out_channels` of the config must be 4, or 8"),
        ({"hidden_size": 8, "depth": 2}, "The config must say input_size, patch_size, in_channels"),
        ({**read("dit_plain").config, "mlp_ratio": 2.5}, "`mlp_ratio` .* whole number; got 2.5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, said):
    with pytest.raises(ValueError, match=said):
        dit.make(config)


def test_positions_that_are_not_the_fixed_ones_and_unequal_copies_are_refused():
    copied = "must be equal to transformer_blocks.0.norm1.emb"
    for name, said in (("dit_plain", "pos_embed: must hold the"), ("dit_diffusers", copied)):
        with pytest.raises(naming.NamingError, match=said):
            naming.fill(dit.TABLE, read(name).weights(), loaded(name)[0], "float32")


def test_a_network_of_steps_says_so_and_is_given_times_by_on_steps():
    _, apply, _ = loaded("dit_plain")
    assert apply.time == "step"
    model = dit.model(apply)
    assert model.apply.time == "t"
    assert isinstance(model, denoisers.Model)
    with pytest.raises(ValueError, match=r"`apply` takes steps, not log-SNRs: give nn.on_steps"):
        nn.on_log_snr(apply, model.process.log_snr)
    with pytest.raises(ValueError, match="`apply` takes times, not steps"):
        nn.on_steps(model.apply, 1000)
    with pytest.raises(ValueError, match="`apply` takes log-SNRs, not steps"):
        nn.on_steps(nn.functional(nnx.eval_shape(lambda: nn.MLP(2, rngs=nnx.Rngs(0))))[1], 1000)
    steps = nn.on_steps(lambda params, x, n, cond=None, key=None: n, 1000)
    np.testing.assert_allclose(steps(None, None, jnp.asarray([0.001, 1.0])), [0, 999], atol=1e-9)


def test_times_of_another_kind_are_refused():
    def made(**options):
        return nnx.eval_shape(lambda: nn.DiT((4, 4, 1), rngs=nnx.Rngs(0), depth=1, **options))

    with pytest.raises(TypeError, match=r"`time` must be nn.LogSNR\(\) or nn.Steps\(\), made"):
        made(time="step")
    with pytest.raises(ValueError, match="`width` must be even; got 7"):
        nn.Steps(7)
    with pytest.raises(ValueError, match="`extra_channels`"):
        made(extra_channels=-1)
    params, apply = nn.functional(made(time=nn.Steps()))
    with pytest.raises(ValueError, match=r"takes steps in place of t: give nn.on_steps"):
        losses.denoising(denoisers.Model(apply, processes.ddpm()))
    with pytest.raises(ValueError, match=r"`step` must have shape \(\) or \(2,\)"):
        jax.eval_shape(apply, params, jnp.zeros((2, 4, 4, 1)), jnp.zeros(3))
