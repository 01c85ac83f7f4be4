r"""DDIM: the family from the deterministic probability flow to the ancestral chain.

    x_s = alpha_s x0_hat + sqrt(variance_s - std^2) eps_hat + std z,
    std^2 = eta^2 variance_s (1 - SNR_t / SNR_s),

with eta = 1 the posterior of the forward chain, so ancestral sampling, and eta = 0 a solver of
order 1 of the probability-flow ODE, exact where x0_hat does not change along the step.
"""

from typing import Any

import jax.numpy as jnp

from jaxdiff import forward, numerics
from jaxdiff.processes import Process
from jaxdiff.samplers.protocol import Sampler, check_start
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
    known = numerics.concrete(eta)
    if known is not None and not 0.0 <= known <= 1.0:
        raise ValueError(f"`eta` must lie in [0, 1]; got {eta}.")
    deterministic = known is not None and known == 0.0

    def step(key: Key, x_t: Array, t: Array, s: Array) -> Array:
        x0_hat = denoise(x_t, t)
        sigma_s, sigma_t = process.sigma(s), process.sigma(t)
        if deterministic:
            kept = sigma_s
        else:
            _, added = forward.step_coefficients(process, s, t)
            share = eta**2 * added / jnp.where(sigma_t > 0, sigma_t, 1.0) ** 2
            kept = sigma_s * numerics.sqrt(1.0 - share)
        noise_left = jnp.where(sigma_t > 0, kept / jnp.where(sigma_t > 0, sigma_t, 1.0), 1.0)
        x_s = noise_left * x_t + (process.alpha(s) - process.alpha(t) * noise_left) * x0_hat
        if deterministic:
            return x_s
        return x_s + sigma_s * numerics.sqrt(share) * numerics.normal(key, x_t)

    return Sampler(init=lambda x_T: x_T, step=step, check=check_start(process, denoise))
