"""Ablations on real digits: likelihood, distances of samples, and what ends of schedules do."""

import dataclasses
import functools
import math
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import sampling
from experiments.ablations.fields import replaced
from experiments.ablations.world import SEED, Measure, World, member_of
from experiments.ablations.world import Member as MemberOf
from experiments.common import choices
from experiments.common.command import Refusal
from experiments.common.methods import MethodName
from experiments.common.options import Role
from experiments.images import judging
from experiments.images import model as image_model
from experiments.images import network as image_network
from experiments.images.sources import FOLDER
from jaxdiff import data, guidance, likelihood, metrics, variational, weightings
from jaxdiff.data.pipeline import batch_indices
from jaxdiff.typing import Array, Batch, Denoiser, LossFn, PyTree


@dataclasses.dataclass(frozen=True)
class Config(image_model.Config, sampling.Swept):
    """A run of experiments.digits, with more to vary."""

    gamma: Annotated[float, Role.NUMBER] = 5.0
    """Bound of the weight of min_snr."""
    sigma_data: Annotated[float, Role.NUMBER] = 0.5
    """Scale of the data in the weighting of edm."""
    sampler: Annotated[MethodName, Role.SAMPLING] = "ddim"
    """Method that draws the samples."""
    guidance_scale: Annotated[float, Role.SAMPLING] = 1.0
    """Classifier-free guidance; 1 is the conditional model."""
    num_samples: int = 300
    """Samples a run, of all labels alike."""


Member = MemberOf[Config]


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
    others = {name for names in image_network.CHOICES.values() for name in names}
    for name in others - {*image_network.CHOICES[config.network]}:
        found[name] = f"network {config.network} has no {name}"
    if config.data == FOLDER:
        del found["data_dir"]
    elif config.data == "digits":
        found["image_size"] = "data digits are taken as they are"
    found["num_samples"] = "no measure asked for is of samples"
    return found


def meant(config: Config) -> Config:
    """Return a config with values in place of each None that stands for one; see `World`."""
    return replaced(sampling.meant(config), image_network.choices_of(config))


def make_weighting(member: Member) -> weightings.Weighting:
    """Make the weighting of a member, whose parameters may be traced."""
    if member.config.weighting == "min_snr":
        return weightings.min_snr(member.numbers["gamma"])
    if member.config.weighting == "edm":
        return weightings.edm(member.numbers["sigma_data"])
    return choices.WEIGHTINGS[member.config.weighting]()


class ImagesProblem:
    """What the members of a group share; a `Problem`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.digits = load(config.data, config.data_dir, config.image_size)
        train = self.digits.train
        self._levels, self._labels = jnp.asarray(train.levels), jnp.asarray(train.labels)

    def build(self, member: Member) -> image_model.Recipe:
        """Make a member's network and process."""
        process = sampling.make_process(member)
        return image_model.build_model(member.config, self.digits.train, process, member.key)

    def init_params(self, member: Member) -> PyTree:
        """Return a member's initial parameters."""
        return self.build(member).init_params()

    def loss(self, member: Member) -> LossFn:
        """Return a member's loss."""
        model, weighting = self.build(member), make_weighting(member)
        num_levels = self.digits.train.num_levels
        return image_model.build_loss(member.config, model, num_levels, weighting)

    def table(self, config: Config) -> np.ndarray:
        """Return which images each batch holds, (steps, B)."""
        num = len(self.digits.train)
        return np.stack(
            [
                batch_indices(num, config.batch_size, config.seed, step).astype(np.int32)
                for step in range(config.num_steps)
            ]
        )

    def batch(self, member: Member, table: Array, step: Array) -> Batch:
        """Return the batch of a step."""
        return {"image": self._levels[table[step]], "label": self._labels[table[step]]}

    def draw(self, member: Member, params: PyTree) -> Array:
        """Return samples (N, H, W, C), drawn as the member's config says."""
        config, train = member.config, self.digits.train
        model, key = self.build(member), jax.random.fold_in(member.key, 2)
        denoise = guided(config, model, params, asked_labels(config, train))
        shape = (config.num_samples, *train.shape)
        return sampling.draw(config, model.process, denoise, key, shape, config.sample_grid)

    def calls(self, config: Config) -> int:
        """Return the evaluations of the network that a sample takes."""
        return sampling.calls(config) * (1 + (config.guidance_scale != 1.0))

    def call_flops(self) -> float | None:
        """Return the operations of one evaluation for one sample, None where unknown."""
        model = self.build(member_of(self.config, {SEED: np.uint32(self.config.seed)}))
        return sampling.call_flops(model, (64, *self.digits.train.shape), np.zeros(64, np.int32))


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


def bits_per_dim(problem: ImagesProblem, member: Member, params: PyTree) -> Array:
    """Return held-out bits per dimension of image and class by the probability flow, one probe.

    Rows of all members have the same images; their dequantisation and probes go with the seed.
    """
    config, model, images = member.config, problem.build(member), problem.digits.held_out
    num = min(judging.num_examples(config, images), len(images))
    key_data, key_probes = jax.random.split(jax.random.fold_in(member.key, 3))
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


def prior_nats(problem: ImagesProblem, member: Member, params: PyTree) -> Array:
    """Return the mean over held-out images of KL(q(x_T | x_0), N(0, sigma_T^2 I)), in nats."""
    process = sampling.make_process(member)
    return jnp.mean(variational.prior_divergence(process, jnp.asarray(problem.digits.real)))


def frechet(problem: ImagesProblem, config: Config, seed: int, samples: np.ndarray) -> float:
    """Return the Fréchet distance of samples (N, H, W, C) and the held-out images."""
    return metrics.frechet(as_rows(samples), problem.digits.real)


def readable(problem: ImagesProblem, config: Config, seed: int, samples: np.ndarray) -> float:
    """Return the share of samples that a classifier reads as the label that was asked for."""
    read = problem.digits.reader.predict(as_rows(samples))
    return float((read == asked_labels(config, problem.digits.train)).mean())


def brightness_gap(problem: ImagesProblem, config: Config, seed: int, samples: np.ndarray) -> float:
    """Return how far the mean level of samples is from that of the held-out images."""
    real = problem.digits.real
    return float(abs(as_rows(samples).mean(dtype=np.float64) - real.mean(dtype=np.float64)))


def as_rows(samples: np.ndarray) -> np.ndarray:
    """Return samples (N, H, W, C) as rows (N, D) that a diverged run leaves finite too."""
    rows = np.nan_to_num(samples.reshape(len(samples), -1), posinf=1e6, neginf=-1e6)
    return np.clip(rows, -3.0, 3.0)


SAMPLES = frozenset(("num_samples",))
"""What measures of samples read besides the sampling fields."""
MEASURES = {
    "bits_per_dim": Measure(
        "held-out bits per dimension", of_model=bits_per_dim, reads=sampling.LIKELIHOOD
    ),
    "prior_nats": Measure("mismatch of x_T and the prior, nats", of_model=prior_nats),
    "frechet": Measure("Fréchet distance of samples", of_samples=frechet, reads=SAMPLES),
    "readable": Measure(
        "samples read as their label", of_samples=readable, reads=SAMPLES, higher_is_better=True
    ),
    "brightness_gap": Measure(
        "error of the samples' mean level", of_samples=brightness_gap, reads=SAMPLES
    ),
}
NOTES = {
    "loss": "images are trained by denoising alone: vary `prediction`, `loss_on`, `weighting`.",
    "target": "the data are `data`.",
}
WORLD = World(Config, MEASURES, check, ImagesProblem, unread, meant, NOTES)
