"""The likelihood of images under a trained model, and under Gaussian mixtures, in bits."""

import dataclasses
import math
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import flows
from experiments.common.options import CountOrNone, Within
from experiments.images.model import Config, Recipe
from jaxdiff import data, likelihood, numerics
from jaxdiff.training import distributed
from jaxdiff.typing import Array, Key, PyTree

CHUNK_NUMBERS = 2**17
"""Numbers (images times pixels) whose likelihood is solved for at once."""
EVAL_IMAGES, EVAL_NUMBERS, EVAL_LEAST = 297, 2**15, 8
"""Images at most whose likelihood is taken unless told otherwise, numbers in them, and images at
least."""
MIXTURE_IMAGES, MIXTURE_NUMBERS = 5000, 2**24
"""Training images at most that a mixture is fitted to, and numbers in them."""
MIXTURE_DIMS = 2**14
"""Dimensions at most of any mixture: there would be fewer images than 1,024 to fit one to."""
FULL_DIMS = 128
"""Dimensions at most of mixtures of full covariance; beyond, covariances are diagonal."""


@dataclasses.dataclass(frozen=True)
class Judging:
    """How a run is judged; what is not given is as at its training."""

    eval_split: str | None = None
    """The split that judges, such as validation."""
    eval_examples: Annotated[int | None, Within(2)] = None
    """Images of each split that the likelihood is taken of."""
    eval_tolerance: Annotated[float | None, Within(1e-6, 1.0)] = None
    """Relative and absolute tolerance of the likelihood's ODE."""
    mixture_components: Annotated[tuple[int, ...] | None, Within(1, 256)] = None
    """Numbers of components that the Gaussian mixture is fitted with; none leaves it out."""
    sample_steps: CountOrNone = None
    """Steps of the DDIM samples in the report."""
    data_dir: str | None = None
    """Where data sets lie now, or the folder of images."""

    def of(self, config: Config) -> Config:
        """Return the config of a run with what is given here."""
        given = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value is not None and name != "eval_split"
        }
        return dataclasses.replace(config, **given)


def num_examples(config: Config, images: data.Images) -> int:
    """Return of how many images of such a split the likelihood is taken, if there are so many."""
    if config.eval_examples is not None:
        return config.eval_examples
    return max(EVAL_LEAST, min(EVAL_IMAGES, EVAL_NUMBERS // math.prod(images.shape)))


class Judged(NamedTuple):
    """What is known of a model.

    Attributes:
        results: figures of merit by name.
        mixture: what the mixture is, for readers.
        notes: sentences on what could not be computed.
    """

    results: dict[str, float]
    mixture: str
    notes: list[str]


def judge(
    config: Config,
    model: Recipe,
    params: PyTree,
    key: Key,
    train: data.Images,
    test: data.Images,
    *,
    exact: bool,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> Judged:
    """Return bits per dimension of the model and of the best Gaussian mixture, by name.

    The model's are those of an image and its class: log p(x | y) + log(1 / K), which bounds
    log p(x) from below, so that they can stand beside a mixture that knows no class.
    """
    key_test, key_train, key_probes, key_mixture = jax.random.split(key, 4)
    count = min(num_examples(config, test), len(test), len(train))
    x_test, labels_test = first_rows(key_test, test, count)
    x_train, labels_train = first_rows(key_train, train, count)
    results: dict[str, float] = {}
    notes: list[str] = []

    def take(
        names: Sequence[str], what: str, bits_of: Any, x: np.ndarray, labels: np.ndarray
    ) -> None:
        say(f"The likelihood of {len(x)} {what} images", progress)
        try:
            found = bits_of(params, key_probes, x, labels)
        except flows.Unsolved as reason:
            notes.append(f"The likelihood of the {what} images is not known: {reason}.")
            return
        values = float(found.mean()), float(found.std(ddof=1) / math.sqrt(len(x)))
        if not np.isfinite(found).all():
            bad = int((~np.isfinite(found)).sum())
            notes.append(f"The likelihood of {bad} of the {len(x)} {what} images is not finite.")
        results.update(zip(names, values, strict=False))

    held_out = ("held_out_bits_per_dim", "held_out_bits_per_dim_stderr")
    bits_of = make_bits_of(config, model, test, devices=devices)
    take(held_out, "held-out", bits_of, x_test, labels_test)
    take(("train_bits_per_dim",), "training", bits_of, x_train, labels_train)
    if exact:
        exact_bits_of = make_bits_of(config, model, test, exact=True, devices=devices)
        take(("held_out_bits_per_dim_exact",), "held-out", exact_bits_of, x_test, labels_test)
    if not distributed.is_main():
        return Judged(results, "", notes)
    seed = int(jax.random.bits(key_mixture, dtype=jnp.uint16))
    best, mixture = judge_mixture(config, key_train, train, x_test, seed, notes, progress)
    return Judged(results | best, mixture, notes)


def judge_mixture(
    config: Config,
    key: Key,
    train: data.Images,
    x_test: np.ndarray,
    seed: int,
    notes: list[str],
    progress: bool,
) -> tuple[dict[str, float], str]:
    """Return the results of the best Gaussian mixture, if there is one, and what it is.

    Args:
        config: says with how many components it is fitted.
        key: dequantises the training images.
        train: the images to fit to.
        x_test: the images that judge, (N, H, W, C).
        seed: of which images, and of EM.
        notes: grows by what could not be done.
        progress: say on stderr what takes its time.
    """
    dims = math.prod(train.shape)
    if dims > MIXTURE_DIMS:
        notes.append(f"No mixture was fitted: images of {dims} numbers are too many for EM.")
        return {}, ""
    x_fit, said = mixture_rows(key, train, seed)
    fitting = [size for size in config.mixture_components if size <= len(x_fit)]
    if len(fitting) < len(config.mixture_components):
        notes.append(f"Mixtures of more components than the {len(x_fit)} images were not fitted.")
    if not fitting:
        notes.append("No mixture was fitted: none was asked for that can be.")
        return {}, ""
    say(f"Gaussian mixtures of {', '.join(map(str, fitting))} components", progress)
    by_components = mixture_bits(x_fit, x_test, tuple(fitting), train.bin_width, seed)
    if len(by_components) < len(fitting):
        notes.append("EM failed for some sizes of the mixture: a component collapsed.")
    if not by_components:
        return {}, ""
    best = min(by_components, key=by_components.__getitem__)
    results = {"mixture_bits_per_dim": by_components[best], "mixture_components": best}
    shape = "full" if is_full(x_test) else "diagonal"
    return results, f"{best} components, {shape} covariance{said}"


def say(text: str, progress: bool) -> None:
    """Say on stderr what takes its time."""
    if progress and distributed.is_main():
        print(f"{text} ...", file=sys.stderr, flush=True)


def make_bits_of(
    config: Config,
    model: Recipe,
    images: data.Images,
    *,
    exact: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Any:
    """Return ``bits_of(params, key, x (N, H, W, C), labels (N,)) -> (N,)`` bits per dimension.

    It raises `flows.Unsolved`, in every process, where the solver does not come to an end.
    """
    num_dims = int(np.prod(images.shape))
    process = flows.until_start(model.process, model.prediction)

    def of_chunk(params: PyTree, keys: Key, x: Array, labels: Array) -> Array:
        log_prob, _ = likelihood.log_prob(
            process,
            model.denoiser(params),
            x,
            cond=model.cond(labels),
            key=None if exact else keys,
            num_probes=None if exact else 1,
            rtol=config.eval_tolerance,
            atol=config.eval_tolerance,
            t_min=flows.data_end(process, jnp.float32(config.log_snr_high)),
        )
        log_prob -= math.log(images.num_classes or 1)
        return likelihood.bits_per_dim(log_prob, num_dims, images.bin_width)

    at_once = 16 if exact else max(CHUNK_NUMBERS // num_dims, 1)
    solve = flows.solve_by_row(of_chunk, at_once, devices=devices)

    def bits_of(params: PyTree, key: Key, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return solve(params, numerics.row_keys(key, len(x)), x, labels)

    return bits_of


# --- Mixtures -------------------------------------------------------------------------------


def mixture_bits(
    x_train: np.ndarray,
    x_test: np.ndarray,
    components: tuple[int, ...],
    bin_width: float,
    seed: int,
) -> dict[int, float]:
    """Fit Gaussian mixtures by EM; return held-out bits by their size, of those that can be."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    flat_train, flat_test = (x.reshape(len(x), -1).astype(np.float64) for x in (x_train, x_test))
    shape = "full" if is_full(x_test) else "diag"
    results: dict[int, float] = {}
    for num_components in components:
        fitted = GaussianMixture(
            num_components, covariance_type=shape, reg_covar=1e-3, random_state=seed
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # its bits are as found
                fitted.fit(flat_train)
        except ValueError as error:
            if "covariance" not in str(error):
                raise
            continue  # a component collapsed
        log_prob = jnp.asarray(fitted.score_samples(flat_test))
        bits = float(np.mean(likelihood.bits_per_dim(log_prob, flat_test.shape[1], bin_width)))
        results |= {num_components: bits} if math.isfinite(bits) else {}
    return results


def is_full(x: np.ndarray) -> bool:
    """Tell whether mixtures of such images (N, H, W, C) have full covariances."""
    return int(np.prod(x.shape[1:])) <= FULL_DIMS


def mixture_rows(key: Key, images: data.Images, seed: int) -> tuple[np.ndarray, str]:
    """Return the images that a mixture is fitted to, dequantised, and what they are if not all."""
    most = max(1, min(MIXTURE_IMAGES, MIXTURE_NUMBERS // math.prod(images.shape)))
    if len(images) <= most:
        return first_rows(key, images, len(images))[0], ""
    rows = np.random.default_rng(seed).choice(len(images), most, replace=False)
    levels = images.rows(np.sort(rows))["image"]
    return dequantized(key, levels, images), f", {most} random images"


def first_rows(key: Key, images: data.Images, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first images, dequantised, and their labels: 0 where there are none."""
    found = images.rows(np.arange(count))
    labels = found.get("label", np.zeros(count, np.int32))
    return dequantized(key, found["image"], images), labels


def dequantized(key: Key, levels: np.ndarray, images: data.Images) -> np.ndarray:
    """Return levels (N, H, W, C) in [-1, 1]; row i has the same noise however many there are."""
    draw = jax.jit(data.dequantize, static_argnums=2, static_argnames="dtype")
    return np.asarray(draw(key, levels, images.num_levels, dtype=jnp.float32))
