"""Discrete chains of noising steps, as processes in time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import checks, numerics
from jaxdiff.processes.base import Process
from jaxdiff.typing import Array


@numerics.pytree_dataclass
class Chain(Process):
    """See :func:`from_betas`; `log_alphas` (T + 1,) are its values at t = 0, 1/T, ..., 1."""

    log_alphas: Array

    @property
    def num_steps(self) -> int:
        """T, the number of steps of the chain."""
        return self.log_alphas.shape[-1] - 1

    @property
    def betas(self) -> Array:
        """The variances (T,) that the steps add."""
        return -jnp.expm1(2.0 * jnp.diff(self.log_alphas))

    def _parts(self, t: Array) -> tuple[Array, Array]:
        """Factor alpha as fall * exp(log_rest), fall < 1 only on a last interval ending at 0.

        A node belongs to the interval below it, so that slopes there are those of a step down,
        and so do times that rounding has put a few ulps of t_max beyond it.
        """
        position = t * self.num_steps
        rounding = 4 * self.num_steps * float(jnp.finfo(t.dtype).eps)
        index = jnp.ceil(position - min(rounding, 0.25)).astype(int) - 1
        index = jnp.clip(index, 0, self.num_steps - 1)
        fraction = position - index
        near, far = self.log_alphas[index], self.log_alphas[index + 1]
        to_zero = jnp.isneginf(far)
        fall = jnp.where(to_zero, 1.0 - jnp.minimum(fraction, 1.0), 1.0)
        log_rest = near + jnp.where(to_zero, 0.0, fraction * (jnp.where(to_zero, 0.0, far) - near))
        return fall.astype(t.dtype), log_rest.astype(t.dtype)

    def alpha(self, t: Array) -> Array:
        """Scale of the data in x_t."""
        fall, log_rest = self._parts(numerics.as_time(t))
        return fall * jnp.exp(log_rest)

    def variance(self, t: Array) -> Array:
        """Variance 1 - alpha^2, by expm1: exact in relative terms down to t = 0."""
        fall, log_rest = self._parts(numerics.as_time(t))
        return (1.0 - fall) * (1.0 + fall) - fall**2 * jnp.expm1(2.0 * log_rest)

    def time_of_log_snr(self, log_snr: Array) -> Array:
        """The time at which alpha^2 = sigmoid(log_snr)."""
        log_alpha = -0.5 * jax.nn.softplus(-numerics.as_time(log_snr))
        index = jnp.searchsorted(-self.log_alphas, -log_alpha, side="right") - 1
        index = jnp.clip(index, 0, self.num_steps - 1)
        near, far = self.log_alphas[index], self.log_alphas[index + 1]
        to_zero = jnp.isneginf(far)
        change = log_alpha - near
        linear = -jnp.expm1(jnp.where(to_zero, change, 0.0))
        fraction = jnp.where(to_zero, linear, change / (jnp.where(to_zero, -1.0, far) - near))
        return ((index + fraction) / self.num_steps).astype(log_alpha.dtype)


def from_betas(betas: Any) -> Chain:
    r"""Make a process of a discrete chain q(x_i | x_{i-1}) = N(sqrt(1 - beta_i) x_{i-1}, beta_i I).

    Step i of T is at t = i / T and t = 0 is the data: alpha(i / T)^2 = prod_{j <= i} (1 - beta_j),
    accumulated as sums of log1p(-beta). Between the nodes log alpha is linear in t.
    A last beta of exactly 1 (zero terminal SNR) is allowed; alpha is then linear in t on the last
    interval, down to exactly 0.

    Args:
        betas: (T,), in (0, 1), the last one possibly 1.

    Raises:
        TypeError: if `betas` holds no real numbers.
        ValueError: if `betas` is not a vector of such numbers.

    Source: Ho et al. 2020 (arXiv:2006.11239), eqs. 2 and 4; zero terminal SNR: Lin et al. 2024
    (arXiv:2305.08891).
    """
    checks.real("betas", betas)
    known = numerics.concrete(betas)
    shape = np.shape(betas)
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"`betas` must be a vector of one or more steps; got shape {shape}.")
    if known is None:
        summed = 0.5 * jnp.cumsum(jnp.log1p(-betas))
        return Chain(jnp.concatenate([jnp.zeros(1, summed.dtype), summed]))
    known = known.astype(np.float64)  # summed in double precision whatever JAX runs in
    inside = (known > 0.0) & (known < 1.0)
    inside[-1] |= known[-1] == 1.0
    if not inside.all():
        bad = int(np.argmin(inside))
        raise ValueError(
            f"`betas` must lie in (0, 1), the last one possibly 1; got betas[{bad}]={known[bad]}."
        )
    with np.errstate(divide="ignore"):
        log_alphas = np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-known))])
    return Chain(jnp.asarray(log_alphas, float))


def ddpm(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Chain:
    """Make the chain with betas linear from `beta_start` to `beta_end`.

    Raises:
        ValueError: if `num_steps` < 1, or a beta is not in (0, 1).

    Source: Ho et al. 2020 (arXiv:2006.11239), section 4.
    """
    num_steps = checks.count("num_steps", num_steps)
    checks.number("beta_start", beta_start, 0.0, 1.0, above=True, below=True)
    checks.number("beta_end", beta_end, 0.0, 1.0, above=True)
    return from_betas(np.linspace(beta_start, beta_end, num_steps))
