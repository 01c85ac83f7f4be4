r"""The probability-flow ODE in a form that every process shares.

In the angle theta = atan(sigma / alpha) and in y = x_t / sqrt(alpha^2 + sigma^2) it reads

    y = cos(theta) x0 + sin(theta) eps,
    dy / dtheta = v_hat = (cos(theta) y - x0_hat) / sin(theta),

so that a schedule's kinks, an infinite slope of sigma at t = 0 and alpha = 0 at t_max do not
enter: theta runs from nearly 0 to at most pi / 2.

Source: Salimans & Ho 2022 (arXiv:2202.00512), appendix D; the ODE: Song et al. 2021
(arXiv:2011.13456), eq. 13.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxdiff import checks, numerics
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser

__all__ = ["angle", "check_tolerances", "radius", "require_solved", "vector_field", "x0_hat"]


def angle(process: Process, t: Array) -> Array:
    """Return theta = atan(sigma / alpha), in [0, pi / 2]."""
    return jnp.arctan2(process.sigma(t), process.alpha(t))


def radius(process: Process, t: Array) -> Array:
    """Return sqrt(alpha^2 + sigma^2), the length of x_t where y has 1."""
    return jnp.hypot(process.alpha(t), process.sigma(t))


def vector_field(process: Process, denoise: Denoiser) -> Callable[[Array, Array], Array]:
    """Return (theta (), y (B, ...)) -> dy / dtheta (B, ...); theta must not be 0.

    A denoiser that gives its v is asked for that: v_hat is v / sqrt(alpha^2 + sigma^2). By x0_hat
    the difference above loses log2(1 / theta) bits, so that how it was compiled shows in a
    divergence.
    """
    v = getattr(denoise, "v", None)

    def v_hat(theta: Array, y: Array) -> Array:
        cos, sin = jnp.cos(theta), jnp.sin(theta)
        smallest = jnp.finfo(y.dtype).tiny  # cos(pi / 2) may round to less than 0
        log_snr = 2.0 * jnp.log(jnp.maximum(cos, smallest) / sin)
        t = jnp.clip(process.time_of_log_snr(log_snr), 0.0, process.t_max).astype(y.dtype)
        length = radius(process, t)
        if v is not None:
            return checks.output("denoise.v", v(length * y, t), y) / length
        return (cos * y - checks.output("denoise", denoise(length * y, t), y)) / sin

    return v_hat


def check_tolerances(rtol: Any, atol: Any, max_steps: Any) -> tuple[Any, Any, int]:
    """Return the options of an adaptive solver, `max_steps` as an int.

    Raises:
        TypeError: if `max_steps` is no whole number or a tolerance no real one.
        ValueError: if one is known and not positive, or a tolerance not one finite number.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        checks.number(name, value, 0.0, above=True)
    return rtol, atol, checks.count("max_steps", max_steps)


def require_solved(value: Array, solved: Array, max_steps: int) -> Array:
    """Return what an adaptive solver gave, if it came to its end in every row.

    Args:
        value: what it gave.
        solved: whether it came to its end, of any shape.
        max_steps: the most steps that it might take.

    Raises:
        RuntimeError: if it did not: here where that is known, else when the program runs.
    """
    wanted = f"`max_steps` must reach the end of the flow; {max_steps} solver steps did not"
    remedy = (
        ". Raise it, or the tolerances `rtol` and `atol`; no number is enough where the denoiser "
        "returns NaN or infinity."
    )
    known = numerics.concrete(solved)
    if known is None:
        import equinox  # which diffrax brings; here, so that only a solver pays for it

        return equinox.error_if(value, ~solved, wanted + remedy)
    if not known.all():
        rows = f" in {known.size - known.sum()} of {known.size} rows"
        raise RuntimeError(wanted + rows + remedy)
    return value


def x0_hat(theta: Array, y: Array, v_hat: Array) -> Array:
    """Return the x0_hat (B, ...) that a vector field v_hat (B, ...) at y and theta stands for."""
    return jnp.cos(theta) * y - jnp.sin(theta) * v_hat
