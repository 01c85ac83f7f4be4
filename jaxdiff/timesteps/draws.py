"""Draws of training times."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from jaxdiff import checks, numerics, rows
from jaxdiff.processes import Process
from jaxdiff.rows import Rows
from jaxdiff.typing import Array, Key

Draw: TypeAlias = Callable[[Key, Process, Any], Array]
"""(key, process, B) -> training times (B,) in (0, t_max]."""


def stratified(key: Key, of: Rows | int) -> Array:
    """Return (u_0 + i / N) mod 1 for the rows i of the global batch of N, as 1 - u > 0."""
    numbers, total = of if isinstance(of, Rows) else rows.of_key(key, of)
    u = (jax.random.uniform(rows.whole(key)) + numbers / total) % 1.0
    return 1.0 - u


def draw_at(t: Any) -> Draw:
    """Draw the same time for every example, to learn one noise level; 0 for data without noise.

    Raises:
        TypeError: if `t` is no real number.
        ValueError: if `t` is known and negative or not finite.
    """
    checks.number("t", t, 0.0)

    def draw(key: Key, process: Process, of: Rows | int) -> Array:
        return jnp.full(_num_rows(of), t, float)

    return draw


def draw_uniform() -> Draw:
    """Draw times independently and uniformly from (0, t_max]."""

    def draw(key: Key, process: Process, of: Rows | int) -> Array:
        return process.t_max * (1.0 - rows.uniform(rows.keys(key, of), _num_rows(of)))

    return draw


def draw_stratified() -> Draw:
    """Draw times uniformly from (0, t_max], spread evenly over the batch."""

    def draw(key: Key, process: Process, of: Rows | int) -> Array:
        return process.t_max * stratified(key, of)

    return draw


def draw_log_normal(mean: float = -1.2, std: float = 1.2) -> Draw:
    """Draw noise levels with log(sigma / alpha) ~ N(mean, std^2), spread evenly over the batch.

    Times past the ends of the process are moved to them.

    Raises:
        TypeError: if `mean` or `std` is no real number.
        ValueError: if either is known and not finite, or `std` not positive.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1.
    """
    checks.number("mean", mean)
    checks.number("std", std, 0.0, above=True)

    def draw(key: Key, process: Process, of: Rows | int) -> Array:
        level = mean + std * norm.ppf(_inside(stratified(key, of)))
        return _times_of(process, -2.0 * level)

    return draw


def draw_log_snr(low: Any, high: Any) -> Draw:
    """Draw times with log-SNR uniform on [low, high], spread evenly over the batch.

    Times past the ends of the process are moved to them. With a loss on eps this is the
    variational bound up to a factor (Kingma et al. 2021, arXiv:2107.00630, eq. 18).

    Raises:
        TypeError: if `low` or `high` is no real number.
        ValueError: if either is known and not finite, or both are and `low` is not below `high`.
    """
    bottom, top = (
        numerics.concrete(checks.number(name, value))
        for name, value in (("low", low), ("high", high))
    )
    if bottom is not None and top is not None and not bottom < top:
        raise ValueError(f"`low` must be below `high`; got {low} and {high}.")

    def draw(key: Key, process: Process, of: Rows | int) -> Array:
        return _times_of(process, low + (high - low) * stratified(key, of))

    return draw


def _num_rows(of: Rows | int) -> int:
    return of.numbers.shape[0] if isinstance(of, Rows) else checks.count("of", of)


def _inside(u: Array) -> Array:
    """Keep u out of the infinite quantile at 1."""
    return jnp.minimum(u, 1.0 - jnp.finfo(u.dtype).epsneg)


def _times_of(process: Process, log_snr: Array) -> Array:
    smallest = jnp.finfo(log_snr.dtype).eps * process.t_max
    return jnp.clip(process.time_of_log_snr(log_snr), smallest, process.t_max)
