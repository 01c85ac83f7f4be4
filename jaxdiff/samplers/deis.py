r"""DEIS: exponential integration of the probability flow with eps_hat a polynomial in t.

With rho = sigma / alpha the probability flow is d(x / alpha) / d rho = eps_hat, so

    x_s / alpha_s = x_t / alpha_t + int_t^s rho'(tau) eps_hat(tau) d tau.

eps_hat is the polynomial in tau through the last outputs. A basis polynomial q, 0 at tau = t,
is integrated by parts, which needs no derivative of the schedule:

    int_t^s rho' q d tau = int_t^s (rho(s) - rho(tau)) q'(tau) d tau,

by Gauss-Legendre quadrature. These are numbers, not evaluations of the network.
"""

import jax.numpy as jnp
import numpy as np

from jaxdiff import checks
from jaxdiff.processes import Process
from jaxdiff.samplers.multistep import (
    State,
    divided_differences,
    multistep_solver,
    newton_basis,
    usable_nodes,
)
from jaxdiff.samplers.protocol import Sampler, follow_flow, taken
from jaxdiff.typing import Array, Denoiser, Key

QUADRATURE = np.polynomial.legendre.leggauss(12)
"""Nodes and weights on [-1, 1]."""


def deis(process: Process, denoise: Denoiser, order: int = 3) -> Sampler:
    """Make tAB-DEIS: one evaluation a step.

    Order 1 is DDIM. The order of a step rises 1, 2, ... as outputs gather; the step to sigma = 0
    returns x0_hat. The first-order start limits the order to 2 unless the first steps are short
    or eps_hat hardly changes there.

    Args:
        process: the forward process.
        denoise: the denoiser.
        order: 1, 2, 3 or 4: one more than the degree of the polynomial.

    Raises:
        ValueError: if `order` is another.

    Source: Zhang & Chen 2023 (arXiv:2204.13902), eqs. 14 and 15.
    """
    checks.choice("order", order, (1, 2, 3, 4))
    denoise = taken(process, denoise)

    def integrals(t: Array, s: Array, nodes: list[Array]) -> list[Array]:
        """Integrate alpha_s rho' times each basis polynomial but the first."""
        points, weights = (jnp.asarray(values, t.dtype) for values in QUADRATURE)
        u = 0.5 * (s - t) * (1.0 + points)
        alphas = jnp.where(process.alpha(t + u) > 0, process.alpha(t + u), 1.0)
        gaps = process.sigma(s) - process.alpha(s) * process.sigma(t + u) / alphas
        results = []
        for polynomial in newton_basis(nodes)[1:]:
            slope = sum(k * c * u ** (k - 1) for k, c in enumerate(polynomial) if k > 0)
            results.append(0.5 * (s - t) * jnp.sum(weights * gaps * slope))
        return results

    def step(key: Key, state: State, t: Array, s: Array) -> State:
        x0_hat = denoise(state.x, t)
        x_s = follow_flow(process, state.x, x0_hat, t, s)
        if order == 1:
            return State(x_s, state.history)
        sigma = process.sigma(t)
        eps_hat = (state.x - process.alpha(t) * x0_hat) / jnp.where(sigma > 0, sigma, jnp.inf)
        history = state.history.apart_from(t, s)
        nodes, usable = usable_nodes(history, history.times - t, 0, s - t)
        differences = divided_differences([eps_hat, *history.outputs], [jnp.zeros_like(t), *nodes])
        weights = integrals(t, s, [jnp.zeros_like(t), *nodes[:-1]])
        for difference, weight, good in zip(differences[1:], weights, usable, strict=True):
            x_s += jnp.where(good & (process.sigma(s) > 0), weight * difference, 0.0)
        return State(x_s, history.push(eps_hat, t))

    return multistep_solver(process, denoise, step, order - 1, deterministic=True)
