"""The text encoders of CLIP and OpenCLIP, as transformers keeps them.

Files have the names of a whole model, `text_model.encoder.layers.0.self_attn.q_proj.weight`, or
those without the first word. A projection is there where the class says so
(`CLIPTextModelWithProjection`, the second encoder of SDXL).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxdiff.nn.text_encoder import ACTIVATIONS, TextEncoder
from jaxdiff.pretrained import configs, rules
from jaxdiff.pretrained.keys import counted
from jaxdiff.pretrained.naming import Rule, Table

__all__ = ["TABLE", "make"]

ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection")
"""The classes whose files these are."""


def make(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> TextEncoder:
    """Make the network of a config.

    Args:
        config: a `config.json` of one of `ARCHITECTURES`; what it does not say is as
            transformers has it.
        dtype: of the computation and the parameters.

    Returns:
        A network of tokens (B, L).

    Raises:
        TypeError: as :class:`jaxdiff.nn.text_encoder.TextEncoder`.
        ValueError: if the config is of something else, and as above.
    """
    get = config.get
    architecture = configs.architecture(config, ARCHITECTURES, "text encoder")
    activation = get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"`hidden_act` of the config must be one of {', '.join(ACTIVATIONS)}; got {activation}."
        )
    end = get("eos_token_id", 49407)
    if not isinstance(end, int):
        raise ValueError(f"`eos_token_id` of the config must be one token; got {end}.")
    projected = architecture == "CLIPTextModelWithProjection"
    return TextEncoder(
        get("vocab_size", 49408),
        length=get("max_position_embeddings", 77),
        width=get("hidden_size", 512),
        depth=get("num_hidden_layers", 12),
        num_heads=get("num_attention_heads", 8),
        hidden=get("intermediate_size", 2048),
        activation=activation,
        epsilon=get("layer_norm_eps", 1e-5),
        end=None if end == 2 else end,  # the first configs said 2 and meant the greatest
        projection=get("projection_dim", 512) if projected else None,
        dtype=dtype,
        param_dtype=dtype,
        rngs=counted(),
    )


def _table() -> Table:
    model = r"(?:text_model\.)?"
    block, path = model + r"encoder\.layers\.(\d+)", "block_{0:02d}"
    found = [
        Rule(model + r"embeddings\.position_ids", None),
        Rule(model + r"embeddings\.token_embedding\.weight", "tokens"),
        Rule(model + r"embeddings\.position_embedding\.weight", "positions"),
        *rules.norm(rf"{block}\.layer_norm1", f"{path}.attention_norm"),
        *rules.norm(rf"{block}\.layer_norm2", f"{path}.mlp_norm"),
        *rules.layer(rf"{block}\.self_attn\.out_proj", f"{path}.projection", "linear"),
        *rules.layer(rf"{block}\.mlp\.fc1", f"{path}.inner", "linear"),
        *rules.layer(rf"{block}\.mlp\.fc2", f"{path}.outer", "linear"),
        *rules.norm(rf"{model}final_layer_norm", "norm"),
        Rule(r"text_projection\.weight", "projection.kernel", "linear"),
    ]
    for i, name in enumerate("qkv"):
        source = rf"{block}\.self_attn\.{name}_proj"
        found += rules.layer(source, f"{path}.qkv", "linear", (i, 3))
    return tuple(found)


TABLE: Table = _table()
"""Of both architectures, with the names of the whole model or without."""
