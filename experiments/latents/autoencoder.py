"""The first stage: an autoencoder of pictures, whose latents the denoiser is trained on."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.common import evaluations, optimization, options
from experiments.common.command import Refusal, refusing
from experiments.common.options import (
    Count,
    CountOrNone,
    Natural,
    NotNegative,
    Positive,
    Seed,
    Share,
    Within,
)
from experiments.latents import sources
from experiments.latents.stages import Stage, Training
from jaxdiff import data, losses, nn, pretrained, training
from jaxdiff.data import Records
from jaxdiff.losses.autoencoding import PARTS
from jaxdiff.training import loading, networks
from jaxdiff.training.state import TrainState
from jaxdiff.typing import Array, LossFn, PyTree

AUTOENCODER, DISCRIMINATOR = PARTS
"""The parts of the parameters where both are trained."""
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of levels in [0, 1], by which networks of images are given them."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What the autoencoder is, and what pictures the run is of."""

    seed: Seed = 0
    """Of everything random: parameters, data order, noise; and of scenes themselves."""
    data: str = sources.SCENES
    """Pictures with captions: scenes, made here; a folder of images with a metadata.jsonl that
    gives each a text; or a prepared TFDS data set with a text."""
    data_dir: str | None = None
    """Where data sets lie; the cache directory unless given. Of a folder of images, the folder."""
    image_size: CountOrNone = None
    """Side of the pictures, which a folder needs, and a data set of pictures of many sizes: the
    short side is resized, the centre cut out. Scenes are 32 unless given."""
    eval_split: str = sources.EVAL_SPLIT
    """The split of a folder or a data set that judges, such as validation."""
    flip: bool = False
    """Mirror pictures at random in training: not where captions say what is left."""
    num_scenes: Count = 40_000
    """Scenes to train on."""
    scene_shares: tuple[Share, Share, Share] = (1.0, 0.0, 0.0)
    """Of scenes of one object, of two in a relation, and of several alike."""
    network: Literal["space_to_depth", "residual"] = "space_to_depth"
    """Architecture: a small one, or that of Stable Diffusion."""
    widths: Annotated[tuple[int, ...], Within(1)] = (24, 48)
    """Channels of its levels: small ones halve the resolution at each, the other between two."""
    num_blocks: Count = 1
    """Residual blocks of a level."""
    latent_channels: Count = 4
    """Channels of the latents."""
    squared: NotNegative = 1.0
    """Weight of the squared error of a pixel."""
    absolute: NotNegative = 0.1
    """Weight of its absolute error."""
    divergence: NotNegative = 1e-4
    """Weight of the divergence of a latent's Gaussian from the unit one."""
    perceptual: NotNegative = 0.0
    """Weight of the difference of features, by --perceptual-weights."""
    perceptual_weights: str | None = None
    """Folder or hub id of a DINOv2 that makes the features."""
    adversarial: NotNegative = 0.0
    """Weight of a patch discriminator's judgement; 0 trains none."""
    adversarial_from: Natural = 0
    """The update from which on that counts."""
    discriminator_widths: Annotated[tuple[int, ...], Within(1)] = (64, 128, 256)
    """Channels of the discriminator's levels."""
    discriminator_rate: Positive = 2e-4
    """Learning rate of its Adam."""
    batch_size: Count = 32
    """Pictures an update."""
    num_steps: Count = 3000
    """Updates in all; a larger number extends a run."""
    decay_steps: CountOrNone = None
    """Updates over which the learning rate decays; the first `num_steps` unless given."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Adam for all, or Muon for the matrices within and Adam for the rest."""
    learning_rate: Positive = 2e-3
    """Peak learning rate of Adam."""
    muon_learning_rate: Positive = 0.02
    """Peak learning rate of Muon."""
    schedule: Literal["constant_linear", "cosine", "linear", "constant"] = "constant_linear"
    """How the learning rate goes on after the warm-up; it falls in the second half by default."""
    warmup_steps: Natural = 50
    """Updates over which the learning rate rises."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    clip_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: Share = 0.995
    """Decay of the moving average of the parameters, which encodes and decodes."""
    eval_examples: Count = 512
    """Pictures held out that the reconstruction is judged by."""
    checkpoint_every: Count = 500
    """Updates between checkpoints; the last is always saved."""
    log_every: Count = 20
    """Updates between logged ones."""


MIXED = (0.35, 0.5, 0.15)
"""Shares of the kinds of scenes where relations and numbers are to be learned too."""
PRESETS = {
    "full": Config(),
    "relations": Config(num_scenes=100_000, scene_shares=MIXED),
    "smoke": Config(
        num_scenes=1000,
        num_steps=100,
        warmup_steps=10,
        ema_decay=0.9,
        eval_examples=64,
        checkpoint_every=50,
    ),
}
PresetName = Literal["full", "relations", "smoke"]
STAGE = Stage("autoencoder", "autoencoder", Config)


def check(config: Config) -> None:
    """Refuse a config whose values cannot be meant."""
    options.judge(config)
    if (config.perceptual > 0.0) != (config.perceptual_weights is not None):
        raise Refusal(
            "--perceptual, the weight, and --perceptual-weights, a DINOv2, need each other."
        )


class Autoencoder(NamedTuple):
    """An autoencoder, as a config says it.

    Attributes:
        init_params: makes its parameters; may be traced.
        encode: (params, x (B, H, W, C)) -> (mean, std) of latents, (B, h, w, c).
        decode: (params, z (B, h, w, c)) -> x.
        shape: (H, W, C) of the pictures.
        latent_shape: (h, w, c).
    """

    init_params: Callable[[], PyTree]
    encode: Callable[[PyTree, Array], tuple[Array, Array]]
    decode: Callable[[PyTree, Array], Array]
    shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]

    def levels(self, params: PyTree, z: Array) -> Array:
        """Return what is decoded of latents as levels, uint8 (B, H, W, C)."""
        x = jnp.clip(self.decode(params, z), -1.0, 1.0)
        return data.to_levels(x, sources.NUM_LEVELS).astype(jnp.uint8)


def build(config: Config, shape: tuple[int, int, int]) -> Autoencoder:
    """Make the autoencoder of pictures (H, W, C).

    Raises:
        Refusal: if it does not take such.
    """
    options_of: dict[str, Any] = {
        "latent_channels": config.latent_channels,
        "widths": config.widths,
        "num_blocks": config.num_blocks,
    }

    def make() -> Any:
        kinds = {"space_to_depth": nn.SpaceToDepthAutoencoder, "residual": nn.Autoencoder}
        return kinds[config.network](shape[2], rngs=nnx.Rngs(config.seed), **options_of)

    with options.naming(Config):
        like = nnx.eval_shape(make)
        (params, encode), (_, decode) = (nn.functional(like, each) for each in ("encode", "decode"))
        x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        with refusing(ValueError, say="--widths or --image-size: "):
            mean, _ = jax.eval_shape(encode, params, x)

    def init_params() -> PyTree:
        return nn.functional(make(), "encode")[0]

    height, width, channels = mean.shape[1:]
    return Autoencoder(init_params, encode, decode, shape, (height, width, channels))


def build_training(
    config: Config, autoencoder: Autoencoder, pictures: Records, *, skip_nonfinite: bool = False
) -> Training:
    """Make what is trained: the autoencoder, and beside it a discriminator if there is one."""
    encode, decode = autoencoder.encode, autoencoder.decode
    prepare = data.dequantized_images(sources.NUM_LEVELS, flip=config.flip)
    frozen, features = perceptual_features(config)
    terms: dict[str, Any] = {
        "squared": config.squared,
        "absolute": config.absolute,
        "divergence": config.divergence,
    }

    def loss_of(state: TrainState, **more: Any) -> LossFn:
        if features is not None:
            more |= {"features": lambda x: features(state.frozen, x)}
            more |= {"perceptual": config.perceptual}
        loss_fn = losses.autoencoding(encode, decode, **terms, **more)
        return data.prepared(loss_fn, prepare)

    optimizer = optimization.build_optimizer(config)
    if config.adversarial == 0.0:
        update: Any = training.make_update(
            loss_of=loss_of,
            optimizer=optimizer,
            ema_decay=config.ema_decay,
            skip_nonfinite=skip_nonfinite,
        )
        return Training(update, autoencoder.init_params, pictures, frozen)

    init_discriminator, discriminate = nn.deferred(
        lambda: nn.PatchDiscriminator(
            autoencoder.shape[2],
            widths=config.discriminator_widths,
            rngs=nnx.Rngs(config.seed + 1),
        )
    )

    def against(state: TrainState) -> LossFn:
        counts = state.step >= config.adversarial_from
        return loss_of(
            state,
            discriminate=discriminate,
            adversarial=jnp.where(counts, config.adversarial, 0.0),
        )

    judging = losses.discriminating(encode, decode, discriminate)
    update = networks.alternate(
        autoencoder=training.make_update(
            loss_of=against,
            optimizer=optimizer,
            ema_decay=config.ema_decay,
            part=AUTOENCODER,
            skip_nonfinite=skip_nonfinite,
        ),
        discriminator=training.make_update(
            data.prepared(judging, prepare),
            optimization.adamw(config.discriminator_rate, config.clip_norm, 0.0),
            ema_decay=0.0,
            part=DISCRIMINATOR,
            skip_nonfinite=skip_nonfinite,
        ),
    )

    def init_both() -> PyTree:
        return {AUTOENCODER: autoencoder.init_params(), DISCRIMINATOR: init_discriminator()}

    return Training(update, init_both, pictures, frozen)


def is_finished(run_dir: str) -> bool:
    """Tell whether the autoencoder of a run was trained to its end, and judged."""
    found = evaluations.numbers(STAGE.at(run_dir))
    return found.get("step") == STAGE.recorded(run_dir).get("config", {}).get("num_steps", -1)


def check_finished(run_dir: str) -> None:
    """Refuse to go on with an autoencoder whose training has not come to its end.

    Raises:
        Refusal: saying what would do.
    """
    if not is_finished(run_dir):
        raise Refusal(
            f"--run-dir {run_dir}: its autoencoder is not finished.{STAGE.remedy(run_dir)}"
        )


def own(config: Config, params: PyTree) -> PyTree:
    """Return the autoencoder's of the parameters, or averages, that a state of its stage has."""
    return params if config.adversarial == 0.0 else params[AUTOENCODER]


def averaged(config: Config, state: TrainState) -> PyTree:
    """Return its averaged parameters."""
    return own(config, loading.average_of(state.params, state.ema))


def perceptual_features(
    config: Config,
) -> tuple[PyTree, Callable[[PyTree, Array], list[Array]] | None]:
    """Return the parameters and the function of what sees pictures as people do, if there is one.

    Pictures are resized so that patches divide them.

    Raises:
        Refusal: if the weights cannot be loaded, or are none of such a network.
    """
    if config.perceptual_weights is None:
        return (), None
    errors = (FileNotFoundError, pretrained.WeightsError, ValueError, ImportError)
    with refusing(*errors, say="--perceptual-weights: "):
        loaded = pretrained.load(config.perceptual_weights)
    if not isinstance(loaded, pretrained.Vision):
        raise Refusal(
            f"--perceptual-weights must be a DINOv2; {config.perceptual_weights} holds the kind "
            f"{type(loaded).__name__}."
        )
    patches, patch = loaded.patches, int(loaded.config.get("patch_size", 14))
    mean, std = (np.asarray(each, np.float32) for each in _IMAGENET)

    def features(params: PyTree, x: Array) -> list[Array]:
        x = jnp.broadcast_to(x, (*x.shape[:3], 3))
        height, width = (-(-size // patch) * patch for size in x.shape[1:3])
        x = jax.image.resize(x, (x.shape[0], height, width, 3), "linear")
        return [patches(params, (0.5 * x + 0.5 - mean) / std)]

    return loaded.params, features


def fingerprint_of(record: Mapping[str, Any], what: str) -> str:
    """Return the hash of the autoencoder that a record says; refuse one that lacks it."""
    found = record.get(AUTOENCODER)
    if not isinstance(found, str):
        raise Refusal(f"{what} does not say which autoencoder made its latents.")
    return found
