"""What transformers' text models of CLIP make of tokens. See `common` for how to run it."""

from functools import partial
from typing import Any

import torch
from peers.common import Golden, filled, golden, integers, main, shapes_of
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 9,
}
CLIP = {**SIZES, "hidden_act": "quick_gelu", "eos_token_id": 2}
OPEN = {**SIZES, "hidden_act": "gelu", "eos_token_id": 30, "layer_norm_eps": 1e-3}
PROJECTED = {**OPEN, "projection_dim": 12, "architectures": ["CLIPTextModelWithProjection"]}

CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
OPEN_CLIP_H = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
}
OPEN_CLIP_G = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def made(config: dict[str, Any]) -> Any:
    classes = {"CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    kind = classes.get(config.get("architectures", [""])[0], CLIPTextModel)
    return kind(CLIPTextConfig(**config, attn_implementation="sdpa"))


def clip(seed: int, larger: int, *, config: dict[str, Any]) -> Golden:
    config = {**config, "num_attention_heads": 4 >> larger, "num_hidden_layers": 2 + larger}
    model = filled(made(config), seed)
    tokens = integers("tokens", (3, 7 + larger), seed, 30)
    tokens += tokens % 2 * (tokens > 20) * 9  # some beyond the token that ends a prompt
    end = 39 if config["eos_token_id"] == 2 else config["eos_token_id"]
    tokens[0, 3:], tokens[1, 5], tokens[2, -1] = end, end, end
    output = model(torch.from_numpy(tokens), output_hidden_states=True)
    projected = "text_projection.weight" in model.state_dict()
    outputs = {
        "hidden": output.last_hidden_state,
        "skipped": output.hidden_states[-2],
        "pooled": output.text_embeds if projected else output.pooler_output,
    }
    return golden(config, model, seed, {"tokens": tokens}, outputs)


def published() -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the weights of the text encoders of SD 1.5, SD 2.1 and SDXL."""

    def named(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        found = shapes_of(lambda: made(config))
        inner = {key: shape for key, shape in found.items() if key != "text_projection.weight"}
        prefix = "" if any(key.startswith("text_model.") for key in inner) else "text_model."
        outer = {key: shape for key, shape in found.items() if key not in inner}
        return {f"{prefix}{key}": shape for key, shape in inner.items()} | outer

    ids = {"text_model.embeddings.position_ids": (1, 77)}
    return {
        "clip_sd15": ids | named(CLIP_L),
        "clip_sd21": ids | named(OPEN_CLIP_H),
        "clip_sdxl_2": named({**OPEN_CLIP_G, "architectures": PROJECTED["architectures"]}),
    }


if __name__ == "__main__":
    cases = {"sd1": CLIP, "sd2": OPEN, "projected": PROJECTED}
    main(
        {f"clip_{name}": partial(clip, config=config) for name, config in cases.items()}, published
    )
