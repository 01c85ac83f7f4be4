"""Samplers: closures over (process, denoise), run by the one `lax.scan` of `sample`."""

from jaxdiff.samplers.ancestral import ancestral
from jaxdiff.samplers.ddim import ddim
from jaxdiff.samplers.protocol import Sampler, sample

__all__ = ["Sampler", "ancestral", "ddim", "sample"]
