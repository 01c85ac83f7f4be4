"""Grids: decreasing times to sample along."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff import checks, numerics
from jaxdiff.processes import Process
from jaxdiff.typing import Array

INFINITE_START = -10.0
"""Where log-SNR is -inf at the start, :func:`log_snr` goes on from here: sigma/alpha = 148."""


def uniform(process: Process, num_steps: int, t_end: Any = 0.0, t_start: Any = None) -> Array:
    """Return times in equal steps.

    Args:
        process: supplies t_max, the default start.
        num_steps: N >= 1.
        t_end: the last time, in [0, t_start).
        t_start: the first time, in (0, t_max].

    Returns:
        Decreasing times (N + 1,).

    Raises:
        TypeError: if `process` is no process, or another argument no number of its kind.
        ValueError: if an argument is out of range.
    """
    num_steps, t_start = _check_ends(process, num_steps, t_end, t_start)
    return _between(t_start, t_end, lambda: jnp.linspace(t_start, t_end, num_steps + 1))


def quadratic(process: Process, num_steps: int, t_end: Any = 0.0, t_start: Any = None) -> Array:
    """Return times whose square roots are in equal steps: denser towards the data.

    Args and errors are those of :func:`uniform`.

    Source: Song et al. 2021 (arXiv:2010.02502), appendix D.2.
    """
    num_steps, t_start = _check_ends(process, num_steps, t_end, t_start)
    roots = jnp.sqrt(jnp.asarray(t_start, float)), jnp.sqrt(jnp.asarray(t_end, float))
    return _between(t_start, t_end, lambda: jnp.linspace(*roots, num_steps + 1) ** 2)


def log_snr(process: Process, num_steps: int, t_end: Any = 1e-3, t_start: Any = None) -> Array:
    """Return times in equal steps of log-SNR.

    Where log-SNR is -inf at the start (flow, cosine, zero terminal SNR) the first step leaves
    t_start and the other nodes are in equal steps from :data:`INFINITE_START`, or from the
    log-SNR of `t_end` less 10 if that is lower.

    Args are those of :func:`uniform`.

    Raises:
        ValueError: as :func:`uniform`, and if log-SNR is known to be infinite at `t_end`.

    Source: Lu et al. 2022 (arXiv:2206.00927), whose solvers step uniformly in log-SNR.
    """
    num_steps, t_start = _check_ends(process, num_steps, t_end, t_start)
    first = process.log_snr(jnp.asarray(t_start, float))
    last = process.log_snr(jnp.asarray(t_end, float))
    known = numerics.concrete(last)
    if known is not None and np.isinf(known):
        raise ValueError(
            f"`t_end` must have a finite log-SNR; got t_end={t_end}, where sigma is 0. "
            f"Take a small positive time and append 0 if the grid is to end there."
        )
    infinite = jnp.isneginf(first)
    nodes = jnp.linspace(jnp.where(infinite, 0.0, first), last, num_steps + 1)
    low = jnp.minimum(INFINITE_START, last - 10.0)
    rest = jnp.concatenate([jnp.full(1, low), jnp.linspace(low, last, num_steps)])
    nodes = jnp.where(infinite, rest, nodes)
    return _between(t_start, t_end, lambda: process.time_of_log_snr(nodes))


def karras(
    process: Process, num_steps: int, sigma_min: Any, sigma_max: Any, rho: float = 7.0
) -> Array:
    """Return the times of EDM's noise levels sigma/alpha, then 0.

    Args:
        process: turns noise levels into times.
        num_steps: N >= 1: as many levels, from `sigma_max` down to `sigma_min`, then t = 0.
        sigma_min: the lowest level, positive.
        sigma_max: the highest level, one that the process reaches.
        rho: the larger, the denser towards the data.

    Returns:
        Decreasing times (N + 1,).

    Raises:
        ValueError: if an argument is out of range or the process has no such levels.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 5.
    """
    checks.process(process)
    num_steps = checks.count("num_steps", num_steps)
    checks.number("rho", rho, 0.0, above=True)
    checks.number("sigma_min", sigma_min, infinite=True)
    checks.number("sigma_max", sigma_max, infinite=True)
    low, high = numerics.concrete(sigma_min), numerics.concrete(sigma_max)
    if low is not None and high is not None and not 0.0 < low <= high < np.inf:
        raise ValueError(
            "`sigma_min` and `sigma_max` must satisfy 0 < sigma_min <= sigma_max < inf; "
            f"got {sigma_min} and {sigma_max}."
        )
    high_root, low_root = (jnp.asarray(s, float) ** (1.0 / rho) for s in (sigma_max, sigma_min))
    levels = jnp.linspace(high_root, low_root, num_steps) ** rho
    times = process.time_of_log_snr(-2.0 * jnp.log(levels))
    known, t_max = numerics.concrete(times), numerics.concrete(process.t_max)
    reached = known is None or t_max is None or np.all((known > 0) & (known <= t_max * 1.00001))
    if not reached:
        raise ValueError(
            "`sigma_min` and `sigma_max` must be noise levels sigma/alpha that the process reaches "
            f"at times in (0, {t_max:g}]; got {sigma_min} and {sigma_max}, with `rho` {rho}."
        )
    times = jnp.minimum(times, process.t_max)
    return jnp.concatenate([times, jnp.zeros(1, times.dtype)])


def flow_shift(
    process: Process, num_steps: int, shift: Any = 3.0, t_end: Any = 0.0, t_start: Any = None
) -> Array:
    """Return equal steps of a time that is then shifted: denser towards the noise for shift > 1.

    A time u t_max becomes shift u / (1 + (shift - 1) u) t_max. For `flow` this multiplies the
    noise level sigma / alpha by `shift`, as an image of so many times the resolution asks for.

    Args are those of :func:`uniform`, and `shift`, positive; 1 gives :func:`uniform`.

    Raises:
        ValueError: if an argument is out of range.

    Source: Esser et al. 2024 (arXiv:2403.03206), eq. 23.
    """
    num_steps, t_start = _check_ends(process, num_steps, t_end, t_start)
    checks.number("shift", shift, 0.0, above=True)

    def shifted(u: Array, by: Any) -> Array:
        return by * u / (1.0 + (by - 1.0) * u)

    start, end = (
        shifted(jnp.asarray(t, float) / process.t_max, 1.0 / shift) for t in (t_start, t_end)
    )
    nodes = jnp.linspace(start, end, num_steps + 1)
    return _between(t_start, t_end, lambda: process.t_max * shifted(nodes, shift))


def check_grid(ts: Any, *, decreasing: bool = True, process: Process | None = None) -> Array:
    """Return a time grid as an array after checking what can be known of it.

    Args:
        ts: (N + 1,) times, N >= 1; equal neighbours are allowed.
        decreasing: whether it must fall, from noise to data, or rise.
        process: whose times they must be, up to t_max, where it is given.

    Raises:
        TypeError: if it holds no real numbers.
        ValueError: if it has another rank, NaN, a negative time, one past t_max or runs the wrong
            way.
    """
    ts = numerics.as_array(ts, "ts")
    if not jnp.issubdtype(ts.dtype, jnp.floating):
        raise TypeError(f"`ts` must hold floating-point times; got {ts.dtype}.")
    if ts.ndim != 1 or ts.shape[0] < 2:
        raise ValueError(f"`ts` must be a vector of at least 2 times; got shape {ts.shape}.")
    known = numerics.concrete(ts)
    if known is None:
        return ts
    if not np.isfinite(known).all() or known.min() < 0.0:
        raise ValueError(f"`ts` must hold finite times >= 0; got {known}.")
    t_max = None if process is None else numerics.concrete(process.t_max)
    if t_max is not None and known.max() > t_max * (1 + 1e-6):
        raise ValueError(f"`ts` must lie in [0, t_max] = [0, {t_max:g}]; got {known.max():g}.")
    steps = np.diff(known) if decreasing else -np.diff(known)
    if (steps > 0).any():
        wrong = int(np.argmax(steps > 0))
        way = "decrease from noise to data" if decreasing else "increase from data to noise"
        raise ValueError(
            f"`ts` must {way}; got ts[{wrong}]={known[wrong]:g} then "
            f"ts[{wrong + 1}]={known[wrong + 1]:g}. Reverse it?"
        )
    return ts


def _between(t_start: Any, t_end: Any, make: Callable[[], Array]) -> Array:
    """Put the exact ends on a grid that rounding may have moved off them."""
    return make().at[0].set(t_start).at[-1].set(t_end)


def _check_ends(process: Process, num_steps: int, t_end: Any, t_start: Any) -> tuple[int, Any]:
    """Check the arguments of a grid; return its number of steps and its first time."""
    checks.process(process)
    num_steps = checks.count("num_steps", num_steps)
    t_start = process.t_max if t_start is None else checks.number("t_start", t_start)
    checks.number("t_end", t_end)
    end, start, t_max = (numerics.concrete(t) for t in (t_end, t_start, process.t_max))
    if start is not None and t_max is not None and not 0.0 < start <= t_max:
        raise ValueError(f"`t_start` must lie in (0, t_max] = (0, {t_max:g}]; got {t_start}.")
    if end is not None and not end >= 0.0:
        raise ValueError(f"`t_end` must lie in [0, t_start); got {t_end}.")
    if end is not None and start is not None and not end < start:
        raise ValueError(f"`t_end` must lie in [0, t_start) = [0, {start:g}); got {t_end}.")
    return num_steps, t_start
