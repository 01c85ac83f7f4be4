"""Ablations on real digits: likelihood, distances of samples, and what ends of schedules do."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import sampling
from experiments.ablations.training import Members
from experiments.ablations.world import Measure, Problem, World
from experiments.common import choices
from experiments.common.command import Refusal
from experiments.common.methods import MethodName
from experiments.images import model as image_model
from jaxdiff import data, guidance, likelihood, metrics, variational, weightings
from jaxdiff.data.pipeline import batch_indices
from jaxdiff.training import throughput
from jaxdiff.typing import Array, Batch, Denoiser, LossFn, PyTree

MEASURES = {
    "bits_per_dim": Measure("held-out bits per dimension"),
    "prior_nats": Measure("mismatch of x_T and the prior, nats"),
    "frechet": Measure("Fréchet distance of samples", sampled=True),
    "readable": Measure("samples read as their label", sampled=True, higher_is_better=True),
    "brightness_gap": Measure("error of the samples' mean level", sampled=True),
}


@dataclasses.dataclass(frozen=True)
class Config(image_model.Config, sampling.Swept):
    """A run of experiments.digits, with more to vary."""

    gamma: float = 5.0
    """Bound of the weight of min_snr."""
    sigma_data: float = 0.5
    """Scale of the data in the weighting of edm."""
    sampler: MethodName = "ddim"
    """Method that draws the samples."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is the conditional model."""
    num_samples: int = 300
    """Samples a run, of all labels alike."""


class Digits(NamedTuple):
    """The data: both splits, the held-out one as rows (N, D), and a classifier of the other."""

    train: data.Images
    held_out: data.Images
    real: np.ndarray
    reader: Any


@functools.cache
def load(name: str, data_dir: str | None, image_size: int | None) -> Digits:
    """Open a data set, once."""
    from sklearn.svm import SVC

    config = image_model.Config(data=name, data_dir=data_dir, image_size=image_size)
    train, held_out = (image_model.open_images(config, split) for split in ("train", "test"))
    if train.labels is None or not train.in_memory:
        raise Refusal(f"data {name} has no labels, or does not fit in memory; take another.")
    reader = SVC(gamma="scale").fit(_rows(train), train.labels)
    return Digits(train, held_out, _rows(held_out), reader)


def _rows(images: data.Images) -> np.ndarray:
    values = data.centers(jnp.asarray(images.levels), images.num_levels)
    return np.asarray(values, np.float32).reshape(len(images), -1)


def check(config: Config) -> None:
    """Refuse a config that cannot be meant."""
    image_model.check(config)
    sampling.check(config)
    for name in ("gamma", "sigma_data", "num_samples"):
        if not getattr(config, name) > 0:
            raise Refusal(f"{name} must be positive; got {getattr(config, name)}.")


def unread(config: Config) -> dict[str, str]:
    """Return why a run does not read a field, by field; see `World`."""
    found = sampling.unread(config)
    if config.weighting != "min_snr":
        found["gamma"] = f"weighting {config.weighting} has no gamma"
    if config.weighting != "edm":
        found["sigma_data"] = f"weighting {config.weighting} has no sigma_data"
    if config.network != "dit":
        found["patch_size"] = f"network {config.network} has no patches"
    return found


def make_weighting(config: Config) -> weightings.Weighting:
    """Make the weighting of a config, whose parameters may be traced."""
    if config.weighting == "min_snr":
        return weightings.min_snr(config.gamma)
    if config.weighting == "edm":
        return weightings.edm(config.sigma_data)
    return choices.WEIGHTINGS[config.weighting]()


def problem(config: Config) -> Problem:
    """Make the problem of a group."""
    digits = load(config.data, config.data_dir, config.image_size)
    train = digits.train
    levels, labels = jnp.asarray(train.levels), jnp.asarray(train.labels)
    compiled: dict[Any, Any] = {}

    def build(config: Config) -> image_model.Recipe:
        return image_model.build_model(config, train, sampling.make_process(config))

    def loss(config: Config) -> LossFn:
        model, weighting = build(config), make_weighting(config)
        return image_model.build_loss(config, model, train.num_levels, weighting)

    def table(config: Config) -> np.ndarray:
        return np.stack(
            [
                batch_indices(len(train), config.batch_size, config.seed, step).astype(np.int32)
                for step in range(config.num_steps)
            ]
        )

    def batch(config: Config, table: Array, step: Array) -> Batch:
        return {"image": levels[table[step]], "label": labels[table[step]]}

    def draw(how: Config, members: Members, params: PyTree) -> np.ndarray:
        def of_one(config: Any, params: PyTree) -> Array:
            config = dataclasses.replace(
                config,
                sampler=how.sampler,
                sample_steps=how.sample_steps,
                guidance_scale=how.guidance_scale,
            )
            model, key = build(config), jax.random.fold_in(config.seed, 2)
            denoise = guided(config, model, params, asked_labels(config, train))
            shape = (config.num_samples, *train.shape)
            return sampling.draw(config, model.process, denoise, key, shape)

        key = how.sampler, how.sample_steps, how.guidance_scale
        return np.asarray(members.map_once(compiled, key, of_one)(params))

    def measure(
        name: str, how: Config, members: Members, params: PyTree, samples: np.ndarray | None
    ) -> Sequence[float]:
        if name in ("bits_per_dim", "prior_nats"):
            of_one = {"bits_per_dim": bits_per_dim, "prior_nats": prior_nats}[name]
            mapped = members.map_once(
                compiled, name, lambda config, p: of_one(config, build(config), p, digits)
            )
            return np.asarray(mapped(params)).tolist()
        assert samples is not None
        rows = np.nan_to_num(samples.reshape(*samples.shape[:2], -1), posinf=1e6, neginf=-1e6)
        return [judge_samples(name, how, x, digits) for x in rows]

    def calls(how: Config) -> int:
        return sampling.calls(how) * (1 + (how.guidance_scale != 1.0))

    def call_flops() -> float | None:
        model = build(config)
        x = jax.ShapeDtypeStruct((64, *train.shape), jnp.float32)
        params = jax.eval_shape(model.init_params)
        of_64 = throughput.count_flops(
            lambda p, x: model.apply(p, x, jnp.float32(0.5), jnp.zeros(64, int)), params, x
        )
        return None if of_64 is None else of_64 / 64

    return Problem(
        lambda config: build(config).init_params(),
        loss,
        table,
        batch,
        measure,
        draw,
        calls,
        call_flops,
    )


def asked_labels(config: Config, images: data.Images) -> np.ndarray:
    """Return the labels of the samples, all alike."""
    return np.arange(config.num_samples) % (images.num_classes or 1)


def guided(
    config: Config, model: image_model.Recipe, params: PyTree, labels: np.ndarray
) -> Denoiser:
    """Return the denoiser of images of these labels, guided as the config says."""
    conditional = model.denoiser(params, jnp.asarray(labels))
    if config.guidance_scale == 1.0 or model.null_label is None:
        return conditional
    unconditional = model.denoiser(params, jnp.full(len(labels), model.null_label))
    return guidance.classifier_free(conditional, unconditional, config.guidance_scale)


# --- Measures -------------------------------------------------------------------------------


def bits_per_dim(config: Any, model: image_model.Recipe, params: PyTree, digits: Digits) -> Array:
    """Return held-out bits per dimension of image and class by the probability flow, one probe.

    Rows of all members have the same images; their dequantisation and probes go with the seed.
    """
    images, num = digits.held_out, min(config.eval_examples, len(digits.held_out))
    key_data, key_probes = jax.random.split(jax.random.fold_in(config.seed, 3))
    levels, labels = jnp.asarray(images.levels[:num]), jnp.asarray(images.labels)[:num]
    x = data.dequantize(key_data, levels, images.num_levels, dtype=jnp.float32)

    log_prob, _ = likelihood.log_prob(
        model.process,
        sampling.bounded(config, model.process, model.denoiser(params)),
        x,
        cond=model.cond(labels),
        key=key_probes,
        num_probes=1,
        rtol=config.eval_tolerance,
        atol=config.eval_tolerance,
        t_min=model.process.time_of_log_snr(jnp.float32(config.log_snr_high)),
    )
    log_prob -= math.log(images.num_classes or 1)
    bits = likelihood.bits_per_dim(log_prob, math.prod(images.shape), images.bin_width)
    return jnp.mean(bits)


def prior_nats(config: Any, model: image_model.Recipe, params: PyTree, digits: Digits) -> Array:
    """Return the mean over held-out images of KL(q(x_T | x_0), N(0, sigma_T^2 I)), in nats."""
    return jnp.mean(variational.prior_divergence(model.process, jnp.asarray(digits.real)))


def judge_samples(name: str, how: Config, x: np.ndarray, digits: Digits) -> float:
    """Return a measure of samples (N, D)."""
    x = np.clip(x, -3.0, 3.0)
    if name == "frechet":
        return metrics.frechet(x, digits.real)
    if name == "readable":
        return float((digits.reader.predict(x) == asked_labels(how, digits.train)).mean())
    return float(abs(x.mean(dtype=np.float64) - digits.real.mean(dtype=np.float64)))


WORLD = World(
    Config,
    sampling.NUMBERS | {"gamma", "sigma_data"},
    sampling.SAMPLING | {"guidance_scale"},
    MEASURES,
    check,
    problem,
    unread,
    {
        "loss": "images are trained by denoising alone: vary `prediction`, `loss_on`, `weighting`.",
        "target": "the data are `data`.",
    },
)
