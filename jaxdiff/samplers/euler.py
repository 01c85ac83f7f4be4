r"""Euler and Heun on the probability-flow ODE, Euler-Maruyama on the reverse SDE.

    dx / dt = alpha'(t) x0_hat + sigma'(t) eps_hat                                  (ODE, in t)
    dx      = (f x - g^2 score) dt + g dw_reverse,   score = (alpha x0_hat - x) / variance

The ODE is written with alpha' and sigma' rather than with f = alpha' / alpha, so that it is
finite where alpha = 0. A step from or to a time without noise, where sigma' may be infinite and
eps_hat is 0 / 0, follows the flow of constant x0_hat instead: to sigma = 0 it returns x0_hat.

Source: Song et al. 2021 (arXiv:2011.13456), eqs. 6 and 13; the ODE's form is the expectation of
Lipman et al. 2023 (arXiv:2210.02747), eq. 15.
"""

import jax
import jax.numpy as jnp

from jaxdiff import numerics
from jaxdiff.processes import Process
from jaxdiff.samplers.protocol import Sampler, follow_flow, solver, taken, traced_once
from jaxdiff.typing import Array, Denoiser, Key


def euler(process: Process, denoise: Denoiser) -> Sampler:
    """Make Euler's method on the probability-flow ODE: order 1 in t, one evaluation a step.

    Source: Song et al. 2021 (arXiv:2011.13456), eq. 13.
    """
    denoise = taken(process, denoise)

    def step(key: Key, x_t: Array, t: Array, s: Array) -> Array:
        x0_hat = denoise(x_t, t)
        moved = x_t + (s - t) * _velocity(process, x_t, x0_hat, t)
        return jnp.where(_has_noise(process, t, s), moved, follow_flow(process, x_t, x0_hat, t, s))

    return solver(process, denoise, step, deterministic=True)


def heun(process: Process, denoise: Denoiser) -> Sampler:
    """Make Heun's method on the probability-flow ODE: order 2 in t, two evaluations a step.

    The step to sigma = 0 returns x0_hat after one evaluation.

    Source: Song et al. 2021 (arXiv:2011.13456), eq. 13, by the trapezoidal rule.
    """
    denoise = taken(process, denoise)
    denoise_once = traced_once(denoise)

    def step(key: Key, x_t: Array, t: Array, s: Array) -> Array:
        x0_hat = denoise_once(x_t, t)

        def trapezoid() -> Array:
            slope = _velocity(process, x_t, x0_hat, t)
            x_s = x_t + (s - t) * slope
            slope_s = _velocity(process, x_s, denoise_once(x_s, s), s)
            return x_t + 0.5 * (s - t) * (slope + slope_s)

        return jax.lax.cond(twice(t, s), trapezoid, lambda: follow_flow(process, x_t, x0_hat, t, s))

    def twice(t: Array, s: Array) -> Array:
        return _has_noise(process, t, s) & (t != s)

    return solver(process, denoise, step, deterministic=True, calls=lambda t, s: 1 + twice(t, s))


def euler_maruyama(process: Process, denoise: Denoiser) -> Sampler:
    """Make the Euler-Maruyama method on the reverse SDE: weak order 1.

    An explicit method on a stiff equation: it needs steps short against 1 / g^2, a few hundred
    for `vp`, and is unstable below.

    Args:
        process: the forward process; f is infinite where alpha = 0, so start such a one
            (`flow`, `cosine`, zero terminal SNR) at t_start < t_max.
        denoise: the denoiser.

    Source: Song et al. 2021 (arXiv:2011.13456), eq. 6 and appendix E.
    """
    denoise = taken(process, denoise)

    def step(key: Key, x_t: Array, t: Array, s: Array) -> Array:
        x0_hat = denoise(x_t, t)
        noisy = _has_noise(process, t, s)
        variance = jnp.where(noisy, process.variance(t), 1.0)
        diffusion_sq = jnp.maximum(process.diffusion_sq(t), 0.0)
        score = (process.alpha(t) * x0_hat - x_t) / variance
        mean = x_t + (s - t) * (process.drift(t) * x_t - diffusion_sq * score)
        std = numerics.sqrt(diffusion_sq * (t - s))
        moved = mean + std * numerics.normal(key, x_t)
        return jnp.where(noisy, moved, x0_hat)

    return solver(process, denoise, step, divides_by_alpha="euler_maruyama")


def _velocity(process: Process, x_t: Array, x0_hat: Array, t: Array) -> Array:
    """Return alpha' x0_hat + sigma' eps_hat, with eps_hat = 0 where there is no noise."""
    sigma = process.sigma(t)
    eps_hat = (x_t - process.alpha(t) * x0_hat) / jnp.where(sigma > 0, sigma, 1.0)
    sigma_dot = jnp.where(sigma > 0, process.sigma_dot(t), 0.0)
    return process.alpha_dot(t) * x0_hat + sigma_dot * eps_hat


def _has_noise(process: Process, t: Array, s: Array) -> Array:
    return (process.sigma(t) > 0) & (process.sigma(s) > 0)
