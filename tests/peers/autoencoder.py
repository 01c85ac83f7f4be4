"""What diffusers' AutoencoderKL makes of images and latents. See `common` for how to run it."""

from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from peers.common import Golden, drawn, filled, golden, last, main, shapes_of

SHARED = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 2,
    "norm_num_groups": 4,
}
SD = {**SHARED, "latent_channels": 4, "scaling_factor": 0.18215}
FLUX = {
    **SHARED,
    "layers_per_block": 1,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
PLAIN = {**SD, "layers_per_block": 1, "mid_block_add_attention": False}

LARGE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
FIRST_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Of attention, by the present ones: the published files of Stable Diffusion have them."""


def autoencoder(seed: int, larger: int, *, config: dict[str, Any]) -> Golden:
    config = {**config, "norm_num_groups": 4 << larger}
    model = filled(AutoencoderKL(**config), seed)
    height, width = 8 + 4 * larger, 6
    x = torch.from_numpy(drawn("x", (2, 3, height, width), seed, 1.0))
    z = torch.from_numpy(drawn("z", (2, config["latent_channels"], height // 2, 3), seed))
    posterior = model.encode(x).latent_dist
    scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
    outputs = {
        "mean": last((posterior.mean - shift) * scale),
        "std": last(posterior.std * scale),
        "decoded": last(model.decode(z / scale + shift).sample),
    }
    return golden(config, model, seed, {"x": last(x), "z": last(z)}, outputs)


def published() -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the weights of the autoencoders of SD 1 and 2, and of FLUX."""
    sd = shapes_of(lambda: AutoencoderKL(**LARGE))
    bare = {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16}
    flux = shapes_of(lambda: AutoencoderKL(**LARGE, **bare))
    for name, first in FIRST_NAMES.items():
        sd = {key.replace(name, first): shape for key, shape in sd.items()}
    return {"autoencoder_sd": sd, "autoencoder_flux": flux}


if __name__ == "__main__":
    configs = {"autoencoder_sd": SD, "autoencoder_flux": FLUX, "autoencoder_plain": PLAIN}
    main({name: partial(autoencoder, config=each) for name, each in configs.items()}, published)
