"""The digits that the families learn, and the measures that judge them all alike."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.families.config import Config
from experiments.families.networks import Family, Rows
from jaxdiff import data, likelihood, metrics
from jaxdiff.typing import Array, Key, PyTree

Row = dict[str, Any]


class Digits(NamedTuple):
    """The data: both splits, and their images dequantised once, as rows (N, D) and (M, D)."""

    train: data.Images
    held_out: data.Images
    x_train: np.ndarray
    x_held_out: np.ndarray


def load(key: Key) -> Digits:
    """Open the digits."""
    train, held_out = (data.load_images("digits", split) for split in ("train", "test"))
    x_train, x_held_out = (
        flat(data.dequantize(row_key, jnp.asarray(images.levels), images.num_levels))
        for row_key, images in zip(jax.random.split(key), (train, held_out), strict=True)
    )
    return Digits(train, held_out, x_train, x_held_out)


def flat(x: Any) -> np.ndarray:
    """Return images as rows (N, D)."""
    return np.asarray(x).reshape(len(x), -1)


def to_levels(x: Any, digits: Digits) -> np.ndarray:
    """Return the levels of samples in [-1, 1], those outside moved to the ends."""
    return np.asarray(data.to_levels(jnp.asarray(x), digits.train.num_levels))


def bits(log_probs: Mapping[str, Any], digits: Digits) -> Row:
    """Return bits per dimension and their standard errors by name, of nats (N,) by name."""
    row: Row = {}
    for name, log_prob in log_probs.items():
        values = np.asarray(
            likelihood.bits_per_dim(
                jnp.asarray(log_prob), digits.x_train.shape[1], digits.train.bin_width
            )
        )
        row[f"{name}_bits_per_dim"] = float(values.mean())
        row[f"{name}_stderr"] = float(values.std(ddof=1) / math.sqrt(len(values)))
    return row


def log_probs(
    config: Config, family: Family, params: PyTree, key: Key, x: np.ndarray
) -> dict[str, Array]:
    """Return what a family says of the likelihood of x (N, D), in nats (N,) by name."""
    key_exact, key_bound = jax.random.split(key)
    found = {}
    if family.log_prob is not None:
        found["exact"] = jax.jit(family.log_prob)(params, key_exact, x)
    if family.elbo is not None:
        found["elbo"] = repeat(family.elbo, config.elbo_draws)(params, key_bound, x).mean(0)
    if family.fine_elbo is not None:
        found["fine"] = repeat(family.fine_elbo, config.elbo_draws)(params, key_bound, x).mean(0)
    if family.log_weight is not None:
        weights = repeat(family.log_weight, config.weights)(params, key_bound, x)
        found |= {"elbo": weights.mean(0), "weighted": likelihood.importance_weighted(weights)}
    return found


def repeat(fn: Rows, num: int) -> Callable[[PyTree, Key, Any], Array]:
    """Return ``(params, key, x (B, D)) -> (num, B)``, compiled: fn with as many keys."""

    @jax.jit
    def evaluate(params: PyTree, key: Key, x: Array) -> Array:
        return jax.lax.map(lambda one: fn(params, one, x), jax.random.split(key, num))

    return evaluate


class Reader(NamedTuple):
    """A classifier of digits and what compares sets of images by its features.

    Attributes:
        features: levels (N, D) -> those of its hidden layer (N, F).
        real: those of the held-out images.
        accuracy: on the held-out images.
    """

    features: Callable[[Any], np.ndarray]
    real: np.ndarray
    accuracy: float

    def compare(self, levels: Any) -> Row:
        """Return the distances of images (N, D) from the held-out ones, by name."""
        found = self.features(levels)
        neighbours = min(5, len(found) - 1)
        return {
            "frechet": metrics.frechet(found, self.real),
            **metrics.precision_recall(self.real, found, k=neighbours)._asdict(),
        }


def make_reader(config: Config, digits: Digits) -> Reader:
    """Train the classifier, on the centres of the levels."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    def centers(levels: Any) -> np.ndarray:
        return flat(data.centers(jnp.asarray(levels), digits.train.num_levels))

    reader = MLPClassifier(
        (64,), alpha=0.1, max_iter=config.reader_iterations, random_state=config.seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        reader.fit(centers(digits.train.levels), digits.train.labels)

    def features(levels: Any) -> np.ndarray:
        return np.maximum(centers(levels) @ reader.coefs_[0] + reader.intercepts_[0], 0.0)

    accuracy = reader.score(centers(digits.held_out.levels), digits.held_out.labels)
    return Reader(features, features(digits.held_out.levels), float(accuracy))
