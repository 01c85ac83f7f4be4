"""A diffusion model of images as a config says it: network, process, loss, optimizer, generator."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import flows, options
from experiments.command import Refusal
from experiments.fitting import ema_decays
from experiments.image_sources import open_images as open_images
from experiments.methods import METHODS
from experiments.options import (
    Count,
    CountOrNone,
    LogSnr,
    Natural,
    NotNegative,
    Positive,
    Seed,
    Share,
    Tolerance,
    Within,
)
from jaxdiff import (
    data,
    denoisers,
    losses,
    nn,
    processes,
    sample,
    timesteps,
    weightings,
)
from jaxdiff.processes import Process
from jaxdiff.training import ema, parallel
from jaxdiff.typing import Apply, Array, Denoiser, Key, LossFn, PyTree

PROCESSES: dict[str, Callable[[], Process]] = {
    "cosine": processes.cosine,
    "vp": processes.vp,
    "sub_vp": processes.sub_vp,
    "flow": processes.flow,
    "ddpm": processes.ddpm,
    "edm": processes.edm,
    "ve": processes.ve,
}
WEIGHTINGS: dict[str, Callable[[], weightings.Weighting]] = {
    "simple": weightings.simple,
    "min_snr": weightings.min_snr,
    "edm": weightings.edm,
    "likelihood": weightings.likelihood,
}
ProcessName = Literal["cosine", "vp", "sub_vp", "flow", "ddpm", "edm", "ve"]
Kind = Literal["x0", "eps", "v", "score", "velocity"]

EvalExamples = Annotated[int, Within(2)]
Components = Annotated[tuple[int, ...], Within(1, 256)]

CHUNK = 256
"""Images that a device samples in one call; more are sampled in several, to the same result."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is."""

    seed: Seed = 0
    """Of everything random: parameters, data order, noise, evaluation."""
    data: str = "digits"
    """Image data set: digits, a prepared TFDS one such as fashion_mnist, or a folder of images."""
    image_size: CountOrNone = None
    """Side of the images of a folder: the short side is resized, the centre cut out."""
    flip: bool = False
    """Mirror images at random in training."""
    network: Literal["dit", "unet"] = "dit"
    """Architecture."""
    width: Count = 128
    """Width of the DiT's tokens, or channels of the U-Net's first level."""
    depth: Count = 4
    """Blocks of the DiT, or residual blocks a level of the U-Net."""
    patch_size: Count = 2
    """Side of the DiT's patches."""
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
    learning_rate: Positive = 2e-3
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: Natural = 100
    """Updates over which the learning rate rises."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay."""
    clip_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: Share = 0.99
    """Decay of the moving average of the parameters, which samples and is judged."""
    more_ema_decays: tuple[float, ...] = ()
    """Decays of further averages to keep."""
    ema_stds: tuple[float, ...] = ()
    """Widths of power-function averages to keep, from which others follow afterwards."""
    eval_examples: EvalExamples = 297
    """Images of each split that the likelihood is taken of; two at least, for its error."""
    eval_tolerance: Tolerance = 1e-2
    """Relative and absolute tolerance of the likelihood's ODE; 1e-4 moves digits by 6e-4 bits."""
    mixture_components: Components = (4, 8, 10, 16)
    """Numbers of components that the Gaussian mixture is fitted with; none leaves it out."""
    sample_steps: Count = 100
    """Steps of the DDIM samples in the report."""
    data_dir: str | None = None
    """Where data sets lie; the cache directory unless given. Of a folder of images, the folder."""
    checkpoint_every: Count = 500
    """Updates between checkpoints; the last is always saved."""
    log_every: Count = 20
    """Updates between logged ones."""


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
}


def check(config: Config) -> None:
    """Refuse a config whose values cannot be meant."""
    options.judge(config)
    with options.naming(Config, ema_decay="--more-ema-decays or --ema-stds"):
        ema.check_decay(ema_decays(config))
    process = PROCESSES[config.process]()
    flows.check_ends(process, config.prediction, config.log_snr_low, config.log_snr_high)


def to_record(config: Config) -> dict[str, Any]:
    """Return the config as JSON holds it."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }


def from_record(record: Mapping[str, Any]) -> Config:
    """Return the resolved config of what `to_record` gave; `decay_steps` is a number then."""
    fields = {field.name for field in dataclasses.fields(Config)}
    unknown = record.keys() - fields  # what is missing came later: it has its default
    if unknown:
        raise Refusal(
            "This run was written by another version of the experiment: its config has "
            f"{', '.join(sorted(unknown))} too."
        )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    config = Config(**values)
    check(config)
    return dataclasses.replace(config, decay_steps=config.decay_steps or config.num_steps)


def pixels(x: Any, num_levels: int) -> np.ndarray:
    """Turn images in [-1, 1] into uint8 of 256 levels, for pictures."""
    return brightness(np.asarray(_to_levels(x, num_levels)), num_levels)


_to_levels = jax.jit(data.to_levels, static_argnums=1)


def brightness(levels: np.ndarray, num_levels: int) -> np.ndarray:
    """Spread levels 0..L-1 over the 256 of a picture, uint8."""
    return (levels.astype(np.int32) * 255 // (num_levels - 1)).astype(np.uint8)


class Model(NamedTuple):
    """What a config means.

    Attributes:
        init_params: makes the initial parameters; may be traced.
        apply: the pure network, given times.
        process: the forward process.
        prediction: what the network predicts.
        null_label: the label that stands for none; None where the network sees no labels.
    """

    init_params: Callable[[], PyTree]
    apply: Apply
    process: Process
    prediction: str
    null_label: int | None

    def denoiser(self, params: PyTree, labels: Array) -> Denoiser:
        """Return the denoiser of images of these labels, (B,)."""
        cond = None if self.null_label is None else labels

        def network(x_t: Array, t: Array) -> Array:
            return self.apply(params, x_t, t, cond)

        return denoisers.from_network(network, self.process, self.prediction)


def build_model(
    config: Config, images: data.Images | data.Description, process: Process | None = None
) -> Model:
    """Make the network and the process, unless one is given; refuse what they refuse."""

    def make() -> nnx.Module:
        given: dict[str, Any] = {
            "num_classes": images.num_classes,
            "dropout": config.dropout,
            "remat": config.remat,
            "dtype": jnp.dtype(config.dtype),
            "rngs": nnx.Rngs(config.seed),
        }
        if config.network == "unet":
            given |= {"channels": config.width, "num_blocks": config.depth}
            return nn.UNet(images.shape, **given)
        given |= {"width": config.width, "depth": config.depth, "patch_size": config.patch_size}
        return nn.DiT(images.shape, **given)

    sizes = {"channels": "--width", "num_heads": "--width", "num_blocks": "--depth"}
    with options.naming(Config, shape="--network", **sizes):
        init_params, apply = nn.deferred(make)
    process = PROCESSES[config.process]() if process is None else process
    return Model(
        init_params,
        nn.on_log_snr(apply, process.log_snr),
        process,
        config.prediction,
        images.num_classes,
    )


def build_loss(
    config: Config,
    model: Model,
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
            model.apply,
            model.process,
            prediction=config.prediction,
            loss_on=config.loss_on,
            weighting=WEIGHTINGS[config.weighting]() if weighting is None else weighting,
            times=draws[config.times](),
            drop_cond=0.0 if model.null_label is None else config.drop_cond,
            null_cond=model.null_label,
        )

    prepare = data.dequantized_images(num_levels, flip=config.flip)
    return data.prepared(denoising, prepare)


def make_generator(
    model: Model,
    shape: tuple[int, ...],
    sampler_name: str,
    num_steps: int,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[..., tuple[np.ndarray, np.ndarray | None]]:
    """Return a function that draws images of given labels, spread over devices.

    Returns:
        ``generate(params, key, labels (N,), keep_path=False, first=0)`` -> (x0 (N, H, W, C),
        path), the path being x_T and the states after each step, (T + 1, N, H, W, C), or None:
        unless asked for, and for the adaptive solver, whose steps differ by row. The images have
        the numbers `first`, `first` + 1, ...; image i depends on (params, key, i, label i) only.
    """
    process, method = model.process, METHODS[sampler_name]
    start = method.start(process, model.prediction)
    ts = timesteps.uniform(process, num_steps, t_start=start)

    def draw(
        shared: tuple[PyTree, Key], labels: Array, index: Array, *, keep_path: bool
    ) -> tuple[Array, Array | None]:
        params, key = shared
        key_start, key_path = jax.random.split(key)
        rows = jax.vmap(jax.random.fold_in, (None, 0))(key_start, index)
        x_T = process.prior_sample(rows, (len(index), *shape), t=start)  # noqa: N806
        if sampler_name == "adaptive":  # solves each row by itself, so with its own label

            def solve(x: Array, label: Array) -> Array:
                sampler = method.make(process, model.denoiser(params, label[None]))
                return sample(key_path, sampler, x[None], ts)[0]

            return jax.vmap(solve)(x_T, labels), None
        sampler = method.make(process, model.denoiser(params, labels))
        if not keep_path:
            return sample(key_path, sampler, x_T, ts, index=index), None
        x0, path = sample(key_path, sampler, x_T, ts, index=index, collect=sampler.value)
        return x0, jnp.moveaxis(jnp.concatenate([x_T[None], path]), 0, 1)

    count = len(jax.local_devices() if devices is None else devices)
    spread = {
        keep_path: parallel.map_rows(partial(draw, keep_path=keep_path), devices=devices)
        for keep_path in (False, True)
    }

    def generate(
        params: PyTree, key: Key, labels: np.ndarray, keep_path: bool = False, first: int = 0
    ) -> tuple[np.ndarray, np.ndarray | None]:
        keep_path = keep_path and sampler_name != "adaptive"
        index = first + np.arange(len(labels))
        size = count * CHUNK
        parts = [
            spread[keep_path]((params, key), labels[i : i + size], index[i : i + size])
            for i in range(0, len(labels), size)
        ]
        x0 = np.concatenate([part[0] for part in parts])
        if not keep_path:
            return x0, None
        return x0, np.moveaxis(np.concatenate([part[1] for part in parts]), 1, 0)

    return generate
