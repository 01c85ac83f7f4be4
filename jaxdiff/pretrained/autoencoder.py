"""The autoencoders of Stable Diffusion, SDXL, SD 3 and FLUX: `AutoencoderKL` of diffusers.

Files have new names of attention (`to_q`, `to_out.0`) or the first ones (`query`, `proj_attn`), and
its weights as matrices or as convolutions of one pixel.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxdiff.nn.autoencoder import Autoencoder
from jaxdiff.pretrained import configs, rules
from jaxdiff.pretrained.keys import counted
from jaxdiff.pretrained.naming import Table

__all__ = ["TABLE", "make"]

_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "latents_mean": (None,),
    "latents_std": (None,),
}
"""What the options may be where it is not anything."""
_READ = (
    *("block_out_channels", "in_channels", "out_channels", "latent_channels", "layers_per_block"),
    *("mid_block_add_attention", "norm_num_groups", "scaling_factor", "shift_factor"),
    *("use_quant_conv", "use_post_quant_conv", "sample_size", "force_upcast"),
)
"""The options that are read, or make no difference."""


def make(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> Autoencoder:
    """Make the network of a config.

    Args:
        config: a `config.json` of `AutoencoderKL`; what it does not say is as diffusers has it.
        dtype: of the computation and the parameters.

    Returns:
        A network whose latents are those that a denoising network sees, scaled and shifted.

    Raises:
        TypeError: as :class:`jaxdiff.nn.autoencoder.Autoencoder`.
        ValueError: if the config asks for something else, in the name of the option; as above.
    """
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ValueError(f"`_class_name` of the config must be AutoencoderKL; got {kind}.")
    get = configs.judged(kind, config, _ONLY, _READ).get
    widths = tuple(get("block_out_channels", (64,)))
    for name, first in (("down_block_types", "Down"), ("up_block_types", "Up")):
        blocks = get(name, (first,))
        if len(blocks) != len(widths):
            raise ValueError(
                f"`{name}` of the config must be {len(widths)}, as the `block_out_channels`; "
                f"got {len(blocks)}."
            )
    groups = get("norm_num_groups", 32)
    if any(width % groups for width in widths):
        raise ValueError(
            "`norm_num_groups` of the config must divide all `block_out_channels`; "
            f"got {groups} and {list(widths)}."
        )
    return Autoencoder(
        get("in_channels", 3),
        out_channels=get("out_channels", 3),
        latent_channels=get("latent_channels", 4),
        widths=widths,
        num_blocks=get("layers_per_block", 1),
        attends=get("mid_block_add_attention", True),
        mixes=(get("use_quant_conv", True), get("use_post_quant_conv", True)),
        scale=get("scaling_factor", 0.18215),
        shift=get("shift_factor") or 0.0,
        max_groups=groups,
        dtype=dtype,
        param_dtype=dtype,
        rngs=counted(),
    )


def _table() -> Table:
    way = r"(encoder|decoder)"
    level = way + r"\.(?:down|up)_blocks\.(\d+)"
    resize = level + r"\.(?:down|up)samplers\.0\.conv"
    middle = way + r"\.mid_block"
    return (
        *rules.layer(way + r"\.conv_in", "{0}.conv_in", "conv"),
        *rules.residual(level + r"\.resnets\.(\d+)", "{0}.levels.block_{1:02d}_{2:02d}"),
        *rules.layer(resize, "{0}.levels.resize_{1:02d}", "conv"),
        *rules.residual(middle + r"\.resnets\.(\d+)", "{0}.middle.block_{1:02d}"),
        *rules.attention(middle + r"\.attentions\.0", "{0}.middle.attention"),
        *rules.norm(way + r"\.conv_norm_out", "{0}.norm_out"),
        *rules.layer(way + r"\.conv_out", "{0}.conv_out", "conv"),
        *rules.layer("quant_conv", "mix_out", "linear"),
        *rules.layer("post_quant_conv", "mix_in", "linear"),
    )


TABLE: Table = _table()
"""Of all of them."""
