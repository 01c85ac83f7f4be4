"""Folders as diffusers and transformers lay them out, of the goldens' tiny networks."""

import json

import numpy as np
from peers import common
from safetensors.numpy import save_file

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def component(folder, name, kind, stem="diffusion_pytorch_model", **change):
    """Write the folder of one component, of the golden of a name; return the golden."""
    golden = common.read(name)
    key = "architectures" if stem == "model" else "_class_name"
    write_json(folder / "config.json", golden.config | {key: [kind] if stem == "model" else kind})
    save_file(golden.weights() | change, folder / f"{stem}.safetensors")
    return golden


def tokens(folder, name="sd1"):
    """Write the folder of a tokenizer."""
    config = common.read("tokenizer").config
    write_json(folder / "vocab.json", config["vocab"])
    write_json(folder / "tokenizer_config.json", config[name])
    (folder / "merges.txt").write_text("\n".join(config["merges"]), encoding="utf-8")
    return config["prompts"]


def pipeline(folder):
    """Write the folder of a pipeline that makes images of text."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": [None, None],
        "requires_safety_checker": True,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    tokens(folder / "tokenizer")
    component(folder / "unet", "unet_sd1", "UNet2DConditionModel")
    component(folder / "vae", "autoencoder_sd", "AutoencoderKL")
    component(folder / "text_encoder", "clip_sd1", "CLIPTextModel", "model")
    return folder


def original(golden):
    """The weights of a golden of DiT or SiT, with the positions that it had."""
    return golden.weights() | {"pos_embed": golden.arrays["pos_embed"].astype(np.float32)}
