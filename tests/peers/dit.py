"""What the diffusion transformer of its repository's names makes of images, and that of diffusers.

That of the repository is written here from the paper (arXiv:2212.09748, section 3.2 and Figure 3),
in the repository's names; it was compared to the repository once. See `common` for how to run it.
"""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models import embeddings
from peers.common import Golden, drawn, filled, golden, integers, last, main, shapes_of
from torch import nn

ORIGINAL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "num_classes": 5,
    "learn_sigma": True,
}
PLAIN = {**ORIGINAL, "patch_size": 4, "in_channels": 3, "mlp_ratio": 2.0, "learn_sigma": False}
XL = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "num_classes": 1000,
}
DIFFUSERS = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}
XL_DIFFUSERS = {"out_channels": 8}  # the others are the defaults


class Block(nn.Module):
    """One block, its modulation made of the conditioning."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        qkv, projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn = nn.ModuleDict({"qkv": qkv, "proj": projection})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        b1, g1, a1, b2, g2, a2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        qkv = self.attn["qkv"](norm(h) * (1 + g1) + b1).chunk(3, dim=-1)
        heads = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv)
        mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        h = h + a1 * self.attn["proj"](mixed)
        inner = nn.functional.gelu(self.mlp["fc1"](norm(h) * (1 + g2) + b2), approximate="tanh")
        return h + a2 * self.mlp["fc2"](inner)


class Transformer(nn.Module):
    """The network under the names of its repository."""

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        width, self.patch_size, self.channels = hidden_size, patch_size, in_channels
        self.side = input_size // patch_size
        self.x_embedder = nn.ModuleDict(
            {"proj": nn.Conv2d(in_channels, width, patch_size, stride=patch_size)}
        )
        perceptron = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": perceptron})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})
        self.pos_embed = nn.Parameter(torch.empty(1, self.side**2, width))
        hidden = int(width * mlp_ratio)
        self.blocks = nn.ModuleList([Block(width, num_heads, hidden) for _ in range(depth)])
        outputs = patch_size**2 * in_channels * (1 + learn_sigma)
        self.final_layer = nn.ModuleDict(
            {"linear": nn.Linear(width, outputs), "adaLN_modulation": modulation(width, 2)}
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder["mlp"](waves(t.to(x.dtype), 0)) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, dim=-1)
        h = self.final_layer["linear"](norm(h) * (1 + scale) + shift)
        h = h.unflatten(1, (self.side, self.side)).unflatten(-1, [self.patch_size] * 2 + [-1])
        size = self.side * self.patch_size
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, size, size)[:, : self.channels]


def modulation(width: int, parts: int) -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def norm(h: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6)


def waves(t: torch.Tensor, shift: int) -> torch.Tensor:
    """Embed steps (B,) by 128 cosines and 128 sines, in the dtype of t."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=t.dtype) / (128 - shift))
    angles = t[:, None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def positions(side: int, width: int) -> np.ndarray:
    """Return the fixed positions (1, side^2, width), float32: of the column, then of the row."""
    found = np.zeros((side, side, width))
    quarter = width // 4
    for k in range(quarter):
        angles = np.arange(side) / 10000 ** (k / quarter)
        for i, wave in enumerate((np.sin, np.cos)):
            found[:, :, k + i * quarter] = wave(angles)[None, :]
            found[:, :, k + (2 + i) * quarter] = wave(angles)[:, None]
    return found.reshape(1, side**2, width).astype(np.float32)


def transformer(config: dict[str, Any], seed: int) -> Transformer:
    """Make the network of the repository with weights of the seed and fixed positions."""
    model = filled(Transformer(**config), seed)
    model.pos_embed.copy_(torch.from_numpy(positions(model.side, config["hidden_size"])))
    return model


def inputs_of(config: dict[str, Any], seed: int, channels: int) -> tuple[torch.Tensor, ...]:
    """Draw images (3, C, size, size), steps and labels, the last of which is the null one."""
    size = config.get("input_size") or config["sample_size"]
    classes = config.get("num_classes") or config["num_embeds_ada_norm"]
    t = integers("t", (3,), seed, 1000) + np.asarray([0.0, 0.25, 0.0])
    y = np.append(integers("y", (2,), seed, classes), classes)
    x = drawn("x", (3, channels, size, size), seed)
    return tuple(torch.from_numpy(each) for each in (x, t, y))


def original(seed: int, larger: int, *, config: dict[str, Any]) -> Golden:
    config = {**config, "input_size": 8 + 4 * larger, "num_heads": 2 << larger}
    model = transformer(config, seed)
    x, t, y = inputs_of(config, seed, config["in_channels"])
    output = last(model(x, t, y))
    narrow = last(model.float()(x.float(), t.float(), y))
    inputs = {"x": last(x), "t": t, "y": y, "pos_embed": model.pos_embed}
    return golden(config, model, seed, inputs, {"output": output, "output_float32": narrow})


def diffusers(seed: int, larger: int) -> Golden:
    """Run diffusers' own, in float64 with its steps embedded in float64, too."""
    config = {**DIFFUSERS, "sample_size": 8 + 4 * larger, "num_layers": 2 + larger}
    model = filled(DiTTransformer2DModel(**config), seed)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    x, t, y = inputs_of(config, seed, 4)
    outputs: dict[str, Any] = {}
    single = embeddings.get_timestep_embedding
    outputs["waves_float32"] = single(t, 256, flip_sin_to_cos=True, downscale_freq_shift=1)
    embeddings.get_timestep_embedding = double
    outputs["output"] = last(model(x, t, y).sample[:, :4])
    for scale in (1.0, 4.0):
        outputs[f"guided_{scale:.0f}"] = last(trajectory(model, x, y, scale))
    embeddings.get_timestep_embedding = single
    narrow = model.float()(x.float(), t.float(), y).sample[:, :4]
    outputs["output_float32"] = last(narrow)
    return golden(config, model, seed, {"x": last(x), "t": t, "y": y}, outputs)


def double(
    t: torch.Tensor, width: int, *, flip_sin_to_cos: bool, downscale_freq_shift: int, scale: int
) -> torch.Tensor:
    """Stand in for diffusers' embedding of steps, which is in float32 always."""
    assert (width, flip_sin_to_cos, scale) == (256, True, 1)
    return waves(t.double(), downscale_freq_shift)


def trajectory(model: nn.Module, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """Sample in ten steps of DDIM with guidance, as diffusers' DiTPipeline does."""
    scheduler = DDIMScheduler(clip_sample=False, beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(10)
    null = torch.full_like(y, model.config.num_embeds_ada_norm)
    for t in scheduler.timesteps:
        steps = t.repeat(2 * len(x))
        eps = model(torch.cat([x, x]), steps, torch.cat([y, null])).sample[:, :4]
        given, without = eps.chunk(2)
        x = scheduler.step(without + scale * (given - without), t, x).prev_sample
    return x


def published() -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        "dit_xl_2": shapes_of(lambda: Transformer(**XL)),
        "dit_xl_2_diffusers": shapes_of(lambda: DiTTransformer2DModel(**XL_DIFFUSERS)),
    }


if __name__ == "__main__":
    cases = {
        "dit_original": partial(original, config=ORIGINAL),
        "dit_plain": partial(original, config=PLAIN),
        "dit_diffusers": diffusers,
    }
    main(cases, published)
