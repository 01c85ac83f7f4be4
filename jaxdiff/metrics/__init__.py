"""Distances between two sets of samples, each an array (N, ...) that is read as N rows.

Each returns floats, computed in pieces: no matrix of all pairs is ever held. `c2st` and
`precision_recall` need scikit-learn, of the extra ``[train]``, and import it when called.
`psnr` and `ssim` are of pairs of pictures, and return one number a pair.
"""

from jaxdiff.metrics.c2st import TwoSampleTest, c2st
from jaxdiff.metrics.frechet import Moments, frechet, frechet_of_moments, merge, moments
from jaxdiff.metrics.mmd import mmd
from jaxdiff.metrics.pictures import psnr, ssim
from jaxdiff.metrics.precision_recall import PrecisionRecall, precision_recall
from jaxdiff.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = [
    "Moments",
    "PrecisionRecall",
    "TwoSampleTest",
    "c2st",
    "frechet",
    "frechet_of_moments",
    "merge",
    "mmd",
    "moments",
    "precision_recall",
    "psnr",
    "sliced_wasserstein",
    "ssim",
]
