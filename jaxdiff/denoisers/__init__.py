"""From a network to a denoiser (x_t, t) -> x0_hat, and from that to a score."""

from jaxdiff.denoisers.model import Model, as_model
from jaxdiff.denoisers.networks import (
    ConditionedDenoiser,
    NetworkDenoiser,
    conditioned,
    from_network,
)
from jaxdiff.denoisers.preconditioning import (
    PreconditionedDenoiser,
    edm_preconditioned,
    preconditioned,
)
from jaxdiff.denoisers.score import DenoiserScore, to_score

__all__ = [
    "ConditionedDenoiser",
    "DenoiserScore",
    "Model",
    "NetworkDenoiser",
    "PreconditionedDenoiser",
    "as_model",
    "conditioned",
    "edm_preconditioned",
    "from_network",
    "preconditioned",
    "to_score",
]
