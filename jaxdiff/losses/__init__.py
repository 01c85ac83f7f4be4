"""Losses: each factory returns ``loss_fn(params, key, batch) -> (loss (B,), metrics)``."""

from jaxdiff.losses.autoencoding import autoencoding, discriminating
from jaxdiff.losses.denoising import denoising
from jaxdiff.losses.elbo import elbo
from jaxdiff.losses.flow_matching import flow_matching
from jaxdiff.losses.score_matching import explicit, finite_difference, implicit, sliced

__all__ = [
    "autoencoding",
    "denoising",
    "discriminating",
    "elbo",
    "explicit",
    "finite_difference",
    "flow_matching",
    "implicit",
    "sliced",
]
