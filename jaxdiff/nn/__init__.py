"""Flax NNX networks, used functionally: build a module, take it apart once, stay pure after.

    module = nn.DiT((8, 8, 1), num_classes=10, rngs=nnx.Rngs(0))
    params, apply = nn.functional(module)
    network = nn.on_log_snr(apply, process.log_snr)   # network(params, x_t, t, labels, key=key)

The networks embed their time argument as a log-SNR, :class:`StepUNet` as the number of a step; what
they are conditioned on is said by `conditioning`. Any callable of the same signature works in their
place: a Linen ``apply``, an Equinox module and a plain function are each shown working in the
tests.
"""

from jaxdiff.extras import needed_by

with needed_by("jaxdiff.nn"):
    from jaxdiff.nn.autoencoder import Autoencoder
    from jaxdiff.nn.conditioning import (
        Condition,
        Context,
        Embedding,
        Labels,
        Sequences,
        Vectors,
        null_cond,
    )
    from jaxdiff.nn.dit import DiT
    from jaxdiff.nn.functional import deferred, functional, on_log_snr, on_steps
    from jaxdiff.nn.mlp import MLP
    from jaxdiff.nn.patch_discriminator import PatchDiscriminator
    from jaxdiff.nn.space_to_depth import SpaceToDepthAutoencoder
    from jaxdiff.nn.step_unet import StepUNet
    from jaxdiff.nn.text_encoder import TextEncoder
    from jaxdiff.nn.texts import Texts
    from jaxdiff.nn.times import LogSNR, Steps, Time
    from jaxdiff.nn.unet import UNet
    from jaxdiff.nn.vision import VisionTransformer

__all__ = [
    "MLP",
    "Autoencoder",
    "Condition",
    "Context",
    "DiT",
    "Embedding",
    "Labels",
    "LogSNR",
    "PatchDiscriminator",
    "Sequences",
    "SpaceToDepthAutoencoder",
    "StepUNet",
    "Steps",
    "TextEncoder",
    "Texts",
    "Time",
    "UNet",
    "Vectors",
    "VisionTransformer",
    "deferred",
    "functional",
    "null_cond",
    "on_log_snr",
    "on_steps",
]
