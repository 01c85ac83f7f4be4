"""Diffusion models in JAX: every number checked against an exact answer.

``import jaxdiff`` gives the core, which imports JAX and NumPy alone: processes, forward,
predictions, timesteps, weightings, mixtures, denoisers, guidance, losses, samplers, likelihood,
metrics. ``jaxdiff.generation`` is imported by name; so are ``jaxdiff.nn``, ``jaxdiff.data`` and
``jaxdiff.training``, which need the extra ``[train]``.
"""

from jaxdiff import (
    denoisers,
    forward,
    guidance,
    likelihood,
    losses,
    metrics,
    mixtures,
    numerics,
    predictions,
    processes,
    rows,
    samplers,
    timesteps,
    typing,
    weightings,
)
from jaxdiff.denoisers import Model
from jaxdiff.mixtures import Mixture
from jaxdiff.samplers import Sampler, sample

__version__ = "0.1.0"

__all__ = [
    "Mixture",
    "Model",
    "Sampler",
    "denoisers",
    "forward",
    "guidance",
    "likelihood",
    "losses",
    "metrics",
    "mixtures",
    "numerics",
    "predictions",
    "processes",
    "rows",
    "sample",
    "samplers",
    "timesteps",
    "typing",
    "weightings",
]
