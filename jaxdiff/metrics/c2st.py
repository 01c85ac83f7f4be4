"""Classifier two-sample test: how well a classifier tells apart samples that it never saw."""

import math
import warnings
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jaxdiff.metrics.rows import as_pair, whole

MIN_ROWS = 20
"""Rows a set needs: of fewer, nothing is left to stop the classifier early on."""


class TwoSampleTest(NamedTuple):
    """Accuracy of the classifier on held-out samples.

    Attributes:
        accuracy: 0.5 where the sets cannot be told apart, at most that of the Bayes classifier
            but for noise.
        stderr: binomial, of the held-out samples; it leaves out what another seed changes in
            training.
    """

    accuracy: float
    stderr: float


def c2st(x: ArrayLike, y: ArrayLike, *, seed: int = 0, num_folds: int = 5) -> TwoSampleTest:
    """Measure how well a small network tells two sets of samples apart.

    A perceptron of two hidden layers of min(10 D, 128) units, on standardised inputs, stopped
    early by a tenth of its training samples or after 100 epochs, is trained on all folds but
    one and scored on that one, each in turn. A network that small does not see what takes a
    better one, in images for example: 0.5 says that *it* finds no difference.

    Args:
        x: samples, (N, ...).
        y: samples, (M, ...); of the larger set, a random min(N, M) samples are used. A row
            that is in both sets draws accuracy below 0.5.
        seed: of the choice of samples, the folds and the training.
        num_folds: at least 2.

    Raises:
        ValueError: if the sets are not rows of the same length, are short of
            :data:`MIN_ROWS` rows or are not finite, or `num_folds` is out of range.

    Source: Lopez-Paz & Oquab 2017 (arXiv:1610.06545), which splits once; here every sample is
    held out once.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = as_pair(x, y, at_least=MIN_ROWS)
    num = min(len(x), len(y))
    num_folds = whole(num_folds, "num_folds", 2, num)
    generator = np.random.default_rng(seed)
    x, y = (rows[generator.permutation(len(rows))[:num]] for rows in (x, y))
    samples, labels = np.concatenate([x, y]), np.repeat([0, 1], num)

    width = min(10 * samples.shape[1], 128)
    network = MLPClassifier(
        (width, width),
        early_stopping=True,
        n_iter_no_change=20,  # half of it gave up on patterns that are slow to be learned
        max_iter=100,
        random_state=seed,
    )
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        guesses = cross_val_predict(
            make_pipeline(StandardScaler(), network), samples, labels, cv=folds
        )
    accuracy = float((guesses == labels).mean())
    return TwoSampleTest(accuracy, math.sqrt(accuracy * (1.0 - accuracy) / len(labels)))
