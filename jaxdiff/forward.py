r"""The Gaussians of the forward process: marginal, transition, posterior.

With alpha, sigma at times s < t, and writing a = alpha_t / alpha_s,

    q(x_t | x_0)      = N(alpha_t x_0, variance_t I)
    q(x_t | x_s)      = N(a x_s, v I),                        v = variance_t - a^2 variance_s
    q(x_s | x_t, x_0) = N((a variance_s x_t + alpha_s v x_0) / variance_t,
                          variance_s v / variance_t I).

Each function returns (mean, std), std broadcasting against the mean: shape () for one time,
(B, 1, ..., 1) for one time an example.

Sources: Ho et al. 2020 (arXiv:2006.11239), eqs. 4, 6, 7, for neighbouring steps of a chain;
Kingma et al. 2021 (arXiv:2107.00630), eq. 1 and appendix A, for any s < t.
"""

import itertools

import jax.numpy as jnp
import numpy as np

from jaxdiff import checks, numerics
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Key

__all__ = ["marginal", "perturb", "posterior", "step_coefficients", "transition"]


def marginal(process: Process, x0: Array, t: Array) -> tuple[Array, Array]:
    """Return mean and std of q(x_t | x_0): the closed form of the whole forward process.

    Args:
        process: supplies alpha and sigma.
        x0: clean data (B, ...), floating point.
        t: times in [0, t_max], shape () or (B,).

    Returns:
        (mean (B, ...), std () or (B, 1, ..., 1)).

    Raises:
        TypeError: if `x0` holds integers; scale them first.
        ValueError: if the shapes do not fit or a known time is out of range.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 4.
    """
    x0 = numerics.as_float(x0, "x0")
    (t,) = _times(process, x0, t=t)
    return process.alpha(t) * x0, process.sigma(t)


def transition(process: Process, x_s: Array, s: Array, t: Array) -> tuple[Array, Array]:
    """Return mean and std of q(x_t | x_s), s <= t.

    Args:
        process: supplies alpha and variance.
        x_s: data with the noise of time s, (B, ...).
        s: times in [0, t_max], shape () or (B,).
        t: later times, shape () or (B,).

    Returns:
        (mean (B, ...), std () or (B, 1, ..., 1)).

    Raises:
        TypeError: if `x_s` holds integers.
        ValueError: if the shapes do not fit, or known times are out of range or order.

    Source: Kingma et al. 2021 (arXiv:2107.00630), appendix A.1.
    """
    x_s = numerics.as_float(x_s, "x_s")
    s, t = _times(process, x_s, s=s, t=t)
    scale, variance = step_coefficients(process, s, t)
    return scale * x_s, numerics.sqrt(variance)


def posterior(process: Process, x_t: Array, x0: Array, t: Array, s: Array) -> tuple[Array, Array]:
    """Return mean and std of q(x_s | x_t, x_0), s <= t.

    Args:
        process: supplies alpha and variance.
        x_t: data with the noise of time t, (B, ...).
        x0: clean data, the shape of `x_t`.
        t: times in [0, t_max], shape () or (B,).
        s: earlier times, shape () or (B,).

    Returns:
        (mean (B, ...), std () or (B, 1, ..., 1)); the mean is x0 where sigma_s = 0 < sigma_t,
        and x_t where s = t.

    Raises:
        TypeError: if `x_t` or `x0` holds integers.
        ValueError: if the shapes do not fit, or known times are out of range or order.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 7; Kingma et al. 2021 (arXiv:2107.00630),
    appendix A.2.
    """
    x_t, x0 = numerics.as_float(x_t, "x_t"), numerics.as_float(x0, "x0")
    if x_t.shape != x0.shape:
        raise ValueError(f"`x0` must have the shape of x_t, {x_t.shape}; got {x0.shape}.")
    s, t = _times(process, x_t, s=s, t=t)
    scale, added = step_coefficients(process, s, t)
    variance_s, variance_t = process.variance(s), process.variance(t)
    noisy = variance_t > 0  # else s = t has no noise: stay
    total = jnp.where(noisy, variance_t, 1.0)
    keep = jnp.where(noisy, scale * variance_s / total, 1.0)
    fresh = added / total
    return keep * x_t + process.alpha(s) * fresh * x0, numerics.sqrt(variance_s * fresh)


def perturb(key: Key, process: Process, x0: Array, t: Array) -> tuple[Array, Array]:
    """Draw x_t ~ q(x_t | x_0) = alpha_t x0 + sigma_t eps.

    Args:
        key: one key, or `(B,)` row keys; consumed.
        process: supplies alpha and sigma.
        x0: clean data (B, ...), floating point.
        t: times in [0, t_max], shape () or (B,).

    Returns:
        (x_t, eps), each (B, ...).

    Raises:
        TypeError: if `x0` holds integers; scale them first.
        ValueError: if the shapes do not fit or a known time is out of range.

    Source: Ho et al. 2020 (arXiv:2006.11239), eqs. 4 and 14.
    """
    mean, std = marginal(process, x0, t)
    eps = numerics.normal(key, mean)
    return mean + std * eps, eps


def step_coefficients(process: Process, s: Array, t: Array) -> tuple[Array, Array]:
    """Return scale and variance of q(x_t | x_s) = N(scale x_s, variance I), s <= t elementwise."""
    alpha_s, alpha_t = process.alpha(s), process.alpha(t)
    has_signal = alpha_s > 0
    scale = jnp.where(has_signal, alpha_t / jnp.where(has_signal, alpha_s, 1.0), 1.0)
    variance = process.variance(t) - scale**2 * process.variance(s)
    return scale, jnp.maximum(variance, 0.0)


def _times(process: Process, x: Array, **times: Array) -> list[Array]:
    """Check the process and named times, in rising order, and let them broadcast against `x`."""
    checks.process(process)
    for name, value in times.items():
        checks.real(name, value)
    expanded = [numerics.expand_like(t, x).astype(x.dtype) for t in times.values()]
    known = [numerics.concrete(t) for t in expanded]
    t_max = numerics.concrete(process.t_max)
    for name, t in zip(times, known, strict=True):
        if t is None or t_max is None:
            continue
        if not np.all((t >= 0) & (t <= t_max * (1 + 1e-6))):
            raise ValueError(
                f"`{name}` must lie in [0, t_max] = [0, {t_max:g}]; "
                f"got values from {t.min():g} to {t.max():g}."
            )
    for s, t in itertools.pairwise(known):
        if s is not None and t is not None and np.any(s > t):
            early, late = times
            raise ValueError(f"`{early}` must be at most `{late}`; got {s.ravel()} > {t.ravel()}.")
    return expanded
