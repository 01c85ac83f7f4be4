r"""DDIM: the family from the deterministic probability flow to the ancestral chain.

    x_s = alpha_s x0_hat + sqrt(variance_s - std^2) eps_hat + std z,
    std^2 = eta^2 variance_s (1 - SNR_t / SNR_s),

with eta = 1 the posterior of the forward chain, so ancestral sampling, and eta = 0 a solver of
order 1 of the probability-flow ODE, exact where x0_hat does not change along the step.
"""

from typing import Any

import jax.numpy as jnp

from jaxdiff import checks, forward, numerics
from jaxdiff.processes import Process
from jaxdiff.samplers.protocol import Sampler, follow_flow, solver, taken
from jaxdiff.typing import Array, Denoiser, Key


def ddim(process: Process, denoise: Denoiser, eta: Any = 0.0) -> Sampler:
    """Make the DDIM sampler.

    Args:
        process: the forward process.
        denoise: the denoiser.
        eta: in [0, 1]; may be traced. 0, as a Python number, draws no noise at all.

    Raises:
        ValueError: if `eta` is known and outside [0, 1].

    Source: Song et al. 2021 (arXiv:2010.02502), eqs. 12 and 16.
    """
    denoise = taken(process, denoise)
    known = numerics.concrete(checks.number("eta", eta, 0.0, 1.0))

    def flow_step(key: Key, x_t: Array, t: Array, s: Array) -> Array:
        return follow_flow(process, x_t, denoise(x_t, t), t, s)

    def step(key: Key, x_t: Array, t: Array, s: Array) -> Array:
        x0_hat = denoise(x_t, t)
        sigma_s, sigma_t = process.sigma(s), process.sigma(t)
        divisor = jnp.where(sigma_t > 0, sigma_t, 1.0)
        _, added = forward.step_coefficients(process, s, t)
        share = eta**2 * added / divisor**2
        kept = sigma_s * numerics.sqrt(1.0 - share) / divisor
        x_s = kept * x_t + (process.alpha(s) - process.alpha(t) * kept) * x0_hat
        return x_s + sigma_s * numerics.sqrt(share) * numerics.normal(key, x_t)

    if known is not None and known == 0.0:
        return solver(process, denoise, flow_step, deterministic=True)
    return solver(process, denoise, step)
