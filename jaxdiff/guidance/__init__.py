r"""Guidance: from denoisers to a denoiser that samples something else.

In terms of the denoiser D = x0_hat, score = (alpha D - x_t) / variance, so adding a gradient g to
the score adds variance / alpha g to x0_hat. What is guided is a denoiser again, so guidance
composes: with itself, with samplers, with likelihoods.

**Two models.** A conditional and an unconditional denoiser are combined by a *rule* (conditional,
unconditional, scale) -> x0_hat: :func:`linear`, :func:`rescaled`, :func:`projected`.

**A gradient.** :func:`classifier` and :func:`dps` add that of a log-likelihood given x_t.
"""

from jaxdiff.guidance.gradients import classifier, dps
from jaxdiff.guidance.rules import Rule, linear, projected, rescaled
from jaxdiff.guidance.thresholds import dynamic_threshold
from jaxdiff.guidance.two_models import (
    autoguidance,
    classifier_free,
    classifier_free_batched,
    interval,
)

__all__ = [
    "Rule",
    "autoguidance",
    "classifier",
    "classifier_free",
    "classifier_free_batched",
    "dps",
    "dynamic_threshold",
    "interval",
    "linear",
    "projected",
    "rescaled",
]
