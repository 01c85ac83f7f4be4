"""What transformers' DINOv2 makes of images, under the names of the published files.

The network under the names of its repository is that of transformers, renamed and with positions
interpolated as there; it was compared to the repository once. See `common` for how to run it.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peers.common import Golden, drawn, golden, last, main, shapes_of, weight
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

PLAIN = {
    "architectures": ["Dinov2Model"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 3,
    "image_size": 35,
    "patch_size": 7,
    "layerscale_value": 1.0,
}
GATED = PLAIN | {"use_swiglu_ffn": True, "mlp_ratio": 4}
REGISTERS = PLAIN | {"architectures": ["Dinov2WithRegistersModel"], "num_register_tokens": 3}
ORIGINAL = PLAIN | {"interpolate_offset": 0.1}
BASE = {
    "image_size": 518,
    "patch_size": 14,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
LARGE = BASE | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
GIANT = LARGE | {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}

PUBLISHED = {
    r"attention\.q_proj": "attention.attention.query",
    r"attention\.k_proj": "attention.attention.key",
    r"attention\.v_proj": "attention.attention.value",
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.gate_proj": "mlp.weights_in#0",
    r"mlp\.up_proj": "mlp.weights_in#1",
    r"mlp\.down_proj": "mlp.weights_out",
}
"""Names in transformers' published files by those in its class; # numbers the parts of one."""
REPOSITORY = {
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"embeddings\.": "",
    r"encoder\.layer": "blocks",
    r"attention\.q_proj": "attn.qkv#0",
    r"attention\.k_proj": "attn.qkv#1",
    r"attention\.v_proj": "attn.qkv#2",
    r"attention\.o_proj": "attn.proj",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"mlp\.gate_proj": "mlp.w12#0",
    r"mlp\.up_proj": "mlp.w12#1",
    r"mlp\.down_proj": "mlp.w3",
    r"layernorm": "norm",
}
"""Likewise, in the files of the repository."""


class Renamed(nn.Module):
    """A network whose weights have other names and lie side by side where they are parts."""

    def __init__(self, model: nn.Module, names: dict[str, str]) -> None:
        super().__init__()
        self.model, self.parts = model, {}
        for key in model.state_dict():
            name = key
            for pattern, other in names.items():
                name = re.sub(pattern, other, name)
            self.parts.setdefault(re.sub(r"#\d", "", name), []).append(key)

    def state_dict(self) -> dict[str, torch.Tensor]:
        own = self.model.state_dict()
        return {name: torch.cat([own[key] for key in keys]) for name, keys in self.parts.items()}

    def fill(self, seed: int) -> None:
        """Take the weights of a seed, in float64."""
        own = self.model.double().eval().requires_grad_(False).state_dict()
        for name, keys in self.parts.items():
            value = torch.from_numpy(weight(name, tuple(self.state_dict()[name].shape), seed))
            for key, part in zip(keys, value.chunk(len(keys)), strict=True):
                own[key].copy_(part)


@contextlib.contextmanager
def interpolation(changed: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let positions be interpolated otherwise."""
    kept = nn.functional.interpolate
    nn.functional.interpolate = partial(changed, kept)
    try:
        yield
    finally:
        nn.functional.interpolate = kept


def wide(interpolate: Callable[..., torch.Tensor], x: torch.Tensor, **options: Any) -> torch.Tensor:
    """Interpolate in float64; transformers does in float32 always, to which these round exactly."""
    return interpolate(x.double(), **options)


def offset(
    interpolate: Callable[..., torch.Tensor],
    x: torch.Tensor,
    *,
    size: tuple[int, int],
    mode: str,
    **others: Any,
) -> torch.Tensor:
    """Interpolate as the repository does: by a scale that is a little more than the sizes'."""
    scale = tuple((new + 0.1) / old for new, old in zip(size, x.shape[2:], strict=True))
    return interpolate(x.double(), scale_factor=scale, mode=mode)


def made(config: dict[str, Any], names: dict[str, str]) -> Renamed:
    config = {key: value for key, value in config.items() if key != "interpolate_offset"}
    if config.get("num_register_tokens"):
        return Renamed(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**config)), names)
    return Renamed(Dinov2Model(Dinov2Config(**config)), names)


def dinov2(seed: int, larger: int, *, config: dict[str, Any], names: dict[str, str]) -> Golden:
    config = {**config, "num_attention_heads": 2 << larger}
    model = made(config, names)
    model.fill(seed)
    sizes = {"same": (1, 3, 35, 35), "fewer": (2, 3, 21, 28), "more": (1, 3, 42 + 7 * larger, 35)}
    images = {name: drawn(name, size, seed) for name, size in sizes.items()}
    outputs = {}
    with interpolation(offset if "interpolate_offset" in config else wide):
        for name, x in images.items():
            outputs[f"{name}_output"] = model.model(torch.from_numpy(x)).pooler_output
    inputs = {name: last(x) for name, x in images.items()}
    return golden(config, model, seed, inputs, outputs)


def published() -> dict[str, dict[str, tuple[int, ...]]]:
    gated, registers = GIANT | {"use_swiglu_ffn": True}, BASE | {"num_register_tokens": 4}
    return {
        "dinov2_base": shapes_of(lambda: made(BASE, PUBLISHED)),
        "dinov2_large": shapes_of(lambda: made(LARGE, PUBLISHED)),
        "dinov2_giant": shapes_of(lambda: made(gated, PUBLISHED)),
        "dinov2_base_registers": shapes_of(lambda: made(registers, PUBLISHED)),
        "dinov2_vitl14": shapes_of(lambda: made(LARGE, REPOSITORY)),
        "dinov2_vitb14_reg": shapes_of(lambda: made(registers, REPOSITORY)),
    }


if __name__ == "__main__":
    cases = {
        "dinov2_plain": partial(dinov2, config=PLAIN, names=PUBLISHED),
        "dinov2_gated": partial(dinov2, config=GATED, names=PUBLISHED),
        "dinov2_registers": partial(dinov2, config=REGISTERS, names=PUBLISHED),
        "dinov2_newer": partial(dinov2, config=GATED, names={}),
        "dinov2_original": partial(dinov2, config=ORIGINAL, names=REPOSITORY),
        "dinov2_original_gated": partial(
            dinov2, config=GATED | {"interpolate_offset": 0.1}, names=REPOSITORY
        ),
    }
    main(cases, published)
