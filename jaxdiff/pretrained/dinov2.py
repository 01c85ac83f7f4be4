r"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193), with registers and without.

It comes under the names of its repository, `blocks.0.attn.qkv`, and under those of transformers:
`encoder.layer.0.attention.attention.query` in the published files, `attention.q_proj` in those that
its later versions write.

The two differ where positions are interpolated, which is at every size of image but the one that
they are learned at (518 pixels). The repository reads them at a scale of (n + 0.1) / 37,
transformers at n / 37. Each is computed here as its source computes it. Networks with registers are
interpolated by both at n / 37, with antialiasing.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxdiff.nn.vision import VisionTransformer
from jaxdiff.pretrained import configs
from jaxdiff.pretrained.keys import counted
from jaxdiff.pretrained.naming import Rule, Table
from jaxdiff.pretrained.rules import layer, norm

__all__ = ["TABLE", "config_of", "make"]

ARCHITECTURES = ("Dinov2Model", "Dinov2WithRegistersModel")
"""The classes whose files these are."""

_OFFSET = "interpolate_offset"
"""The option of the repository that transformers does not have."""


def make(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> VisionTransformer:
    """Make the network of a config.

    Args:
        config: a `config.json` of transformers, or what :func:`config_of` returns.
        dtype: of the computation and the parameters.

    Returns:
        A network of images (B, H, W, 3), normalised by the mean and deviation of ImageNet.

    Raises:
        TypeError: as :class:`jaxdiff.nn.vision.VisionTransformer`.
        ValueError: if the config is of something else, and as above.
    """
    get = config.get
    architecture = configs.architecture(config, ARCHITECTURES, "backbone")
    for name, only in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if get(name, only) != only:
            raise ValueError(f"`{name}` of the config must be {only!r}; got {get(name)!r}.")
    registers = architecture == "Dinov2WithRegistersModel"
    image_size, patch_size = get("image_size", 224), get("patch_size", 16 if registers else 14)
    for name, size in (("image_size", image_size), ("patch_size", patch_size)):
        if not isinstance(size, int):
            raise ValueError(f"`{name}` of the config must be one number; got {size}.")
    width, gated = get("hidden_size", 768), get("use_swiglu_ffn", False)
    hidden = int(width * get("mlp_ratio", 4))
    return VisionTransformer(
        image_size,
        patch_size=patch_size,
        num_channels=get("num_channels", 3),
        width=width,
        depth=get("num_hidden_layers", 12),
        num_heads=get("num_attention_heads", 12),
        hidden=-(-int(hidden * 2 / 3) // 8) * 8 if gated else hidden,
        gated=gated,
        num_registers=get("num_register_tokens", 4) if registers else 0,
        offset=get(_OFFSET, 0.0),
        antialias=registers,
        epsilon=get("layer_norm_eps", 1e-6),
        dtype=dtype,
        param_dtype=dtype,
        rngs=counted(),
    )


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Find the config of a file under the names of the repository.

    Args:
        shapes: of the tensors, by name.

    Returns:
        What :func:`make` takes; heads are 64 wide, as in all that is published.

    Raises:
        ValueError: if a tensor that tells a size is missing.
    """
    try:
        width, channels, patch_size, _ = shapes["patch_embed.proj.weight"]
        _, num_tokens, _ = shapes["pos_embed"]
        _, num_registers, _ = shapes.get("register_tokens", (1, 0, width))
        gated = "blocks.0.mlp.w12.weight" in shapes
        hidden = 4 * width if gated else shapes["blocks.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            "The file must hold the weights of DINOv2 under the names of its repository; its sizes "
            f"cannot be told from it: {error}."
        ) from error
    return {
        "architectures": [ARCHITECTURES[bool(num_registers)]],
        "image_size": math.isqrt(num_tokens - 1) * patch_size,
        "patch_size": patch_size,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": configs.num_blocks(shapes),
        "num_attention_heads": max(width // 64, 1),
        "mlp_ratio": hidden / width,
        "use_swiglu_ffn": gated,
        "num_register_tokens": num_registers,
        _OFFSET: 0.0 if num_registers else 0.1,
    }


_dense = functools.partial(layer, layout="linear")
ORIGINAL: Table = (
    Rule(r"cls_token", "class_token", "flat"),
    Rule(r"mask_token", None),
    Rule(r"register_tokens", "registers", "unbatched"),
    Rule(r"pos_embed", "positions", "unbatched"),
    Rule(r"patch_embed\.proj\.weight", "input.kernel", "conv_as_patches"),
    Rule(r"patch_embed\.proj\.bias", "input.bias"),
    *norm(r"blocks\.(\d+)\.norm1", "block_{0:02d}.attention_norm"),
    *_dense(r"blocks\.(\d+)\.attn\.qkv", "block_{0:02d}.qkv"),
    *_dense(r"blocks\.(\d+)\.attn\.proj", "block_{0:02d}.projection"),
    Rule(r"blocks\.(\d+)\.ls1\.gamma", "block_{0:02d}.attention_scale"),
    *norm(r"blocks\.(\d+)\.norm2", "block_{0:02d}.mlp_norm"),
    *_dense(r"blocks\.(\d+)\.mlp\.(?:fc1|w12)", "block_{0:02d}.inner"),
    *_dense(r"blocks\.(\d+)\.mlp\.(?:fc2|w3)", "block_{0:02d}.outer"),
    Rule(r"blocks\.(\d+)\.ls2\.gamma", "block_{0:02d}.mlp_scale"),
    *norm(r"norm", "norm"),
)
"""The names of the repository."""

_LAYER = r"encoder\.layer\.(\d+)"
_ATTENTION = rf"{_LAYER}\.attention"
TRANSFORMERS: Table = (
    Rule(r"embeddings\.cls_token", "class_token", "flat"),
    Rule(r"embeddings\.mask_token", None),
    Rule(r"embeddings\.register_tokens", "registers", "unbatched"),
    Rule(r"embeddings\.position_embeddings", "positions", "unbatched"),
    Rule(r"embeddings\.patch_embeddings\.projection\.weight", "input.kernel", "conv_as_patches"),
    Rule(r"embeddings\.patch_embeddings\.projection\.bias", "input.bias"),
    *norm(rf"{_LAYER}\.norm1", "block_{0:02d}.attention_norm"),
    *_dense(rf"{_ATTENTION}\.(?:attention\.query|q_proj)", "block_{0:02d}.qkv", part=(0, 3)),
    *_dense(rf"{_ATTENTION}\.(?:attention\.key|k_proj)", "block_{0:02d}.qkv", part=(1, 3)),
    *_dense(rf"{_ATTENTION}\.(?:attention\.value|v_proj)", "block_{0:02d}.qkv", part=(2, 3)),
    *_dense(rf"{_ATTENTION}\.(?:output\.dense|o_proj)", "block_{0:02d}.projection"),
    Rule(rf"{_LAYER}\.layer_scale1\.lambda1", "block_{0:02d}.attention_scale"),
    *norm(rf"{_LAYER}\.norm2", "block_{0:02d}.mlp_norm"),
    *_dense(rf"{_LAYER}\.mlp\.(?:fc1|weights_in)", "block_{0:02d}.inner"),
    *_dense(rf"{_LAYER}\.mlp\.gate_proj", "block_{0:02d}.inner", part=(0, 2)),
    *_dense(rf"{_LAYER}\.mlp\.up_proj", "block_{0:02d}.inner", part=(1, 2)),
    *_dense(rf"{_LAYER}\.mlp\.(?:fc2|weights_out|down_proj)", "block_{0:02d}.outer"),
    Rule(rf"{_LAYER}\.layer_scale2\.lambda1", "block_{0:02d}.mlp_scale"),
    *norm(r"layernorm", "norm"),
)
"""The names of transformers."""

TABLE: Table = (*ORIGINAL, *TRANSFORMERS)
