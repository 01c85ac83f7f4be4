r"""What multistep solvers share: a history of outputs, and integrals of its interpolant.

In the half log-SNR u, counted from the time of the step, and with h = u(s) - u(t), the
probability flow is solved by

    x_s = sigma_s / sigma_t x_t + alpha_s int_0^h e^(u - h) x0_hat(u) du.

A method replaces x0_hat by a polynomial through outputs at earlier nodes. In Newton's form its
coefficients are divided differences and its basis is 1, u, u (u - u_1), ..., of which the moments

    psi_k = int_0^h e^(u - h) u^k du = h^k - k psi_{k-1},      psi_0 = 1 - e^-h

give the integrals.

Source: Lu et al. 2022 (arXiv:2211.01095), eqs. 8 and 9.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff.processes import Process
from jaxdiff.samplers.protocol import Sampler, Step, solver
from jaxdiff.typing import Array, Denoiser

SERIES_TERMS = 20
"""Terms of the series of a moment: enough for float64 below 1."""

NEAR = 1e-3
"""The part of a step within which two earlier outputs give no slope."""


class History(NamedTuple):
    """The last outputs of a network and their times, the newest first.

    Attributes:
        outputs: (M, B, ...).
        times: (M,).
        written: how many of them have been written, ().
    """

    outputs: Array
    times: Array
    written: Array

    @classmethod
    def empty(cls, x: Array, length: int) -> "History":
        """Return a history for `length` outputs of the shape of x."""
        outputs = jnp.zeros((length, *x.shape), x.dtype)
        return cls(outputs, jnp.zeros(length, x.dtype), jnp.zeros((), jnp.int32))

    def apart_from(
        self,
        t: Array,
        s: Array,
        near: float = NEAR,
        position: Callable[[Array], Array] = lambda t: t,
    ) -> "History":
        """Return the history without a newest output too near to t for a step from t to s.

        A slope through two outputs a small part of the step apart is their rounding, multiplied;
        so the nearest one is left out, and those behind it still make the full order.

        Args:
            t: where the step starts.
            s: where it ends.
            near: the part of the step that is small.
            position: of a time, as distances are measured.
        """
        if self.outputs.shape[0] == 0:
            return self
        start = position(t)
        reach = near * jnp.abs(position(s) - start)
        drop = (self.written > 0) & (jnp.abs(position(self.times[0]) - start) < reach)
        return History(
            jnp.where(drop, jnp.roll(self.outputs, -1, axis=0), self.outputs),
            jnp.where(drop, jnp.roll(self.times, -1), self.times),
            self.written - drop.astype(self.written.dtype),
        )

    def push(self, output: Array, t: Array) -> "History":
        """Return the history with one more output, and without the oldest."""
        if self.outputs.shape[0] == 0:
            return self
        return History(
            jnp.concatenate([output[None], self.outputs[:-1]]),
            jnp.concatenate([t.astype(self.times.dtype)[None], self.times[:-1]]),
            jnp.minimum(self.written + 1, self.outputs.shape[0]),
        )


class State(NamedTuple):
    """x (B, ...) and the outputs before it."""

    x: Array
    history: History


def multistep_solver(
    process: Process, denoise: Denoiser, step: Step, length: int, *, deterministic: bool = False
) -> Sampler:
    """Make a Sampler of a step of :class:`State` that looks back at `length` outputs."""
    return solver(
        process,
        denoise,
        step,
        init=lambda x: State(x, History.empty(x, length)),
        value=lambda state: state.x,
        replace=lambda state, x: state._replace(x=x),
        deterministic=deterministic,
    )


def half_log_snr(process: Process, t: Array) -> Array:
    """Return log(alpha / sigma), infinite at the ends of some processes."""
    return 0.5 * process.log_snr(t)


def usable_nodes(
    history: History, nodes: Array, first: int, step: Array, near: float = NEAR
) -> tuple[list[Array], list[Array]]:
    """Return positions of the outputs from number `first` on, and which of them may be used.

    An output is used if all newer ones are, it was written, and its position is finite and no
    small part of the step from the last one. The others get positions that differ from all used
    ones, so that nothing divides by 0.

    Args:
        history: of M outputs.
        nodes: their positions (M,), the step's start being at 0.
        first: the number of the first output.
        step: the length of the step in these positions, ().
        near: which part of it is small.
    """
    positions, usable = [], []
    last, good = jnp.zeros((), nodes.dtype), jnp.asarray(True)
    for i in range(first, nodes.shape[0]):
        good = good & (history.written > i) & jnp.isfinite(nodes[i])
        good = good & (jnp.abs(nodes[i] - last) > near * jnp.abs(step))
        last = jnp.where(good, nodes[i], last - jnp.where(step >= 0, 1.0, -1.0))
        positions.append(last)
        usable.append(good)
    return positions, usable


def divided_differences(values: Sequence[Array], nodes: Sequence[Array]) -> list[Array]:
    """Return f[u_0], f[u_0, u_1], ...: the coefficients of Newton's interpolant."""
    column, coefficients = list(values), [values[0]]
    for width in range(1, len(values)):
        column = [
            (column[i + 1] - column[i]) / (nodes[i + width] - nodes[i])
            for i in range(len(column) - 1)
        ]
        coefficients.append(column[0])
    return coefficients


def newton_basis(nodes: Sequence[Array]) -> list[list[Array]]:
    """Return the powers' coefficients, lowest first, of 1, (u - u_0), (u - u_0)(u - u_1), ...

    One polynomial more than the nodes.
    """
    polynomials = [[jnp.ones_like(nodes[0])]]
    for node in nodes:
        last = polynomials[-1]
        shifted = [jnp.zeros_like(node), *last]
        scaled = [node * coefficient for coefficient in last]
        polynomials.append(
            [a - b for a, b in zip(shifted, [*scaled, jnp.zeros_like(node)], strict=True)]
        )
    return polynomials


def exponential_moments(h: Array, count: int) -> list[Array]:
    """Return psi_0, ..., psi_{count - 1} of a finite h, each to its own precision.

    psi_k ~ h^(k+1) / (k + 1) would be lost as the difference of terms of the size of h^k. For
    small h the last one is therefore summed as a series,

        psi_k = h^(k+1) sum_j (-h)^j k! / (k + 1 + j)!,

    and those before it follow by the recursion taken backwards.
    """
    last = count - 1
    small = jnp.abs(h) < 1.0
    inside = jnp.where(small, h, 0.0)
    series = jnp.zeros_like(h)
    for j in reversed(range(SERIES_TERMS)):
        series = math.factorial(last) / math.factorial(last + 1 + j) - inside * series
    forwards, backwards = [-jnp.expm1(-h)], [inside ** (last + 1) * series]
    for k in range(1, count):
        forwards.append(h**k - k * forwards[-1])
        backwards.insert(0, (inside ** (count - k) - backwards[0]) / (count - k))
    pairs = zip(backwards, forwards, strict=True)
    return [jnp.where(small, accurate, large) for accurate, large in pairs]


def interpolant_change(values: Sequence[Array], nodes: Sequence[Array], h: Array) -> list[Array]:
    """Return what each output after the first adds to int_0^h e^(u - h) x0_hat(u) du.

    Args:
        values: outputs x0_hat (B, ...), the first that at the start of the step.
        nodes: their positions, the first 0; they must differ.
        h: the length of the step, finite.

    Returns:
        As many terms as there are outputs, less one; the k-th raises the interpolant's degree
        to k. The integral is psi_0 values[0] and the sum of the terms wanted.
    """
    moments = exponential_moments(h, len(values))
    terms = []
    coefficients = divided_differences(values, nodes)[1:]
    for difference, polynomial in zip(coefficients, newton_basis(nodes[:-1])[1:], strict=True):
        terms.append(sum(c * psi for c, psi in zip(polynomial, moments, strict=False)) * difference)
    return terms


def extrapolate(
    process: Process,
    history: History,
    x0_hat: Array,
    t: Array,
    s: Array,
    order: int,
    near: float = NEAR,
) -> Array:
    """Return what the earlier outputs add to a step with constant x0_hat, over alpha_s.

    Order 2 is the midpoint form (2M), order 3 integrates the quadratic exactly; lower orders
    start, as the history fills, and serve where outputs are nearer than the part `near` of the
    step. An infinite step, from alpha = 0 or to sigma = 0, adds nothing.
    """
    if order == 1:
        return jnp.zeros_like(x0_hat)
    nodes, usable, h = predictor_nodes(process, history, t, s, near)
    values = [x0_hat, *history.outputs[: order - 1]]
    change = midpoint_change(values, nodes, h)
    midpoint = jnp.where(usable[0], -jnp.expm1(-h) * change, 0.0)
    if order == 2:
        return midpoint
    exact = sum(interpolant_change(values, [jnp.zeros_like(h), *nodes[: order - 1]], h))
    return jnp.where(usable[1], exact, midpoint)


def midpoint_change(values: Sequence[Array], nodes: Sequence[Array], h: Array) -> Array:
    """Return what x0_hat changes, by the last two outputs, from the start of a step to its middle.

    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2, with r = h_{i-1} / h_i.
    """
    return 0.5 * h * (values[0] - values[1]) / -nodes[0]


def predictor_nodes(
    process: Process, history: History, t: Array, s: Array, near: float = NEAR
) -> tuple[list[Array], list[Array], Array]:
    """Return positions of the earlier outputs, which of them a step may use, and its length h.

    Where the step is infinite none may be used, and h is 1 so that nothing else is infinite.
    """
    here = half_log_snr(process, t)
    length = half_log_snr(process, s) - here
    finite = jnp.isfinite(length)
    h = jnp.where(finite, length, 1.0)
    positions = half_log_snr(process, history.times) - here
    nodes, usable = usable_nodes(history, positions, 0, h, near)
    return nodes, [finite & good for good in usable], h
