"""What diffusers' two U-Nets make of images and latents. See `common` for how to run it.

The source embeds steps in float32 whatever its dtype; here it does in float64, so that it can be
compared in all digits. How it rounds them is a golden of its own, `unet_sd1_float32`.
"""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models import embeddings
from peers.common import Golden, drawn, filled, golden, last, main, shapes_of
from unet_cases import PUBLISHED

CONDITIONAL = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [8, 16],
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SD1 = {**CONDITIONAL, "attention_head_dim": 2}
SD2 = {
    **CONDITIONAL,
    "attention_head_dim": [2, 4],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL = {
    **CONDITIONAL,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "attention_head_dim": [2, 4],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 1,
    "projection_class_embeddings_input_dim": 10 + 6 * 6,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
INPAINTING = {**SD1, "in_channels": 9, "layers_per_block": 1}
UNCONDITIONAL = {
    "_class_name": "UNet2DModel",
    "attention_head_dim": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "norm_num_groups": 4,
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
DDPM = {
    **UNCONDITIONAL,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
SCALED = {**UNCONDITIONAL, "layers_per_block": 1, "resnet_time_scale_shift": "scale_shift"}


def in_float64(t, width, flip_sin_to_cos=False, downscale_freq_shift=1.0, **_):
    """Embed steps as the source does, in float64."""
    half = width // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float64)
    angles = t[:, None].double() * torch.exp(exponents / (half - downscale_freq_shift))
    parts = [torch.sin(angles), torch.cos(angles)]
    return torch.cat(parts[::-1] if flip_sin_to_cos else parts, dim=-1)


def module(config: dict[str, Any], seed: int) -> torch.nn.Module:
    """Make the model of a config, with the weights of the seed."""
    kind = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    return filled(kind[config["_class_name"]](**given), seed)


def inputs_of(config: dict[str, Any], seed: int, larger: int) -> dict[str, np.ndarray]:
    """Draw what a model of a config takes, in the source's layout."""
    channels = config.get("in_channels", 3 if config["_class_name"] == "UNet2DModel" else 4)
    size = (8 + 4 * larger, 4)
    given = {"x": drawn("x", (2, min(channels, 4), *size), seed), "t": np.array([17.0, 999.0])}
    if channels > 4:
        given["beside"] = drawn("beside", (2, channels - 4, *size), seed)
    if "cross_attention_dim" in config:
        shape = (2, 5 + larger, config["cross_attention_dim"])
        given["tokens"] = drawn("tokens", shape, seed)
    if "addition_embed_type" in config:
        given["pooled"] = drawn("pooled", (2, 10), seed)
        given["sizes"] = np.floor(512 * (drawn("sizes", (2, 6), seed, 1.0) + 1.0))
    return given


def output(model: torch.nn.Module, given: dict[str, np.ndarray], dtype: Any) -> np.ndarray:
    """Evaluate a model."""
    at = {name: torch.from_numpy(value).to(dtype) for name, value in given.items()}
    x = torch.cat([at["x"], at["beside"]], dim=1) if "beside" in at else at["x"]
    if "tokens" not in at:
        return last(model(x, at["t"]).sample)
    added = {"text_embeds": at["pooled"], "time_ids": at["sizes"]} if "pooled" in at else None
    return last(model(x, at["t"], at["tokens"], added_cond_kwargs=added).sample)


def unet(seed: int, larger: int, *, config: dict[str, Any], resized: bool = False) -> Golden:
    config = {**config, "norm_num_groups": 4 << larger}
    model = module(config, seed)
    given = inputs_of(config, seed, larger)
    if resized:  # H and W that cannot be halved
        given["x"] = drawn("x", (2, 4, 7, 5), seed)
    plain, embeddings.get_timestep_embedding = embeddings.get_timestep_embedding, in_float64
    try:
        found = {"y": output(model, given, torch.float64)}
    finally:
        embeddings.get_timestep_embedding = plain
    shown = {name: last(x) if x.ndim == 4 else x for name, x in given.items()}
    return golden(config, model, seed, shown, found)


def in_float32(seed: int, larger: int) -> Golden:
    model = module(SD1, seed).float()
    given = inputs_of(SD1, seed, larger)
    found = {"y": output(model, given, torch.float32)}
    shown = {name: last(x) if x.ndim == 4 else x for name, x in given.items()}
    return golden(SD1, model, seed, shown, found)


def published() -> dict[str, dict[str, tuple[int, ...]]]:
    kind = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}
    return {
        name: shapes_of(
            lambda config=config: kind[config["_class_name"]](
                **{key: value for key, value in config.items() if key != "_class_name"}
            )
        )
        for name, config in PUBLISHED.items()
    }


if __name__ == "__main__":
    CASES = {
        "sd1": SD1,
        "sd2": SD2,
        "sdxl": SDXL,
        "inpainting": INPAINTING,
        "ddpm": DDPM,
        "scaled": SCALED,
    }
    main(
        {
            **{f"unet_{name}": partial(unet, config=config) for name, config in CASES.items()},
            "unet_sd1_resized": partial(unet, config=SD1, resized=True),
            "unet_sd1_float32": in_float32,
        },
        published,
    )
