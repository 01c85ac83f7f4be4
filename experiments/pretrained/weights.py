"""Weights that a command line names: opened, judged, and the sizes of what they make.

Pixels are levels k of 0..255 at x = k / 127.5 - 1, as published networks of images take them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.command import Refusal, refusing
from jaxdiff import pretrained
from jaxdiff.devices import shared_place
from jaxdiff.pretrained import Autoencoder, Denoising, WeightsError
from jaxdiff.typing import Array

_CHANNELS = {"UNet2DModel": 3, "UNet2DConditionModel": 4}
"""Of U-Nets whose config does not say how many."""
_PIXELS = (1, 3)
"""The channels of images; what has others is a latent."""


def open_weights(
    path: str,
    *,
    autoencoder: str | None = None,
    decodes: bool = True,
    dtype: str = "float32",
    devices: Sequence[jax.Device] | None = None,
) -> Denoising:
    """Load a denoising network and what it needs to make images, whole on each device.

    Args:
        path: a pipeline's folder, a component's, a file or a hub id: `--weights`.
        autoencoder: a folder or a hub id, in place of what the pipeline has: `--autoencoder`.
        decodes: whether latents need an autoencoder.
        dtype: of parameters and computation.
        devices: by default all of this process.

    Raises:
        Refusal: naming the option, if they cannot be loaded or make no images by themselves.
    """
    where = shared_place(jax.local_devices() if devices is None else devices)

    def load(option: str, given: str) -> Any:
        errors = (FileNotFoundError, WeightsError, ValueError, ImportError)
        with refusing(*errors, say=f"{option}: "):
            return pretrained.load(
                given, dtype=dtype, place=lambda like: jax.tree.map(lambda _: where, like)
            )

    loaded = load("--weights", path)
    if not isinstance(loaded, Denoising):
        kind = type(loaded).__name__
        raise Refusal(
            f"--weights must be a pipeline or a denoising network; {path} holds the kind {kind}. "
            "Give the folder above it, which has a model_index.json."
        )
    if autoencoder is not None:
        taken = load("--autoencoder", autoencoder)
        if not isinstance(taken, Autoencoder):
            raise Refusal(
                f"--autoencoder must be one; {autoencoder} holds the kind {type(taken).__name__}. "
                "Give the folder vae of a pipeline."
            )
        loaded = loaded._replace(autoencoder=taken)
    _check(loaded, path, decodes)
    return loaded


def _check(loaded: Denoising, path: str, decodes: bool) -> None:
    config, kind = loaded.config, loaded.config.get("_class_name")
    if kind == "UNet2DConditionModel" and loaded.text is None:
        raise Refusal(
            f"--weights: {path} has no text encoder, without which its network makes nothing. Give "
            "the folder of the pipeline."
        )
    added = config.get("addition_embed_type") is not None
    if added and (loaded.text is None or not loaded.text.pools):
        raise Refusal(
            f"--weights: the network of {path} takes a pooled text and sizes, as that of SDXL, for "
            "which two text encoders must lie beside it. Give the folder of the pipeline."
        )
    if added and loaded.autoencoder is None:
        raise Refusal(
            f"--weights: the network of {path} takes sizes in pixels, as that of SDXL, which its "
            "autoencoder tells, and it has none beside it. Give the folder of the pipeline."
        )
    channels = num_channels(loaded)
    if loaded.autoencoder is None:
        if decodes and channels not in _PIXELS:
            raise Refusal(
                f"--autoencoder must be given: {path} makes latents of {channels} channels and has "
                "none beside it. Give the folder of the autoencoder that they are of."
            )
        return
    of_autoencoder = loaded.autoencoder.config.get("latent_channels", 4)
    if of_autoencoder != channels:
        raise Refusal(
            f"--autoencoder must have the {channels} channels of the latents of {path}; "
            f"got {of_autoencoder}."
        )


def num_channels(loaded: Denoising) -> int:
    """Return the channels of what a network denoises: of pixels, or of latents."""
    config, kind = loaded.config, loaded.config.get("_class_name", "")
    if kind in _CHANNELS:
        return config.get("out_channels", _CHANNELS[kind])
    return config.get("in_channels", 4)  # of a transformer, which may predict a variance too


def num_beside(loaded: Denoising) -> int:
    """Return the channels of what stands beside x: for inpainting, a mask and a masked image."""
    kind = loaded.config.get("_class_name", "")
    seen = loaded.config.get("in_channels", _CHANNELS.get(kind, 0))
    return seen - num_channels(loaded) if kind in _CHANNELS else 0


def check_alone(loaded: Denoising) -> None:
    """Refuse weights of inpainting, where a model of images by themselves is wanted."""
    if num_beside(loaded):
        raise Refusal("--weights are of inpainting, and no model of images by themselves.")


def factor(loaded: Denoising) -> int:
    """Return how many pixels of an image a latent is wide."""
    if loaded.autoencoder is None:
        return 1
    return 2 ** (len(loaded.autoencoder.config.get("block_out_channels", (64,))) - 1)


def image_size(loaded: Denoising, height: int | None, width: int | None) -> tuple[int, int]:
    """Return (H, W) of the images, by default those that the config says.

    Raises:
        Refusal: naming the option, if the network or the autoencoder takes no such size.
    """
    by, said = factor(loaded), _said_size(loaded)
    asked = {"--height": height, "--width": width}
    if said is None and None in asked.values():
        raise Refusal(
            "--height and --width must be given: the config of the network says no sample_size."
        )
    found = [
        given if given is not None else side * by
        for given, side in zip(asked.values(), said or (0, 0), strict=True)
    ]
    for option, side in zip(asked, found, strict=True):
        if side < 1 or side % by:
            raise Refusal(f"{option} must be a positive multiple of {by}; got {side}.")
    if loaded.num_classes is not None and said is not None and found != [s * by for s in said]:
        raise Refusal(
            f"--height and --width must be {said[0] * by} and {said[1] * by} for a transformer, "
            f"whose positions are of one size; got {found[0]} and {found[1]}."
        )
    return found[0], found[1]


def _said_size(loaded: Denoising) -> tuple[int, int] | None:
    transformer = loaded.config.get("_class_name") not in _CHANNELS
    default = loaded.config.get("input_size", 32 if transformer else None)
    size = loaded.config.get("sample_size", default)
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    return None if size is None else (int(size), int(size))


def from_levels(levels: np.ndarray) -> np.ndarray:
    """Return what networks take of pixels, float32 in [-1, 1]."""
    return levels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def to_levels(x: Array) -> Array:
    """Return the nearest pixels, uint8."""
    return jnp.clip(jnp.round((x.astype(jnp.float32) + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)
