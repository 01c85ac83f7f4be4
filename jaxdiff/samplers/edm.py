r"""The sampler of EDM: Heun's method in the noise level sigma / alpha, with churn.

With y = x / alpha and the noise level as time the probability flow is

    dy / dsigma = (y - x0_hat) / sigma

for every process; churn first raises the noise level by a factor 1 + gamma.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import checks, numerics
from jaxdiff.processes import Process
from jaxdiff.samplers.protocol import Sampler, solver, taken, traced_once
from jaxdiff.typing import Array, Denoiser, Key


def edm(
    process: Process,
    denoise: Denoiser,
    churn: Any = 0.0,
    s_tmin: Any = 0.0,
    s_tmax: Any = math.inf,
    s_noise: Any = 1.0,
) -> Sampler:
    """Make EDM's sampler: order 2, two evaluations a step and one on the step to sigma = 0.

    Args:
        process: the forward process; x / alpha is infinite where alpha = 0, so start such a one
            (`flow`, `cosine`, zero terminal SNR) at t_start < t_max.
        denoise: the denoiser.
        churn: the rate gamma of one step, at most sqrt(2) - 1 of which is used: the paper's
            S_churn / N. 0, as a Python number, draws no noise at all (algorithm 1).
        s_tmin: the lowest noise level sigma / alpha that is churned.
        s_tmax: the highest one.
        s_noise: standard deviation of the churned noise, relative to what the level asks for.

    Raises:
        ValueError: if an option is known and negative or NaN, or s_tmin > s_tmax.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithms 1 and 2.
    """
    options = {"churn": churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    known = {
        name: numerics.concrete(checks.number(name, value, 0.0, infinite=name == "s_tmax"))
        for name, value in options.items()
    }
    low, high = known["s_tmin"], known["s_tmax"]
    if low is not None and high is not None and low > high:
        raise ValueError(f"`s_tmin` must be at most `s_tmax`; got {s_tmin} > {s_tmax}.")
    deterministic = known["churn"] is not None and known["churn"] == 0.0
    denoise = taken(process, denoise)
    denoise_once = traced_once(denoise)

    def level(t: Array) -> Array:
        return process.sigma(t) / process.alpha(t)

    def churned(key: Key, y: Array, t: Array) -> tuple[Array, Array, Array]:
        """Raise the noise level; return y, its level and its time."""
        before = level(t)
        inside = (before >= s_tmin) & (before <= s_tmax)
        gamma = jnp.where(inside, jnp.minimum(churn, math.sqrt(2.0) - 1.0), 0.0)
        after = before * (1.0 + gamma)
        std = s_noise * before * numerics.sqrt(gamma * (2.0 + gamma))
        noisy = jnp.where(after > 0, after, 1.0)
        t_after = jnp.where(gamma > 0, process.time_of_log_snr(-2.0 * jnp.log(noisy)), t)
        return y + std * numerics.normal(key, y), after, t_after

    def twice(t: Array, s: Array) -> Array:
        return (level(s) > 0) & (level(t) > 0) & (t != s)

    def step(key: Key, x_t: Array, t: Array, s: Array) -> Array:
        trapezoidal = twice(t, s)
        y, level_t, alpha_t = x_t / process.alpha(t), level(t), process.alpha(t)
        if not deterministic:
            y, level_t, t = churned(key, y, t)
            alpha_t = process.alpha(t)
        x0_hat = denoise_once(alpha_t * y, t)
        level_s, alpha_s = level(s), process.alpha(s)
        slope = (y - x0_hat) / jnp.where(level_t > 0, level_t, jnp.inf)

        def trapezoid() -> Array:
            y_s = y + (level_s - level_t) * slope
            slope_s = (y_s - denoise_once(alpha_s * y_s, s)) / level_s
            return y + 0.5 * (level_s - level_t) * (slope + slope_s)

        def last() -> Array:
            return jnp.where(level_t > 0, x0_hat, y)

        return alpha_s * jax.lax.cond(trapezoidal, trapezoid, last)

    return solver(
        process,
        denoise,
        step,
        deterministic=deterministic,
        divides_by_alpha="edm",
        calls=lambda t, s: 1 + twice(t, s),
    )
