r"""Forward processes: what noise does to data.

A process is the pair (alpha, variance) of the Gaussian marginals

    q(x_t | x_0) = N(alpha(t) x_0, variance(t) I),    sigma = sqrt(variance),

with t rising from data, t = 0, to noise, t = ``t_max``. Everything else follows. It is the
marginal of the linear SDE dx = f(t) x dt + g(t) dw with (Song et al. 2021, arXiv:2011.13456,
and Kingma et al. 2021, arXiv:2107.00630, eq. 15 ff.)

    f = d log alpha / dt,    g^2 = d variance / dt - 2 f variance,
    log_snr = log alpha^2 / variance,

so drift and diffusion cannot disagree with the marginal. Processes are frozen dataclasses
and pytrees, hyper-parameters being leaves: they may be traced, swept without compiling
anew, and trained. The factories below validate; values that are traced are taken on trust.

Two families differ in which primitive is smooth at t = 0. Where variance ~ t (`vp`, chains
of betas), sigma has an infinite slope there and variance is given; where sigma ~ t (`flow`,
`edm`, ...), differentiating sqrt(variance) would be 0/0 and sigma is given.
"""

from jaxdiff.processes.base import Process
from jaxdiff.processes.chain import Chain, ddpm, from_betas
from jaxdiff.processes.continuous import (
    EDM,
    VE,
    VP,
    Cosine,
    Flow,
    SubVP,
    cosine,
    edm,
    flow,
    sub_vp,
    ve,
    vp,
)
from jaxdiff.processes.until import Until, until

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Chain",
    "Cosine",
    "Flow",
    "Process",
    "SubVP",
    "Until",
    "cosine",
    "ddpm",
    "edm",
    "flow",
    "from_betas",
    "sub_vp",
    "until",
    "ve",
    "vp",
]
