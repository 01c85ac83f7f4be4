"""A diffusion model of images as a config says it: network, process and loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from experiments.common import flows, options
from experiments.common.choices import PROCESSES, WEIGHTINGS, Kind, ProcessName
from experiments.common.command import Refusal
from experiments.common.methods import make_grid
from experiments.common.optimization import ema_decays
from experiments.common.options import (
    Count,
    CountOrNone,
    CountsOrNone,
    LogSnr,
    Natural,
    NaturalsOrNone,
    NotNegative,
    Positive,
    Role,
    Seed,
    Share,
    Tolerance,
    Within,
)
from experiments.images import network as image_network
from experiments.images.sources import FOLDER
from experiments.images.sources import open_images as open_images
from jaxdiff import (
    Model,
    data,
    denoisers,
    losses,
    nn,
    timesteps,
    weightings,
)
from jaxdiff.processes import Process
from jaxdiff.training import ema
from jaxdiff.typing import Apply, Key, LossFn, PyTree

EvalExamples = Annotated[int | None, Within(2)]
Components = Annotated[tuple[int, ...], Within(1, 256)]


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is."""

    seed: Seed = 0
    """Of everything random: parameters, data order, noise, evaluation."""
    data: str = "digits"
    """Image data set: digits, a prepared TFDS one such as fashion_mnist, or a folder of images."""
    image_size: CountOrNone = options.later(None)
    """Side of the images, which a folder needs, and a data set of images of many sizes: the short
    side is resized, the centre cut out."""
    flip: bool = options.later(False)
    """Mirror images at random in training."""
    network: Literal["dit", "unet"] = "dit"
    """Architecture."""
    width: Count = 128
    """Width of the DiT's tokens, or channels of the U-Net's first level."""
    depth: Count = 4
    """Blocks of the DiT, or residual blocks a level of the U-Net."""
    patch_size: Count = 2
    """Side of the DiT's patches."""
    num_heads: CountOrNone = options.later(None)
    """Heads of the attention; 4 unless given."""
    mlp_ratio: CountOrNone = options.later(None)
    """Width of the hidden layer of the DiT's perceptrons over `width`; 4 unless given."""
    multipliers: CountsOrNone = options.later(None)
    """Channels of each level of the U-Net over the first's; 1 2 2 unless given."""
    attention_levels: NaturalsOrNone = options.later(None)
    """Levels of the U-Net, from 0, with attention; only its middle has it unless given."""
    dropout: Annotated[float, Within(0.0, 1.0, below=True)] = 0.0
    """Dropout rate of the network."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the network's computation; parameters and optimizer state are float32."""
    remat: bool = False
    """Recompute blocks in the backward pass, to save memory."""
    process: ProcessName = "cosine"
    """Forward process."""
    prediction: Kind = "v"
    """What the network predicts."""
    preconditioning: Literal["none", "edm"] = options.later("none")
    """Fixed scales around the network, for predictions x0 and v: none, or those of EDM."""
    loss_on: Kind | None = "eps"
    """The quantity whose squared error is the loss; None is what the network predicts."""
    weighting: Literal["simple", "min_snr", "edm", "likelihood"] = "simple"
    """Loss weighting."""
    times: Literal["log_snr", "stratified", "uniform", "log_normal"] = "log_snr"
    """Distribution of training times; log_snr is uniform between the two bounds below."""
    log_snr_low: LogSnr = -10.0
    """Log-SNR of the noisiest training times."""
    log_snr_high: LogSnr = 12.0
    """Log-SNR of the cleanest training times, and of the data end of the likelihood."""
    drop_cond: Share = 0.1
    """Probability with which a label is dropped in training."""
    batch_size: Count = 64
    """Examples an update."""
    num_steps: Count = 1600
    """Updates in all; a larger number extends a run."""
    decay_steps: CountOrNone = None
    """Updates over which the learning rate decays; the first `num_steps` unless given."""
    learning_rate: Annotated[Positive, Role.NUMBER] = 2e-3
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: Natural = 100
    """Updates over which the learning rate rises."""
    weight_decay: Annotated[NotNegative, Role.NUMBER] = 0.01
    """Decoupled weight decay."""
    clip_norm: Annotated[Positive, Role.NUMBER] = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: Annotated[Share, Role.NUMBER] = 0.99
    """Decay of the moving average of the parameters, which samples and is judged."""
    more_ema_decays: tuple[float, ...] = ()
    """Decays of further averages to keep."""
    ema_stds: tuple[float, ...] = ()
    """Widths of power-function averages to keep, from which others follow afterwards."""
    eval_examples: EvalExamples = None
    """Images of each split that the likelihood is taken of; two at least, for its error. Unless
    given 297, but of large images 32,768 numbers in all, which 41 of 28x28 have, and 8 at least."""
    eval_tolerance: Tolerance = 1e-2
    """Relative and absolute tolerance of the likelihood's ODE; 1e-4 moves digits by 6e-4 bits."""
    mixture_components: Components = (4, 8, 10, 16)
    """Numbers of components that the Gaussian mixture is fitted with; none leaves it out."""
    sample_steps: Annotated[Count, Role.SAMPLING] = 100
    """Steps of the DDIM samples in the report."""
    sample_grid: Annotated[Literal["uniform", "karras"], Role.SAMPLING] = options.later("uniform")
    """Times of all samples: equal steps of t, or the noise levels of EDM."""
    data_dir: str | None = None
    """Where data sets lie; the cache directory unless given. Of a folder of images, the folder."""
    checkpoint_every: Count = 500
    """Updates between checkpoints; the last is always saved."""
    log_every: Count = 20
    """Updates between logged ones."""


PresetName = Literal["full", "smoke", "edm"]
PRESETS = {
    "full": Config(),
    "smoke": Config(
        width=32,
        depth=1,
        batch_size=32,
        num_steps=20,
        warmup_steps=5,
        eval_examples=8,
        eval_tolerance=1e-1,
        mixture_components=(2,),
        sample_steps=8,
        checkpoint_every=10,
        log_every=5,
    ),
    "edm": Config(
        process="edm",
        preconditioning="edm",
        loss_on="x0",
        weighting="edm",
        times="log_normal",
        sample_grid="karras",
    ),
}


def check(config: Config) -> None:
    """Refuse a config whose values cannot be meant."""
    options.judge(config)
    with options.naming(Config, ema_decay="--more-ema-decays or --ema-stds"):
        ema.check_decay(ema_decays(config))
    if config.preconditioning == "edm" and config.prediction not in ("x0", "v"):
        raise Refusal(
            f"--preconditioning edm needs --prediction x0 or v; got {config.prediction}: the "
            "network within predicts what EDM's scales make of them."
        )
    process = PROCESSES[config.process]()
    with options.naming(Config, sigma_min="--sample-grid"):
        make_grid(config.sample_grid, process, 1, timesteps.start(process, True))
    flows.check_ends(process, config.prediction, config.log_snr_low, config.log_snr_high)


def to_record(config: Config) -> dict[str, Any]:
    """Return the config as JSON holds it, without later fields at their defaults."""
    return options.as_json(options.without_later(config))


def defaults() -> dict[str, Any]:
    """Return the values of fields that a record lacks, by name, as JSON holds them."""
    return options.as_json(dataclasses.asdict(Config()))


def from_record(record: Mapping[str, Any]) -> Config:
    """Return the resolved config of what `to_record` gave; `decay_steps` is a number then.

    Raises:
        Refusal: if it has a field that is none of a config, or its values cannot be meant.
    """
    config = _read(record)
    check(config)
    return dataclasses.replace(config, decay_steps=config.decay_steps or config.num_steps)


def _read(record: Mapping[str, Any]) -> Config:
    """Return the config of a record, each value one that its field takes; asks nothing of JAX."""
    unknown = record.keys() - defaults().keys()
    if unknown:
        raise Refusal(
            "This run was written by another version of the experiment: its config has "
            f"{', '.join(sorted(unknown))}."
        )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (defaults() | dict(record)).items()
    }
    config = Config(**values)
    options.judge(config)
    return config


def asked_again(record: Mapping[str, Any]) -> Config:
    """Return the config by which a command line would ask for the run of a record again.

    Where its data lie is as recorded and not asked for; a folder of images is named by its path.
    It is asked before the processes of a run have joined, and so before JAX may be.

    Raises:
        Refusal: if it has a field that is none of a config, or a value that its field never takes.
    """
    config = _read(record)
    given: dict[str, Any] = {"decay_steps": record.get("decay_steps"), "data_dir": None}
    if config.data == FOLDER and config.data_dir is not None:
        given["data"] = config.data_dir
    return dataclasses.replace(config, **given)


def pixels(x: Any, num_levels: int) -> np.ndarray:
    """Turn images in [-1, 1] into uint8 of 256 levels, for pictures."""
    return brightness(np.asarray(_to_levels(x, num_levels)), num_levels)


_to_levels = jax.jit(data.to_levels, static_argnums=1)


def brightness(levels: np.ndarray, num_levels: int) -> np.ndarray:
    """Spread levels 0..L-1 over the 256 of a picture, uint8."""
    return (levels.astype(np.int32) * 255 // (num_levels - 1)).astype(np.uint8)


class Recipe(NamedTuple):
    """A model of labelled images, as a config says it.

    Attributes:
        init_params: makes the initial parameters; may be traced.
        model: the network, its process and its prediction.
        null_label: the label that stands for none; None where the network sees no labels.
    """

    init_params: Callable[[], PyTree]
    model: Model
    null_label: int | None

    @property
    def apply(self) -> Apply:
        """The pure network, given times."""
        return self.model.apply

    @property
    def process(self) -> Process:
        """The forward process."""
        return self.model.process

    @property
    def prediction(self) -> str:
        """What the network predicts."""
        return self.model.prediction

    def cond(self, labels: Any) -> Any:
        """Return what the network is given for labels (B,): None where it sees none."""
        return None if self.null_label is None else labels

    def denoiser(self, params: PyTree, labels: Any = None) -> denoisers.NetworkDenoiser:
        """Return the denoiser of images of these labels, (B,), or of no label yet."""
        return self.model.denoiser(params, self.cond(labels))


def build_model(
    config: Config,
    images: data.Images | data.Description,
    process: Process | None = None,
    key: Key | None = None,
) -> Recipe:
    """Make the network and the process, unless one is given; refuse what they refuse.

    Initial parameters are those of the config's seed, unless a key is given.
    """
    make = image_network.maker(config, images, key)
    with options.naming(Config, **image_network.option_names(config)):
        init_params, apply = nn.deferred(make)
    process = PROCESSES[config.process]() if process is None else process
    apply = (
        nn.on_log_snr(apply, process.log_snr)
        if config.preconditioning == "none"
        else denoisers.preconditioned(
            apply, process, prediction=config.prediction, noise_level="log_snr"
        )
    )
    return Recipe(init_params, Model(apply, process, config.prediction), images.num_classes)


def build_loss(
    config: Config,
    model: Recipe,
    num_levels: int,
    weighting: weightings.Weighting | None = None,
) -> LossFn:
    """Make the loss of images and labels as they are read, dequantised anew at every step.

    The weighting is the config's unless one is given.
    """
    draws = {
        "log_snr": lambda: timesteps.draw_log_snr(config.log_snr_low, config.log_snr_high),
        "stratified": timesteps.draw_stratified,
        "uniform": timesteps.draw_uniform,
        "log_normal": timesteps.draw_log_normal,
    }
    with options.naming(Config):
        denoising = losses.denoising(
            model.model,
            loss_on=config.loss_on,
            weighting=WEIGHTINGS[config.weighting]() if weighting is None else weighting,
            times=draws[config.times](),
            drop_cond=0.0 if model.null_label is None else config.drop_cond,
            null_cond=model.null_label,
        )

    prepare = data.dequantized_images(num_levels, flip=config.flip)
    return data.prepared(denoising, prepare)
