"""One call loads a component, a pipeline, a file or a hub id, and computes what its source does."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import loading_cases as cases
import numpy as np
import pytest
from peers import common
from pretrained_cases import TOLERANCE, error
from safetensors.numpy import load_file, save_file

from jaxdiff import pretrained
from jaxdiff.devices import placement
from jaxdiff.pretrained import WeightsError, dit, hub

T = 1000
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def steps_as_times(golden):
    return (np.asarray(golden.arrays["t"], float) + 1) / T


def test_a_pipeline_computes_what_its_parts_do(folder):
    loaded = pretrained.load(folder, dtype="float64")
    unet, vae, text = (common.read(n) for n in ("unet_sd1", "autoencoder_sd", "clip_sd1"))
    assert isinstance(loaded, pretrained.Denoising)
    assert (loaded.model.prediction, loaded.model.process.num_steps) == ("eps", T)
    assert (loaded.num_classes, loaded.clip, loaded.shift) == (None, None, 1.0)
    assert loaded.config["_class_name"] == "UNet2DConditionModel"
    x, tokens = unet.arrays["x"], unet.arrays["tokens"]
    output = jax.jit(loaded.model.apply)(loaded.params, x, steps_as_times(unet), tokens)
    assert error(output, unet.arrays["y"]) < 1e-9  # t T - 1 is the step to 1e-13
    encoder = loaded.autoencoder
    mean, std = jax.jit(encoder.encode)(encoder.params, vae.arrays["x"])
    assert error(mean, vae.arrays["mean"]) < TOLERANCE["float64"]
    assert error(std, vae.arrays["std"]) < TOLERANCE["float64"]
    decoded = jax.jit(encoder.decode)(encoder.params, vae.arrays["z"])
    assert error(decoded, vae.arrays["decoded"]) < TOLERANCE["float64"]
    hidden = jax.jit(loaded.text.encode)(loaded.text.params, text.arrays["tokens"])
    assert error(hidden, text.arrays["hidden"]) < TOLERANCE["float64"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_component_has_the_dtype_asked_for(folder, dtype):
    loaded = pretrained.load(folder / "text_encoder", dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(dtype)}
    golden = common.read("clip_sd1")
    hidden = jax.jit(loaded.encode)(loaded.params, golden.arrays["tokens"])
    assert error(hidden, golden.arrays["hidden"]) < {"bfloat16": 0.1, "float32": 1e-5}[dtype]
    prompts, tokens = common.read("tokenizer").config["prompts"], common.read("tokenizer").arrays
    assert loaded.tokenize(prompts).shape == (len(prompts), 9)  # the encoder's length
    np.testing.assert_array_equal(loaded.tokenize(prompts[:1])[0, :5], tokens["sd1"][0, :5])


def test_an_old_pipeline_of_one_folder_is_loaded(tmp_path):
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    cases.write_json(tmp_path / "model_index.json", index)
    cases.write_json(tmp_path / "scheduler_config.json", {"_class_name": "DDPMScheduler"})
    golden = cases.component(tmp_path, "unet_ddpm", "UNet2DModel")
    loaded = pretrained.load(str(tmp_path), dtype="float64")
    assert loaded.clip == 1.0
    output = jax.jit(loaded.model.apply)(loaded.params, golden.arrays["x"], steps_as_times(golden))
    assert error(output, golden.arrays["y"]) < 1e-9


def test_a_network_that_matches_a_flow_is_given_the_steps_of_a_flow(copy):
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    cases.write_json(copy / "scheduler/scheduler_config.json", flow)
    golden = cases.component(copy / "unet", "unet_ddpm", "UNet2DModel")
    loaded = pretrained.load(copy / "unet", dtype="float64")
    assert loaded.autoencoder is loaded.text is None
    assert (loaded.model.prediction, loaded.shift) == ("velocity", 3.0)
    t = np.asarray(golden.arrays["t"], float) / T
    output = jax.jit(loaded.model.apply)(loaded.params, golden.arrays["x"], t)
    assert error(output, golden.arrays["y"]) < 1e-9


@pytest.mark.parametrize(("name", "kind"), [("dit_original", "DiT"), ("sit_sigma", "SiT")])
def test_a_file_of_dit_or_sit_tells_its_sizes(tmp_path, monkeypatch, name, kind):
    golden = common.read(name)
    monkeypatch.setitem(dit.SIZES, (2, 16), 2)
    weights = cases.original(golden)
    path = tmp_path / f"{kind}-T-2.safetensors"
    save_file({f"ema.{k}": v for k, v in weights.items()} | {"model.x": np.zeros(1)}, path)
    loaded = pretrained.load(path, dtype="float64")
    assert loaded.num_classes == 5
    x, y = golden.arrays["x"], golden.arrays["y"]
    if kind == "DiT":
        output = jax.jit(loaded.model.apply)(loaded.params, x, steps_as_times(golden), y)
        assert error(output, golden.arrays["output"]) < 1e-9
    else:
        t = 1.0 - golden.arrays["u"]
        output = jax.jit(loaded.model.apply)(loaded.params, x, t, y)
        assert error(output, -golden.arrays["velocity"]) < TOLERANCE["float64"]
    nameless = tmp_path / "x.safetensors"
    save_file(weights, nameless)
    with pytest.raises(WeightsError, match=r"x\.safetensors.*one of DiT and SiT in it"):
        pretrained.load(nameless)


def test_a_network_that_sees_is_loaded_from_its_folder_or_its_file(tmp_path):
    golden = cases.component(tmp_path / "a", "dinov2_plain", "Dinov2Model", "model")
    loaded = pretrained.load(tmp_path / "a", dtype="float64")
    assert isinstance(loaded, pretrained.Vision)
    output = jax.jit(loaded.apply)(loaded.params, golden.arrays["fewer"])
    assert error(output, golden.arrays["fewer_output"]) < TOLERANCE["float64"]
    save_file(common.read("dinov2_original").weights(), tmp_path / "dinov2.safetensors")
    assert isinstance(pretrained.load(tmp_path / "dinov2.safetensors"), pretrained.Vision)


def test_parameters_lie_where_they_are_placed(folder):
    mesh = placement.make_mesh(1, 1, devices=jax.devices()[:1])
    place = functools.partial(placement.shardings, mesh=mesh, fsdp=True)
    params = pretrained.load(folder / "vae", place=place).params
    wanted = place(params)
    assert jax.tree.all(jax.tree.map(lambda x, where: x.sharding == where, params, wanted))


@pytest.mark.slow
def test_parameters_split_over_eight_devices_compute_what_they_do_on_one(folder):
    """As arguments of what is compiled, of which each device is given its share alone."""
    flags = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
    run = subprocess.run(
        [sys.executable, HERE / "placed_run.py", folder / "unet"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": HERE.parent},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    said = json.loads(run.stdout)
    assert said["devices"] == 8
    assert said["held"] == said["held_after"] < 0.2  # an eighth, but for what 8 does not divide
    assert said["distance"] < 1e-5
    assert said["argument_bytes"] == pytest.approx(said["given_bytes"], rel=0.01)
    alone, shared = said["learnt"]
    assert alone != 0.0
    assert shared == pytest.approx(alone, rel=1e-5)


def test_an_encoder_without_tokenizer_says_so_when_it_is_asked(tmp_path):
    cases.component(tmp_path, "clip_sd1", "CLIPTextModel", "model")
    with pytest.raises(WeightsError, match=r"no tokenizer: put tokenizer.json"):
        pretrained.load(tmp_path).tokenize(["a"])


def refused(path, match, **options):
    with pytest.raises(WeightsError, match=match) as caught:
        pretrained.load(path, **options)
    return str(caught.value)


def test_what_is_damaged_or_of_another_network_is_said_with_its_file(copy):
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert str(weights) in refused(copy, "no whole safetensors file")
    save_file(common.read("unet_ddpm").weights(), weights)
    said = refused(copy, "not those of this network")
    assert str(copy / "unet") in said
    assert "are missing" in said
    arrays = common.read("unet_sd1").weights()
    save_file({key: value.astype(np.int8) for key, value in arrays.items()}, weights)
    assert str(copy / "unet") in refused(copy, r"(?s)\(int8\).*Quantised weights")
    weights.unlink()
    refused(copy, "unet holds no weights: diffusion_pytorch_model.safetensors")


def test_tensors_of_another_network_are_said_to_be_so_in_a_last_sentence(copy):
    weights, vae = (copy / each / "diffusion_pytorch_model.safetensors" for each in ("unet", "vae"))
    own = load_file(weights)

    def last_line():
        said = refused(copy / "unet", "The weights are not those of this network").splitlines()
        assert len(said) < 25
        return said[-1]

    shutil.copy(vae, weights)
    assert "as those of AutoencoderKL, a pipeline's folder vae: is this the folder" in last_line()
    save_file({key: np.repeat(value, 2, axis=0) for key, value in own.items()}, weights)
    assert "says UNet2DConditionModel, and the names are its own: is it the config" in last_line()
    save_file({f"lora.{key}": value for key, value in own.items()}, weights)
    assert "of no network that is known here: put the weights of UNet2DCond" in last_line()
    save_file(own, weights)
    shutil.copy(copy / "vae/config.json", copy / "unet/config.json")
    assert "says AutoencoderKL, and the tensors are named as those of UNet2D" in last_line()
    shutil.copy(vae, weights)
    refused(copy, r"is of 'AutoencoderKL', and not that of a unet. Is .*unet the folder of another")


def test_numbers_that_are_not_a_networks_are_told_from_its_names(tmp_path, monkeypatch):
    golden = common.read("sit_sigma")
    monkeypatch.setitem(dit.SIZES, (2, 16), 2)
    weights = cases.original(golden)
    weights["pos_embed"] = weights["pos_embed"] + 1
    path = tmp_path / "SiT-T-2.safetensors"
    save_file(weights, path)
    refused(path, r"(?s)hold the constants.*\nNames and shapes fit, the numbers do not: load the")
    del weights["x_embedder.proj.bias"]
    save_file(weights, path)
    refused(path, r"(?s)1 parameter is missing.*\nGive the file of all its weights, as it was pub")


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("unet/config.json", {"_class_name": "FluxTransformer2DModel"}, "is of 'FluxTransformer2D"),
        ("unet/config.json", {"act_fn": "mish"}, r"unet: `act_fn` of the config.*'mish'"),
        ("vae/config.json", {"latents_mean": [1.0]}, r"vae: `latents_mean`"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "config.json: `thresholding`"),
        ("model_index.json", {"text_encoder_2": ["transformers", "X"]}, "no folder of that name"),
        ("model_index.json", {"controlnet": ["diffusers", "X"]}, "controlnet.*one by one"),
        ("model_index.json", {"unet": [None, None]}, "one unet or transformer"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_with_its_file(copy, file, change, match):
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(copy, match)


def test_a_network_needs_its_scheduler(copy):
    shutil.rmtree(copy / "scheduler")
    refused(copy / "unet", "no scheduler beside it.*scheduler_config.json")


def test_what_is_nothing_to_load_is_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="hub id; got '/no.*There is no such"):
        pretrained.load("/no/such/thing")
    refused(tmp_path, "no config.json and no model_index.json")
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(3)}, path)
    refused(path, r"x\.safetensors has 1 tensors, a \.\.\.: not the weights of")
    refused(folder / "unet/config.json", "no `weight_map`.*Of a config give the folder")
    with pytest.raises(TypeError, match="`dtype` must be a floating-point one"):
        pretrained.load(folder, dtype="int8")


def test_of_a_repository_only_what_is_read_is_brought():
    names = [
        "README.md",
        "model_index.json",
        "v1-5-pruned.safetensors",
        "scheduler/scheduler_config.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.bin",
    ]
    kept = [*range(1, 2), 3, 6, 7, 8, 10, 12, 13, 14, 15]
    assert hub.needed(names) == sorted(names[i] for i in kept)


def test_without_a_network_a_hub_id_says_at_once_what_to_bring(tmp_path, monkeypatch):
    from huggingface_hub import constants, snapshot_download  # noqa: F401 before time is taken

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    start = time.monotonic()
    said = refused("someone/stable-diffusion", "127.0.0.1:9 cannot be reached")
    assert time.monotonic() - start < 1.0
    assert 'hf download someone/stable-diffusion --include "*.json" "*.txt"' in said


def test_a_name_that_is_never_found_is_waited_for_no_longer(monkeypatch):
    def look_up(*_):
        time.sleep(2)
        raise OSError

    monkeypatch.setattr(hub.socket, "create_connection", look_up)
    start = time.monotonic()
    assert not hub._reachable("https://nowhere.invalid")
    assert time.monotonic() - start < 1.0


def test_shards_are_loaded_as_one_file(copy):
    weights = load_file(copy / "vae/diffusion_pytorch_model.safetensors")
    whole = pretrained.load(copy / "vae").params
    (copy / "vae/diffusion_pytorch_model.safetensors").unlink()
    where = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(weights)}
    for name in set(where.values()):
        part = {key: value for key, value in weights.items() if where[key] == name}
        save_file(part, copy / "vae" / name)
    index = copy / "vae/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(copy / "vae").params, whole)
