r"""The diffusion transformer of Peebles and Xie 2023 (arXiv:2212.09748), class-conditional.

It comes under two sets of names. Their own repository's files have `blocks.0.attn.qkv`, in a state
dict as it is or under "ema", with the positions, which are fixed. Those of diffusers
(`DiTTransformer2DModel`, once `Transformer2DModel`) have `transformer_blocks.0.attn1.to_q`, and a
copy of the embedders of time and label in every block. They are not the same function: diffusers
embeds time by frequencies 10000^(-k / 127), not 10000^(-k / 128), and adds 1e-5, not 1e-6, to the
variance before the perceptrons. Each is computed here as its source computes it.

The output has 2 C channels where a variance was learned; those of the variance are left out.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff import nn, processes
from jaxdiff.denoisers import Model
from jaxdiff.nn.dit import sincos_positions
from jaxdiff.pretrained import configs
from jaxdiff.pretrained.keys import counted
from jaxdiff.pretrained.naming import Rule, Table
from jaxdiff.pretrained.rules import layer
from jaxdiff.typing import Apply

__all__ = ["TABLE", "config_of", "make", "model"]

SIZES = {(12, 384): 6, (12, 768): 12, (24, 1024): 16, (28, 1152): 16}
"""The number of heads of the published sizes S, B, L and XL, by depth and width."""


def make(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> nn.DiT:
    """Make the network of a config.

    Args:
        config: a `config.json` of diffusers, or the arguments of the class in the repository of
            the paper: input_size, patch_size, in_channels, hidden_size, depth, num_heads,
            mlp_ratio, num_classes, learn_sigma.
        dtype: of the computation and the parameters.

    Returns:
        A network of (x, step, labels), the null label being the number of classes.

    Raises:
        ValueError: if the config asks for something else, or does not say all of it.
    """
    read = _read_original if "hidden_size" in config else _read_diffusers
    options = read(config)
    return nn.DiT(**options, dtype=dtype, param_dtype=dtype, rngs=counted())


def _read_original(config: Mapping[str, Any]) -> dict[str, Any]:
    needed = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
    others = ("mlp_ratio", "num_classes", "learn_sigma", "class_dropout_prob")
    configs.judged("diffusion transformer", config, {}, (*needed, *others))
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"The config must say {', '.join(missing)}.")
    size, channels = config["input_size"], config["in_channels"]
    return {
        "shape": (size, size, channels),
        "patch_size": config["patch_size"],
        "width": config["hidden_size"],
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "mlp_ratio": _whole("mlp_ratio", config.get("mlp_ratio", 4)),
        "num_classes": config.get("num_classes", 1000),
        "extra_channels": channels if config.get("learn_sigma", True) else 0,
        "time": nn.Steps(),
    }


_ONLY: dict[str, tuple[Any, ...]] = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "attention_type": ("default",),
}
"""What options of diffusers' class may be where it is not anything."""
_READ = (
    *("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers"),
    *("sample_size", "patch_size", "num_embeds_ada_norm", "norm_eps"),
    *("dropout", "norm_num_groups", "upcast_attention", "use_linear_projection"),
)
"""Those that are read, or make no difference."""


def _read_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    get = configs.judged("diffusion transformer", config, _ONLY, _READ).get
    heads, channels = get("num_attention_heads", 16), get("in_channels", 4)
    size, outputs = get("sample_size", 32), get("out_channels")
    extra = 0 if outputs is None else outputs - channels
    if extra not in (0, channels):
        raise ValueError(
            f"`out_channels` of the config must be {channels}, or {2 * channels} with a learned "
            f"variance; got {outputs}."
        )
    return {
        "shape": (size, size, channels),
        "patch_size": get("patch_size", 2),
        "width": heads * get("attention_head_dim", 72),
        "depth": get("num_layers", 28),
        "num_heads": heads,
        "num_classes": get("num_embeds_ada_norm", 1000),
        "extra_channels": extra,
        "mlp_epsilon": get("norm_eps", 1e-5),
        "time": nn.Steps(shift=1.0),
    }


def _whole(name: str, value: float) -> int:
    if int(value) != value:
        raise ValueError(f"`{name}` of the config must be a whole number; got {value}.")
    return int(value)


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Find the config of a file under the names of the paper's repository.

    Args:
        shapes: of the tensors, by name.

    Returns:
        What :func:`make` takes. The number of heads is that of the published sizes.

    Raises:
        ValueError: if a tensor that tells a size is missing, or the sizes are none of the published
            ones.
    """
    try:
        width, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        _, num_tokens, _ = shapes["pos_embed"]
        rows, _ = shapes["y_embedder.embedding_table.weight"]
        outputs, _ = shapes["final_layer.linear.weight"]
        hidden, _ = shapes["blocks.0.mlp.fc1.weight"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            "The file must hold the weights of DiT or SiT under the names of their repositories; "
            f"its sizes cannot be told from it: {error}."
        ) from error
    depth = configs.num_blocks(shapes)
    if (depth, width) not in SIZES:
        raise ValueError(
            f"The file has {depth} blocks of width {width}, which is none of the published sizes "
            "S, B, L and XL: how many heads it has cannot be told from it. Put it into a folder "
            "with a config.json that says num_heads and the other arguments of its class."
        )
    return {
        "input_size": math.isqrt(num_tokens) * patch_size,
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth,
        "num_heads": SIZES[depth, width],
        "mlp_ratio": hidden / width,
        "num_classes": rows - 1,
        "learn_sigma": outputs == 2 * channels * patch_size**2,
    }


def model(apply: Apply) -> Model:
    """Return the model that the published weights are of, of the network's pure function.

    Args:
        apply: as :func:`jaxdiff.nn.functional` makes it of :func:`make`.

    Source: Peebles and Xie 2023 (arXiv:2212.09748), section 4: 1,000 steps, betas linear from 1e-4
    to 2e-2, noise predicted.
    """
    process = processes.ddpm()
    return Model(nn.on_steps(apply, process.num_steps), process, "eps")


def _fixed_positions(shape: tuple[int, ...]) -> np.ndarray:
    side = math.isqrt(shape[1]) if len(shape) == 3 else 0
    if not side or shape != (1, side**2, shape[2]) or shape[2] % 4:
        raise ValueError("must be (1, N, width), N a square and width a multiple of 4")
    return sincos_positions(side, side, shape[2])[np.newaxis]


_dense = functools.partial(layer, layout="linear")
ORIGINAL: Table = (
    Rule(r"pos_embed", None, constant=_fixed_positions),
    Rule(r"x_embedder\.proj\.weight", "input.kernel", "conv_as_patches"),
    Rule(r"x_embedder\.proj\.bias", "input.bias"),
    *_dense(r"t_embedder\.mlp\.0", "conditioning.time_in"),
    *_dense(r"t_embedder\.mlp\.2", "conditioning.time_out"),
    Rule(r"y_embedder\.embedding_table\.weight", "conditioning.labels"),
    *_dense(r"blocks\.(\d+)\.attn\.qkv", "block_{0:02d}.qkv"),
    *_dense(r"blocks\.(\d+)\.attn\.proj", "block_{0:02d}.projection"),
    *_dense(r"blocks\.(\d+)\.mlp\.fc1", "block_{0:02d}.inner"),
    *_dense(r"blocks\.(\d+)\.mlp\.fc2", "block_{0:02d}.outer"),
    *_dense(r"blocks\.(\d+)\.adaLN_modulation\.1", "block_{0:02d}.modulation"),
    *_dense(r"final_layer\.adaLN_modulation\.1", "final_modulation"),
    *_dense(r"final_layer\.linear", "output"),
)
"""The names of the repositories of DiT and SiT."""

_EMBEDDERS = r"transformer_blocks\.0\.norm1\.emb"
DIFFUSERS: Table = (
    Rule(r"pos_embed\.pos_embed", None, constant=_fixed_positions),
    Rule(r"pos_embed\.proj\.weight", "input.kernel", "conv_as_patches"),
    Rule(r"pos_embed\.proj\.bias", "input.bias"),
    *_dense(rf"{_EMBEDDERS}\.timestep_embedder\.linear_1", "conditioning.time_in"),
    *_dense(rf"{_EMBEDDERS}\.timestep_embedder\.linear_2", "conditioning.time_out"),
    Rule(rf"{_EMBEDDERS}\.class_embedder\.embedding_table\.weight", "conditioning.labels"),
    Rule(
        r"transformer_blocks\.\d+\.norm1\.emb\.(.+)",
        None,
        same_as="transformer_blocks.0.norm1.emb.{0}",
    ),
    *_dense(r"transformer_blocks\.(\d+)\.attn1\.to_q", "block_{0:02d}.qkv", part=(0, 3)),
    *_dense(r"transformer_blocks\.(\d+)\.attn1\.to_k", "block_{0:02d}.qkv", part=(1, 3)),
    *_dense(r"transformer_blocks\.(\d+)\.attn1\.to_v", "block_{0:02d}.qkv", part=(2, 3)),
    *_dense(r"transformer_blocks\.(\d+)\.attn1\.to_out\.0", "block_{0:02d}.projection"),
    *_dense(r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", "block_{0:02d}.inner"),
    *_dense(r"transformer_blocks\.(\d+)\.ff\.net\.2", "block_{0:02d}.outer"),
    *_dense(r"transformer_blocks\.(\d+)\.norm1\.linear", "block_{0:02d}.modulation"),
    *_dense(r"proj_out_1", "final_modulation"),
    *_dense(r"proj_out_2", "output"),
)
"""The names of diffusers."""

TABLE: Table = (*ORIGINAL, *DIFFUSERS)
