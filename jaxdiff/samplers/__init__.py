"""Samplers: closures over (process, denoise), run by the one `lax.scan` of `sample`."""

from jaxdiff.samplers.adaptive import adaptive
from jaxdiff.samplers.ancestral import ancestral
from jaxdiff.samplers.ddim import ddim
from jaxdiff.samplers.deis import deis
from jaxdiff.samplers.dpm import dpm_solver_pp, dpm_solver_pp_sde
from jaxdiff.samplers.editing import inpainting, sdedit
from jaxdiff.samplers.edm import edm
from jaxdiff.samplers.euler import euler, euler_maruyama, heun
from jaxdiff.samplers.langevin import langevin, predictor_corrector
from jaxdiff.samplers.protocol import Sampler, count_calls, encode, sample
from jaxdiff.samplers.unipc import unipc

__all__ = [
    "Sampler",
    "adaptive",
    "ancestral",
    "count_calls",
    "ddim",
    "deis",
    "dpm_solver_pp",
    "dpm_solver_pp_sde",
    "edm",
    "encode",
    "euler",
    "euler_maruyama",
    "heun",
    "inpainting",
    "langevin",
    "predictor_corrector",
    "sample",
    "sdedit",
    "unipc",
]
