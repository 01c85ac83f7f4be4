"""Tiny pipelines with made-up weights, which fit together, in the layout of diffusers."""

import dataclasses

import loading_cases as cases
import numpy as np
from peers import common
from PIL import Image
from safetensors.numpy import save_file

VAE = ("vae", ["diffusers", "AutoencoderKL"])
SCHEDULER = ("scheduler", ["diffusers", "DDIMScheduler"])
TEXT = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


def index(folder, kind, parts):
    content = {"_class_name": kind, "_diffusers_version": "0.42.1", **dict(parts)}
    cases.write_json(folder / "model_index.json", content)
    cases.write_json(folder / "scheduler" / "scheduler_config.json", cases.SCHEDULER)


def text_encoder(folder, name="clip_sd1", **change):
    """The golden's text encoder, of the sizes that the goldens' U-Nets attend to."""
    golden = common.read(name)
    change |= {"vocab_size": len(common.read("tokenizer").config["vocab"])}
    sizes = {golden.config[key]: size for key, size in change.items()}
    shapes = {n: tuple(sizes.get(s, s) for s in shape) for n, shape in golden.shapes.items()}
    config = {"architectures": ["CLIPTextModel"], **golden.config, **change}
    cases.write_json(folder / "config.json", config)
    weights = {name: common.weight(name, shape, 0) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")


def network(folder, name, kind, **config):
    first = "transformer_blocks.0.norm1.emb."
    weights = common.read(name).weights()
    copies = {  # diffusers keeps one in each block
        key: weights[first + key.partition(".norm1.emb.")[2]]
        for key in weights
        if ".norm1.emb." in key
    }
    golden = cases.component(folder, name, kind, **copies)
    cases.write_json(folder / "config.json", {**golden.config, "_class_name": kind, **config})


def text_pipeline(folder, name="unet_sd1"):
    """One of Stable Diffusion's kind: images 8 x 8 of latents 4 x 4."""
    unet = ("unet", ["diffusers", "UNet2DConditionModel"])
    index(folder, "StableDiffusionPipeline", [SCHEDULER, VAE, unet, *TEXT.items()])
    cases.tokens(folder / "tokenizer")
    network(folder / "unet", name, "UNet2DConditionModel", sample_size=4)
    cases.component(folder / "vae", "autoencoder_sd", "AutoencoderKL")
    text_encoder(folder / "text_encoder", hidden_size=12)
    return folder


def two_text_pipeline(folder):
    """One of SDXL's kind: images 8 x 8 of latents 4 x 4, nothing in particular being zeros."""
    unet = ("unet", ["diffusers", "UNet2DConditionModel"])
    second = {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": True,
    }
    index(folder, "StableDiffusionXLPipeline", [SCHEDULER, VAE, unet, *(TEXT | second).items()])
    cases.tokens(folder / "tokenizer")
    cases.tokens(folder / "tokenizer_2", "sd2")
    network(folder / "unet", "unet_sdxl", "UNet2DConditionModel", sample_size=4)
    cases.component(folder / "vae", "autoencoder_sd", "AutoencoderKL")
    text_encoder(folder / "text_encoder", hidden_size=4)
    wide = {"hidden_size": 8, "projection_dim": 10, "eos_token_id": 2}
    text_encoder(folder / "text_encoder_2", "clip_projected", **wide)
    return folder


def class_pipeline(folder):
    """One of DiT's: images 16 x 16 of 5 classes."""
    transformer = ("transformer", ["diffusers", "DiTTransformer2DModel"])
    index(folder, "DiTPipeline", [SCHEDULER, VAE, transformer])
    network(folder / "transformer", "dit_diffusers", "DiTTransformer2DModel")
    cases.component(folder / "vae", "autoencoder_sd", "AutoencoderKL")
    return folder


def pixel_pipeline(folder):
    """One of DDPM's: images 8 x 8 of nothing in particular."""
    index(folder, "DDPMPipeline", [SCHEDULER, ("unet", ["diffusers", "UNet2DModel"])])
    network(folder / "unet", "unet_ddpm", "UNet2DModel", sample_size=8)
    config = {**cases.SCHEDULER, "_class_name": "DDPMScheduler", "clip_sample": True}
    cases.write_json(folder / "scheduler" / "scheduler_config.json", config)
    return folder


def flow_folder(folder):
    """A component alone: SiT on pixels 8 x 8, of 5 classes."""
    golden = common.read("sit_plain")
    cases.write_json(folder / "config.json", {**golden.config, "_class_name": "SiT"})
    save_file(cases.original(golden), folder / "diffusion_pytorch_model.safetensors")
    return folder


@dataclasses.dataclass
class Picture:
    """A picture of noise, and a mask whose right half is to be painted."""

    image: str
    mask: str
    levels: np.ndarray

    @classmethod
    def written(cls, folder, side=8):
        levels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        paint = np.zeros((side, side), np.uint8)
        paint[:, side // 2 + 1 :] = 255
        names = [str(folder / name) for name in ("image.png", "mask.png")]
        for name, array in zip(names, (levels, paint), strict=True):
            Image.fromarray(array).save(name)
        return cls(*names, levels)
