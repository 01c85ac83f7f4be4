"""The U-Nets of diffusers: those of DDPM, and those of Stable Diffusion.

`UNet2DModel` is unconditional here, `UNet2DConditionModel` that of the first two generations of
Stable Diffusion and of SDXL, with the channels of inpainting or without. Files of either have new
names of attention (`to_q`, `to_out.0`) or the first ones (`query`, `proj_attn`).

`attention_head_dim` is what it says in `UNet2DModel`, and the number of heads in
`UNet2DConditionModel`, where it was named wrongly once and stayed so. `upcast_attention` asks for
scores in float32, which they are.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxdiff.nn.step_unet import Level, Pooled, StepUNet
from jaxdiff.pretrained import configs, rules
from jaxdiff.pretrained.keys import counted
from jaxdiff.pretrained.naming import Table

__all__ = ["TABLE", "make"]

_SHARED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "mid_block_scale_factor": (1,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_type": ("positional",),
}
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "UNet2DModel": {
        **_SHARED,
        "add_attention": (True, False),
        "downsample_type": ("conv",),
        "mid_block_type": ("UNetMidBlock2D",),
        "num_train_timesteps": (None,),
        "upsample_type": ("conv",),
    },
    "UNet2DConditionModel": {
        **_SHARED,
        "addition_embed_type": (None, "text_time"),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "num_attention_heads": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1,),
        "resnet_skip_time_act": (False,),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
    },
}
"""What the options of a class may be where it is not anything; the first is what is not said."""
_READ_SHARED = (
    *("block_out_channels", "down_block_types", "up_block_types", "layers_per_block"),
    *("attention_head_dim", "downsample_padding", "flip_sin_to_cos", "freq_shift"),
    *("in_channels", "out_channels", "norm_eps", "norm_num_groups", "time_embedding_dim"),
    *("sample_size", "dropout"),
)
_READ: dict[str, tuple[str, ...]] = {
    "UNet2DModel": (*_READ_SHARED, "attn_norm_num_groups"),
    "UNet2DConditionModel": (
        *_READ_SHARED,
        *("cross_attention_dim", "transformer_layers_per_block", "use_linear_projection"),
        *("upcast_attention", "addition_time_embed_dim", "addition_embed_type_num_heads"),
        "projection_class_embeddings_input_dim",
    ),
}
"""The options of a class that are read, or make no difference."""
_BLOCKS: dict[str, dict[str, bool]] = {
    "UNet2DModel": {
        "DownBlock2D": False,
        "AttnDownBlock2D": True,
        "UpBlock2D": False,
        "AttnUpBlock2D": True,
    },
    "UNet2DConditionModel": {
        "DownBlock2D": False,
        "CrossAttnDownBlock2D": True,
        "UpBlock2D": False,
        "CrossAttnUpBlock2D": True,
    },
}
"""The types of blocks, and whether they attend."""


def make(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> StepUNet:
    """Make the network of a config.

    Args:
        config: a `config.json` of one of the two classes, `_class_name` saying which; what it does
            not say is as diffusers has it.
        dtype: of the computation and the parameters.

    Returns:
        A network of (x, step, cond); its `cond_names` say what its conditioning has.

    Raises:
        ValueError: if the config asks for something else, in the name of the option.
    """
    kind = config.get("_class_name")
    if kind not in _ONLY:
        raise ValueError(f"`_class_name` must be one of {', '.join(_ONLY)}; got {kind!r}.")
    judged = configs.judged(kind, config, _ONLY[kind], _READ[kind])
    read = _read_conditional if kind == "UNet2DConditionModel" else _read_unconditional
    return StepUNet(**read(judged), dtype=dtype, param_dtype=dtype, rngs=counted())


def _read_unconditional(config: Mapping[str, Any]) -> dict[str, Any]:
    get = config.get
    widths = tuple(get("block_out_channels", (224, 448, 672, 896)))
    kinds = {
        "down": get("down_block_types", ("DownBlock2D", *["AttnDownBlock2D"] * 3)),
        "up": get("up_block_types", (*["AttnUpBlock2D"] * 3, "UpBlock2D")),
    }
    head = get("attention_head_dim", 8)
    heads = [_divided("attention_head_dim", width, head or width) for width in widths]
    scaled = get("resnet_time_scale_shift", "default") == "scale_shift"
    groups, middle_groups = _groups(config), get("attn_norm_num_groups")
    if middle_groups not in (None, groups):
        raise ValueError(
            f"`attn_norm_num_groups` of the config must be {groups}, as the others; "
            f"got {middle_groups}."
        )
    levels = _levels("UNet2DModel", config, kinds, widths, heads, [0] * len(widths))
    levels["middle"] = Level(widths[-1], 2, heads[-1] if get("add_attention", True) else 0)
    return {
        **_read_shared(config, channels=3),
        **levels,
        "middle_normed": middle_groups is not None or not scaled,
    }


def _read_conditional(config: Mapping[str, Any]) -> dict[str, Any]:
    get = config.get
    widths = tuple(get("block_out_channels", (320, 640, 1280, 1280)))
    kinds = {
        "down": get("down_block_types", (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")),
        "up": get("up_block_types", ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)),
    }
    heads = _each("attention_head_dim", get("attention_head_dim", 8), widths)
    for width, num in zip(widths, heads, strict=True):
        _divided("attention_head_dim", width, num)
    depths = _each("transformer_layers_per_block", get("transformer_layers_per_block", 1), widths)
    contexts = set(_each("cross_attention_dim", get("cross_attention_dim", 1280), widths))
    if len(contexts) != 1 or None in contexts:
        raise ValueError(
            "`cross_attention_dim` of the config must be one number for all levels; "
            f"got {get('cross_attention_dim')}."
        )
    levels = _levels("UNet2DConditionModel", config, kinds, widths, heads, depths)
    levels["middle"] = Level(widths[-1], 2, heads[-1], depths[-1])
    pooled = None
    if get("addition_embed_type") == "text_time":
        names = ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
        missing = [name for name in names if not isinstance(get(name), int)]
        if missing:
            raise ValueError(f"The config must say {' and '.join(missing)} for added text_time.")
        pooled = Pooled(*(config[name] for name in names))
    (context_width,) = contexts
    shared = _read_shared(config, channels=4)
    return {**shared, **levels, "context_width": context_width, "pooled": pooled}


def _read_shared(config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Return what is read alike; `channels` are those of images where the config says nothing."""
    get = config.get
    inputs, outputs = get("in_channels", channels), get("out_channels", channels)
    if inputs < outputs:
        raise ValueError(
            f"`out_channels` of the config must be at most `in_channels` = {inputs}; got {outputs}."
            " A learned variance is not supported."
        )
    padding = get("downsample_padding", 1)
    if padding not in (0, 1):
        raise ValueError(f"`downsample_padding` of the config must be 0 or 1; got {padding}.")
    return {
        "in_channels": inputs,
        "out_channels": outputs,
        "cond_width": get("time_embedding_dim"),
        "flip": get("flip_sin_to_cos", True),
        "shift": float(get("freq_shift", 0)),
        "max_groups": _groups(config),
        "epsilon": get("norm_eps", 1e-5),
        "added": get("resnet_time_scale_shift", "default") == "default",
        "padding": padding,
    }


def _levels(
    kind: str,
    config: Mapping[str, Any],
    kinds: Mapping[str, Any],
    widths: tuple[int, ...],
    heads: list[int],
    depths: list[int],
) -> dict[str, Any]:
    """Return the levels on both ways."""
    groups = _groups(config)
    for width in widths:
        if width % groups:
            raise ValueError(
                "`norm_num_groups` of the config must divide all `block_out_channels`; "
                f"got {groups} and {width}."
            )
    nums = _each("layers_per_block", config.get("layers_per_block", 2), widths)
    found = {}
    for way, types in kinds.items():
        if len(types) != len(widths):
            raise ValueError(
                f"`{way}_block_types` of the config must be {len(widths)}, as the "
                f"`block_out_channels`; got {len(types)}."
            )
        levels = []
        for i, name in enumerate(types):
            if name not in _BLOCKS[kind] or way not in name.lower():
                known = ", ".join(each for each in _BLOCKS[kind] if way in each.lower())
                raise ValueError(
                    f"`{way}_block_types` of the config must be of {known}; got {name!r}."
                )
            at = i if way == "down" else len(widths) - 1 - i
            attends = _BLOCKS[kind][name]
            levels.append(
                Level(
                    widths[at],
                    nums[at] + (way == "up"),
                    heads[at] if attends else 0,
                    depths[at] if attends else 0,
                )
            )
        found[way] = tuple(levels)
    return found


def _groups(config: Mapping[str, Any]) -> int:
    groups = config.get("norm_num_groups", 32)
    if not isinstance(groups, int):
        raise ValueError(f"`norm_num_groups` of the config must be a number; got {groups!r}.")
    return groups


def _each(name: str, value: Any, widths: tuple[int, ...]) -> list[Any]:
    """Return an option of each level, one value standing for all."""
    values = list(value) if isinstance(value, list | tuple) else [value] * len(widths)
    if len(values) != len(widths) or any(isinstance(each, list | tuple) for each in values):
        raise ValueError(
            f"`{name}` of the config must be one number, or one for each of {len(widths)} levels; "
            f"got {value}."
        )
    return values


def _divided(name: str, width: int, by: int) -> int:
    if width % by:
        raise ValueError(f"`{name}` of the config must divide {width} channels; got {by}.")
    return width // by


def _transformer(source: str, path: str, number: int) -> Table:
    """Return the rules of a transformer; `number` is that of the group that numbers a block."""
    block, to = rf"{source}\.transformer_blocks\.(\d+)", f"{path}.block_{{{number}:02d}}"
    found = [
        *rules.norm(rf"{source}\.norm", f"{path}.norm"),
        *rules.layer(rf"{source}\.proj_in", f"{path}.input", "linear"),
        *rules.layer(rf"{source}\.proj_out", f"{path}.output", "linear"),
    ]
    norms = {"norm1": "norm_self", "norm2": "norm_cross", "norm3": "norm_gated"}
    for name, own in norms.items():
        found += rules.norm(rf"{block}\.{name}", f"{to}.{own}")
    linears = {
        r"attn1\.to_q": ("qkv", (0, 3)),
        r"attn1\.to_k": ("qkv", (1, 3)),
        r"attn1\.to_v": ("qkv", (2, 3)),
        r"attn1\.to_out\.0": ("projection", None),
        r"attn2\.to_q": ("cross.query", None),
        r"attn2\.to_k": ("cross.key_value", (0, 2)),
        r"attn2\.to_v": ("cross.key_value", (1, 2)),
        r"attn2\.to_out\.0": ("cross.projection", None),
        r"ff\.net\.0\.proj": ("inner", None),
        r"ff\.net\.2": ("outer", None),
    }
    for name, (own, part) in linears.items():
        found += rules.layer(rf"{block}\.{name}", f"{to}.{own}", "linear", part)
    return tuple(found)


def _table() -> Table:
    found = [
        *rules.layer(r"time_embedding\.linear_1", "step.inner", "linear"),
        *rules.layer(r"time_embedding\.linear_2", "step.outer", "linear"),
        *rules.layer(r"add_embedding\.linear_1", "pooled_in.inner", "linear"),
        *rules.layer(r"add_embedding\.linear_2", "pooled_in.outer", "linear"),
        *rules.layer(r"conv_in", "conv_in", "conv"),
        *rules.norm(r"conv_norm_out", "norm_out"),
        *rules.layer(r"conv_out", "conv_out", "conv"),
        *rules.layer(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", "downsample_{0:02d}", "conv"),
        *rules.layer(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", "upsample_{0:02d}", "conv"),
        *rules.residual(r"mid_block\.resnets\.(\d+)", "middle_{0:02d}"),
        *rules.attention(r"mid_block\.attentions\.0", "middle_attention"),
        *_transformer(r"mid_block\.attentions\.0", "middle_attention", 0),
    ]
    for way in ("down", "up"):
        place = rf"{way}_blocks\.(\d+)"
        found += rules.residual(rf"{place}\.resnets\.(\d+)", f"{way}_{{0:02d}}_{{1:02d}}")
        attention = rf"{place}\.attentions\.(\d+)", f"{way}_attention_{{0:02d}}_{{1:02d}}"
        found += [*rules.attention(*attention), *_transformer(*attention, 2)]
    return tuple(found)


TABLE: Table = _table()
"""Of both classes."""
