"""Likelihoods: exact by the probability flow, bounds by the reverse chain, and of levels."""

from jaxdiff.likelihood.dequantization import (
    Dequantizer,
    dequantized,
    levels_log_prob,
    logistic_normal,
    uniform,
)
from jaxdiff.likelihood.elbo import Elbo, elbo, importance_weighted
from jaxdiff.likelihood.flow import NOISE_LEFT, bits_per_dim, default_t_min, log_prob

__all__ = [
    "NOISE_LEFT",
    "Dequantizer",
    "Elbo",
    "bits_per_dim",
    "default_t_min",
    "dequantized",
    "elbo",
    "importance_weighted",
    "levels_log_prob",
    "log_prob",
    "logistic_normal",
    "uniform",
]
