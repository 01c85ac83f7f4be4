"""The third stage: a diffusion model of the latents, told by text; or of the pixels themselves."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.common import optimization, options
from experiments.common.choices import PROCESSES, WEIGHTINGS, Kind, ProcessName
from experiments.common.command import Refusal
from experiments.common.options import (
    Count,
    CountOrNone,
    Natural,
    NotNegative,
    Positive,
    Role,
    Seed,
    Share,
)
from experiments.latents import sources
from experiments.latents.encoding import TEXT_LEARNED, Store, Text
from experiments.latents.stages import Stage, Training
from jaxdiff import Model, data, losses, nn, timesteps
from jaxdiff.data import Captioned, Records
from jaxdiff.processes import Process
from jaxdiff.typing import Apply, Batch, Key, LossFn, PyTree


@dataclasses.dataclass(frozen=True)
class Config:
    """What the denoiser is."""

    seed: Seed = 0
    """Of everything random: parameters, order of the latents, noise, evaluation."""
    space: Literal["latents", "pixels"] = "latents"
    """What it is a model of."""
    network: Literal["dit", "unet"] = "dit"
    """Architecture."""
    width: Count = 128
    """Width of the DiT's tokens, or channels of the U-Net's first level."""
    depth: Count = 5
    """Blocks of the DiT, or residual blocks a level of the U-Net."""
    patch_size: Count = 2
    """Side of the DiT's patches."""
    num_heads: Count = 4
    """Heads of all attention."""
    mlp_ratio: Count = 3
    """Width of the hidden layer of the DiT's perceptrons over `width`."""
    text_attention: Literal["cross", "joint"] = "cross"
    """How the DiT sees the text: by layers of its own, or in one attention with the picture."""
    text_width: Count = 128
    """Width of the text encoder that is learned."""
    text_depth: Count = 2
    """Its blocks."""
    pooled_text: bool = True
    """Whether the mean of the text's vectors is added to that of the time."""
    query_key_norm: bool = True
    """Normalise queries and keys of the DiT."""
    activation: Literal["gelu", "relu_squared"] = "relu_squared"
    """Of the DiT's perceptrons."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the network's computation; parameters and optimizer state are float32."""
    remat: bool = False
    """Recompute blocks in the backward pass, to save memory."""
    process: ProcessName = "flow"
    """Forward process."""
    prediction: Kind = "velocity"
    """What the network predicts."""
    weighting: Literal["simple", "min_snr", "edm", "likelihood"] = "simple"
    """Loss weighting."""
    times: Literal["logit_normal", "stratified", "uniform"] = "logit_normal"
    """Distribution of training times."""
    drop_cond: Share = 0.1
    """Probability with which a caption is dropped in training."""
    batch_size: Count = 128
    """Examples an update."""
    num_steps: Count = 1000
    """Updates in all; a larger number extends a run."""
    decay_steps: CountOrNone = None
    """Updates over which the learning rate decays; the first `num_steps` unless given."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Adam for all, or Muon for the matrices within and Adam for the rest."""
    learning_rate: Annotated[Positive, Role.NUMBER] = 1e-3
    """Peak learning rate of Adam."""
    muon_learning_rate: Annotated[Positive, Role.NUMBER] = 0.02
    """Peak learning rate of Muon."""
    schedule: Literal["constant_linear", "cosine", "linear", "constant"] = "constant_linear"
    """How the learning rate goes on after the warm-up; it falls in the second half by default."""
    warmup_steps: Natural = 100
    """Updates over which the learning rate rises."""
    weight_decay: Annotated[NotNegative, Role.NUMBER] = 0.0
    """Decoupled weight decay."""
    clip_norm: Annotated[Positive, Role.NUMBER] = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: Annotated[Share, Role.NUMBER] = 0.99
    """Decay of the moving average of the parameters, which samples and is judged."""
    checkpoint_every: Count = 500
    """Updates between checkpoints; the last is always saved."""
    log_every: Count = 20
    """Updates between logged ones."""


PRESETS = {
    "full": Config(),
    "relations": Config(num_steps=5000, text_attention="joint", pooled_text=False),
    "smoke": Config(
        width=64,
        depth=2,
        text_width=64,
        text_depth=1,
        batch_size=32,
        num_steps=120,
        warmup_steps=20,
        ema_decay=0.95,
        checkpoint_every=60,
    ),
}
STAGE = Stage("train", "denoiser", Config)


def check(config: Config) -> None:
    """Refuse a config whose values cannot be meant."""
    options.judge(config)
    if config.network == "unet" and config.text_attention != "cross":
        raise Refusal(
            "--text-attention joint needs --network dit; unet takes --text-attention cross."
        )


def check_scale(config: Config, scale: float) -> None:
    """Refuse guidance where training never dropped a caption.

    Raises:
        Refusal: saying what would do.
    """
    if scale != 1.0 and config.drop_cond == 0.0:
        raise Refusal(
            "--guidance-scale must be 1 for a run trained with --drop-cond 0: its network never "
            f"saw a picture without its caption; got {scale:g}. Train with --drop-cond 0.1."
        )


class Recipe(NamedTuple):
    """A model of pictures or their latents, given text, as a config says it.

    Attributes:
        init_params: makes the initial parameters; may be traced.
        model: the network, its process and its prediction.
        shape: of what it is a model of.
        null: one example's worth of no text.
    """

    init_params: Callable[[], PyTree]
    model: Model
    shape: tuple[int, int, int]
    null: PyTree

    @property
    def apply(self) -> Apply:
        """The pure network, given times."""
        return self.model.apply

    @property
    def process(self) -> Process:
        """The forward process."""
        return self.model.process


def build(
    config: Config,
    store: Store,
    text: Text,
    key: Key | None = None,
    process: Process | None = None,
) -> Recipe:
    """Make the network and the process, unless one is given; refuse what they refuse.

    Args:
        config: of the denoiser.
        store: what it is trained on.
        text: how its captions are given.
        key: of the initial parameters, in place of the config's seed.
        process: in place of the config's.
    """
    shape = store.latent_shape if config.space == "latents" else store.shape
    conditioning = conditioning_of(config, text)
    shared: dict[str, Any] = {"num_heads": config.num_heads, "conditioning": conditioning}
    if config.network == "dit":
        network: Any = nn.DiT
        shared |= {
            "width": config.width,
            "depth": config.depth,
            "patch_size": config.patch_size,
            "mlp_ratio": config.mlp_ratio,
            "text_attention": config.text_attention,
            "query_key_norm": config.query_key_norm,
            "activation": config.activation,
        }
    else:
        network, shared = nn.UNet, shared | {"channels": config.width, "num_blocks": config.depth}

    def make() -> nnx.Module:
        made: nnx.Module = network(
            shape,
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            rngs=nnx.Rngs(config.seed if key is None else key),
            **shared,
        )
        return made

    with options.naming(Config, channels="--width", num_blocks="--depth", shape="--patch-size"):
        init_params, apply = nn.deferred(make)
    process = PROCESSES[config.process]() if process is None else process
    model = Model(nn.on_log_snr(apply, process.log_snr), process, config.prediction)
    return Recipe(init_params, model, shape, nn.null_cond(conditioning))


def conditioning_of(config: Config, text: Text) -> nn.Condition:
    """Return how the network takes text."""
    if text.kind != TEXT_LEARNED:
        return nn.Sequences(text.width)
    with options.naming(Config, width="--text-width", depth="--text-depth"):
        return nn.Texts(
            text.num_tokens,
            length=text.length,
            width=config.text_width,
            depth=config.text_depth,
            num_heads=config.num_heads,
            pooled=config.pooled_text,
        )


def build_loss(config: Config, recipe: Recipe, store: Store) -> LossFn:
    """Make the loss of what is read: latents drawn anew at every step, or pixels dequantised."""
    draws = {
        # flow's t is sigma / (alpha + sigma): its logit is the logarithm of sigma / alpha
        "logit_normal": lambda: timesteps.draw_log_normal(0.0, 1.0),
        "stratified": timesteps.draw_stratified,
        "uniform": timesteps.draw_uniform,
    }
    with options.naming(Config):
        denoising = losses.denoising(
            recipe.model,
            weighting=WEIGHTINGS[config.weighting](),
            times=draws[config.times](),
            drop_cond=config.drop_cond,
            null_cond=recipe.null,
        )
    if config.space == "latents":
        return data.prepared(denoising, data.latents(scale=store.scale, shift=store.shift))
    return data.prepared(denoising, dequantized_and_told)


def dequantized_and_told(frozen: PyTree, key: Key, batch: Batch) -> dict[str, Any]:
    """Make {"x0", "cond"} of {"image", "text"}; see `data.dequantized_images`."""
    given = {name: value for name, value in batch.items() if name not in ("text", "label")}
    made = data.dequantized_images(sources.NUM_LEVELS)(frozen, key, given)
    return {**made, "cond": batch["text"]}


def build_training(
    config: Config,
    recipe: Recipe,
    store: Store,
    records: Records,
    *,
    skip_nonfinite: bool = False,
) -> Training:
    """Make what is trained, on the records of :func:`records_of`."""
    loss_fn = build_loss(config, recipe, store)
    update = optimization.build_update(config, loss_fn, skip_nonfinite=skip_nonfinite)
    return Training(update, recipe.init_params, records)


def records_of(
    config: Config, store: Store, text: Text, open_pictures: Callable[[], Captioned]
) -> Records:
    """Return what is trained on: what was stored, or pictures beside their captions."""
    if config.space == "latents":
        return store.records
    return data.tokenized(sources.in_memory(open_pictures()), text.encode)


def told(text: Text, prompts: list[str]) -> dict[str, np.ndarray]:
    """Return what the network is given for prompts, (N, ...).

    Raises:
        Refusal: if one cannot be taken.
    """
    try:
        found: dict[str, np.ndarray] = text.encode(prompts)
    except ValueError as error:
        raise Refusal(f"--prompt: {error}") from error
    return found
