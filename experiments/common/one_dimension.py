"""A mixture in one dimension, where the probability flow is known: it moves quantiles.

x_s = F_s^-1(F_t(x_t)) with F_t the distribution function of the mixture diffused to t.
"""

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from jaxdiff import Mixture
from jaxdiff.processes import Process
from jaxdiff.typing import Array

WEIGHTS, MEANS, VARIANCES = (0.3, 0.7), (-1.0, 0.8), (0.05, 0.1)


def make_mixture() -> Mixture:
    """Return two Gaussians in one dimension."""
    means, variances = jnp.array(MEANS)[:, None], jnp.array(VARIANCES)[:, None, None]
    return Mixture(jnp.array(WEIGHTS), means, variances)


def cdf(mixture: Mixture, x: Array) -> Array:
    """Return the distribution function at x (N,)."""
    stds = jnp.sqrt(mixture.covariances[:, 0, 0])
    return norm.cdf((x[:, None] - mixture.means[None, :, 0]) / stds[None]) @ mixture.weights


@jax.jit
def quantile(mixture: Mixture, process: Process, t: Array, q: Array) -> Array:
    """Return the quantiles q (N,) of the mixture diffused to t, by bisection."""
    diffused = mixture.diffuse(process, t)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = 0.5 * (ends[0] + ends[1])
        below = cdf(diffused, middle) < q
        return jnp.where(below, middle, ends[0]), jnp.where(below, ends[1], middle)

    ends = jnp.full(q.shape, -500.0), jnp.full(q.shape, 500.0)
    return jax.lax.fori_loop(0, 80, halve, ends)[0]
