"""What diffusers' two U-Nets make of images and latents. See `common` for how to run it.

The source embeds steps in float32 whatever its dtype; here it does in float64, so that it can be
compared in all digits. How it rounds them is a golden of its own, `unet_rounded`.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models import embeddings
from peers.common import Golden, drawn, filled, golden, last, main, shapes_of
from unet_cases import PUBLISHED

CONDITIONAL = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [8, 16],
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "norm_num_groups": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SD1 = {**CONDITIONAL, "attention_head_dim": 2}
SD2 = {
    **CONDITIONAL,
    "attention_head_dim": [2, 4],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL = {
    **CONDITIONAL,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "attention_head_dim": [2, 4],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 10 + 6 * 6,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
INPAINTING = {**SD1, "in_channels": 9}
ONE_LEVEL = {
    "attention_head_dim": 2,
    "block_out_channels": [32],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}
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
SCALED = {**UNCONDITIONAL, "resnet_time_scale_shift": "scale_shift"}


def in_float64(t, width, flip_sin_to_cos=False, downscale_freq_shift=1.0, **_):
    """Embed steps as the source does, in float64."""
    half = width // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float64)
    angles = t[:, None].double() * torch.exp(exponents / (half - downscale_freq_shift))
    parts = [torch.sin(angles), torch.cos(angles)]
    return torch.cat(parts[::-1] if flip_sin_to_cos else parts, dim=-1)


@contextlib.contextmanager
def embedded_in_float64() -> Iterator[None]:
    """Let the source embed steps in float64."""
    plain, embeddings.get_timestep_embedding = embeddings.get_timestep_embedding, in_float64
    try:
        yield
    finally:
        embeddings.get_timestep_embedding = plain


def channels_last(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: last(x) if x.ndim == 4 else x for name, x in given.items()}


def module(config: dict[str, Any], seed: int) -> torch.nn.Module:
    """Make the model of a config, with the weights of the seed."""
    kind = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    return filled(kind[config["_class_name"]](**given), seed)


def inputs_of(
    config: dict[str, Any], seed: int, larger: int, odd: bool = False
) -> dict[str, np.ndarray]:
    """Draw what a model of a config takes, in the source's layout; odd sizes are not halved."""
    channels = config.get("in_channels", 3 if config["_class_name"] == "UNet2DModel" else 4)
    size = (7, 5 + 2 * larger) if odd else (8 + 4 * larger, 4)
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


def unet(seed: int, larger: int, *, config: dict[str, Any], odd: bool = False) -> Golden:
    config = {**config, "layers_per_block": 1 + larger, "norm_num_groups": 4 << larger}
    model = module(config, seed)
    given = inputs_of(config, seed, larger, odd)
    with embedded_in_float64():
        found = {"y": output(model, given, torch.float64)}
    return golden(config, model, seed, channels_last(given), found)


def rounded(seed: int, larger: int) -> Golden:
    config = {**SD1, **ONE_LEVEL, "layers_per_block": 1 + larger}
    model = module(config, seed).float()
    given = inputs_of(config, seed, larger)
    found = {"y": output(model, given, torch.float32)}
    return golden(config, model, seed, channels_last(given), found)


def trajectory(seed: int, larger: int, *, config: dict[str, Any], prediction: str) -> Golden:
    """Sample ten steps of DDIM with guidance 5, as the pipelines of Stable Diffusion do."""
    config = {**config, **ONE_LEVEL, "layers_per_block": 1 + larger}
    model = module(config, seed)
    given = inputs_of(config, seed, larger)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=prediction,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(10)
    null = drawn("null", given["tokens"].shape, seed)
    tokens = torch.from_numpy(np.concatenate([null, given["tokens"]]))
    x = torch.from_numpy(given["x"])
    with embedded_in_float64():
        for step in scheduler.timesteps:
            without, towards = model(torch.cat([x, x]), step, tokens).sample.chunk(2)
            guided = without + 5.0 * (towards - without)
            x = scheduler.step(guided, step, x).prev_sample
    inputs = {"x": last(given["x"]), "tokens": given["tokens"], "null": null}
    found = {"steps": scheduler.timesteps, "latents": last(x)}
    return golden(config, model, seed, inputs, found)


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
    CASES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "ddpm": DDPM, "scaled": SCALED}
    main(
        {
            "unet_inpainting": partial(unet, config=INPAINTING, odd=True),
            **{f"unet_{name}": partial(unet, config=config) for name, config in CASES.items()},
            "unet_rounded": rounded,
            "unet_trajectory_sd1": partial(trajectory, config=SD1, prediction="epsilon"),
            "unet_trajectory_sd2": partial(trajectory, config=SD2, prediction="v_prediction"),
        },
        published,
    )
