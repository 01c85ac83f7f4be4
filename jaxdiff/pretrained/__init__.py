"""Weights of the field: loaded in one line, without their framework and without running code.

    pipeline = pretrained.load("stable-diffusion-v1-5")
    denoise = pipeline.model.denoiser(pipeline.params, cond)

:func:`load` takes a component's folder, a pipeline's, a single file or a hub id. What it gives is
parameters and pure functions of them; parameters are arguments of whatever is compiled, never
constants in it. It needs the extras ``[train]`` and ``[pretrained]``.
"""

from jaxdiff.pretrained.errors import WeightsError
from jaxdiff.pretrained.loaded import Autoencoder, Denoising, TextEncoder, Vision
from jaxdiff.pretrained.loading import load
from jaxdiff.pretrained.naming import NamingError

__all__ = [
    "Autoencoder",
    "Denoising",
    "NamingError",
    "TextEncoder",
    "Vision",
    "WeightsError",
    "load",
]
