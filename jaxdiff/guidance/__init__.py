r"""Guidance: from denoisers to a denoiser that leans towards a condition.

As x0_hat = (x_t + variance score) / alpha, a change of the score by g is one of x0_hat by
variance / alpha g. So all guidance is written as denoiser -> denoiser: it composes, and every
sampler takes the result. With c and u the estimates with and without the condition and w the
scale, Bayes' rule log p(y | x_t) = log p(x_t | y) - log p(x_t) + const makes

    u + w (c - u)                                            `classifier_free`, rule `linear`
    u + w variance / alpha grad log p(y | x_t)               `classifier`

the same where all models are exact. w = 1 is the conditional distribution itself.

Guided denoisers compute in float32 at least and return the dtype of x_t. When called they raise
ValueError if a denoiser does not return the shape of x_t, or `scale` is neither () nor (B,).
"""

from jaxdiff.guidance.differences import (
    autoguidance,
    classifier_free,
    classifier_free_batched,
    dynamic_threshold,
    interval,
)
from jaxdiff.guidance.gradients import classifier, dps
from jaxdiff.guidance.rules import Rule, linear, projected, rescaled

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
