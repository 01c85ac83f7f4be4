r"""What a network predicts: x0, eps, v, score or velocity, and any of them from any other.

At a given x_t = alpha x0 + sigma eps each kind is an affine function of x0, so all hold the
same information and every conversion goes through the pair (x0, eps):

    score    = -eps / sigma                          grad log q(x_t | x0); of q(x_t) in the mean
    v        = alpha eps - sigma x0                  Salimans & Ho 2022 (arXiv:2202.00512), sec. 4
    velocity = alpha' x0 + sigma' eps                d x_t / dt, Lipman et al. 2023
                                                     (arXiv:2210.02747), eq. 15

v and velocity are solved for (x0, eps) together with x_t as a 2 x 2 system, never through a
division by alpha, so they stay well posed where alpha = 0; eps and score do not hold x0 there.
"""

from collections.abc import Callable

import jax.numpy as jnp

from jaxdiff import checks, numerics
from jaxdiff.processes import Process
from jaxdiff.typing import Array

__all__ = [
    "KINDS",
    "SIGNAL_NEEDED",
    "check_kind",
    "convert",
    "error_ratio",
    "from_pair",
    "require_signal",
]

KINDS = ("x0", "eps", "v", "score", "velocity")
SIGNAL_NEEDED = ("eps", "score")
"""The kinds that hold no x0 where alpha is 0."""


def check_kind(name: str, kind: str) -> None:
    """Raise ValueError unless `kind` is one of :data:`KINDS`."""
    checks.choice(name, kind, KINDS)


def convert(
    process: Process, source: str, target: str, value: Array, x_t: Array, t: Array
) -> Array:
    """Convert a prediction of one kind into another.

    Args:
        process: supplies alpha and sigma.
        source: the kind of `value`, one of :data:`KINDS`.
        target: the kind wanted.
        value: the prediction (B, ...).
        x_t: the noisy data it was made from, the same shape.
        t: times, shape () or (B,). With sigma = 0 only x0 is defined from x0, and with
            alpha = 0 eps and score give no x0: the result is then not finite.

    Returns:
        The prediction as `target`, (B, ...).

    Raises:
        TypeError: if `process` is no process, or the others are no arrays.
        ValueError: if a kind is unknown or the shapes do not fit.
    """
    check_kind("source", source)
    check_kind("target", target)
    checks.process(process)
    value, x_t = numerics.as_array(value, "value"), numerics.as_array(x_t, "x_t")
    if value.shape != x_t.shape:
        raise ValueError(f"`value` must have the shape of x_t, {x_t.shape}; got {value.shape}.")
    t = numerics.expand_like(numerics.as_time(t), x_t)
    if source == target:
        return value
    x0, eps = _TO_PAIR[source](process, value, x_t, t)
    return _FROM_PAIR[target](process, x0, eps, t)


def from_pair(process: Process, kind: str, x0: Array, eps: Array, t: Array) -> Array:
    """Return what a network of this kind should predict: the target made of x0 and eps.

    Args:
        process: supplies alpha and sigma.
        kind: one of :data:`KINDS`.
        x0: clean data (B, ...).
        eps: its noise, the same shape.
        t: times, shape () or (B,).

    Raises:
        TypeError: if x0 and eps are no arrays, or the times no real numbers.
        ValueError: if `kind` is unknown or the shapes do not fit.
    """
    check_kind("kind", kind)
    checks.process(process)
    x0, eps = numerics.as_array(x0, "x0"), numerics.as_array(eps, "eps")
    if eps.shape != x0.shape:
        raise ValueError(f"`eps` must have the shape of x0, {x0.shape}; got {eps.shape}.")
    t = numerics.expand_like(numerics.as_time(t), x0)
    return _FROM_PAIR[kind](process, x0, eps, t)


def error_ratio(process: Process, target: str, source: str, t: Array) -> Array:
    """Return the factor that turns an error of `source` into the error of `target`.

    At fixed x_t an error e of x0 is an error -(alpha / sigma) e of eps, and so on; the ratio of
    any two is taken without passing through a quotient that may be infinite.

    Args:
        process: supplies alpha and sigma.
        target: one of :data:`KINDS`.
        source: one of :data:`KINDS`.
        t: times of any shape.

    Raises:
        ValueError: if a kind is unknown.
    """
    check_kind("target", target)
    check_kind("source", source)
    checks.process(process)
    t = numerics.as_time(t)
    if target == source:
        return jnp.ones_like(t)
    # Directions (d x0, d eps) that leave x_t where it is are multiples of (sigma, -alpha).
    sigma, alpha = process.sigma(t), process.alpha(t)
    if {target, source} == {"eps", "score"}:  # both are multiples of alpha, which may be 0
        alpha = jnp.ones_like(alpha)
    return _FROM_PAIR[target](process, sigma, -alpha, t) / _FROM_PAIR[source](
        process, sigma, -alpha, t
    )


def require_signal(process: Process, t: Array, what: str) -> None:
    """Raise ValueError if `t` is known and holds a time at which alpha is 0.

    Args:
        process: supplies alpha.
        t: times of any shape.
        what: who divides by alpha there, for the message.
    """
    alpha = numerics.known_value(process.alpha, t)
    if alpha is not None and not alpha.all():
        raise ValueError(
            f"`t` must lie below the time at which alpha is 0 for {what}; got t={t}. "
            f"Start the grid at t_start < t_max, or predict x0, v or velocity."
        )


_Pair = tuple[Array, Array]


def _pair_of_x0(process: Process, x0: Array, x_t: Array, t: Array) -> _Pair:
    return x0, (x_t - process.alpha(t) * x0) / process.sigma(t)


def _pair_of_eps(process: Process, eps: Array, x_t: Array, t: Array) -> _Pair:
    return (x_t - process.sigma(t) * eps) / process.alpha(t), eps


def _pair_of_score(process: Process, score: Array, x_t: Array, t: Array) -> _Pair:
    return _pair_of_eps(process, -process.sigma(t) * score, x_t, t)


def _pair_of_v(process: Process, v: Array, x_t: Array, t: Array) -> _Pair:
    alpha, sigma = process.alpha(t), process.sigma(t)
    norm = alpha**2 + sigma**2
    return (alpha * x_t - sigma * v) / norm, (sigma * x_t + alpha * v) / norm


def _pair_of_velocity(process: Process, velocity: Array, x_t: Array, t: Array) -> _Pair:
    alpha, sigma = process.alpha(t), process.sigma(t)
    alpha_dot, sigma_dot = process.alpha_dot(t), process.sigma_dot(t)
    determinant = alpha * sigma_dot - sigma * alpha_dot
    x0 = (sigma_dot * x_t - sigma * velocity) / determinant
    return x0, (alpha * velocity - alpha_dot * x_t) / determinant


_TO_PAIR: dict[str, Callable[[Process, Array, Array, Array], _Pair]] = {
    "x0": _pair_of_x0,
    "eps": _pair_of_eps,
    "v": _pair_of_v,
    "score": _pair_of_score,
    "velocity": _pair_of_velocity,
}

_FROM_PAIR: dict[str, Callable[[Process, Array, Array, Array], Array]] = {
    "x0": lambda process, x0, eps, t: x0,
    "eps": lambda process, x0, eps, t: eps,
    "v": lambda process, x0, eps, t: process.alpha(t) * eps - process.sigma(t) * x0,
    "score": lambda process, x0, eps, t: -eps / process.sigma(t),
    "velocity": lambda process, x0, eps, t: process.alpha_dot(t) * x0 + process.sigma_dot(t) * eps,
}
