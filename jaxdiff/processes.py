r"""Forward processes: what noise does to data.

A process is the pair (alpha, variance) of the Gaussian marginals

    q(x_t | x_0) = N(alpha(t) x_0, variance(t) I),    sigma = sqrt(variance),

with t rising from data, t = 0, to noise, t = ``t_max``. Everything else follows. It is the
marginal of the linear SDE dx = f(t) x dt + g(t) dw with (Song et al. 2021, arXiv:2011.13456,
and Kingma et al. 2021, arXiv:2107.00630, eq. 15 ff.)

    f = d log alpha / dt,    g^2 = d variance / dt - 2 f variance,
    log_snr = log alpha^2 / variance,

so drift and diffusion cannot disagree with the marginal. Processes are frozen dataclasses
and pytrees, hyper-parameters being leaves: they may be traced, swept without compiling
anew, and trained. The factories below validate; values that are traced are taken on trust.

Two families differ in which primitive is smooth at t = 0. Where variance ~ t (`vp`, chains
of betas), sigma has an infinite slope there and variance is given; where sigma ~ t (`flow`,
`edm`, ...), differentiating sqrt(variance) would be 0/0 and sigma is given.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import numerics
from jaxdiff.typing import Array, Key


class Process(abc.ABC):
    """A Gaussian forward process; all methods act elementwise on times in [0, t_max].

    Time arguments may have any shape, and results have the same shape and dtype.
    """

    @property
    def t_max(self) -> Any:
        """The time of pure noise; 1 unless said otherwise."""
        return 1.0

    @abc.abstractmethod
    def alpha(self, t: Array) -> Array:
        """Scale of the data in x_t."""

    @abc.abstractmethod
    def variance(self, t: Array) -> Array:
        """Variance of the noise in x_t."""

    @abc.abstractmethod
    def time_of_log_snr(self, log_snr: Array) -> Array:
        """The inverse of :meth:`log_snr`."""

    def sigma(self, t: Array) -> Array:
        """Standard deviation of the noise in x_t; its gradient where it is 0 is taken as 0."""
        return numerics.sqrt(self.variance(t))

    def log_snr(self, t: Array) -> Array:
        """log(alpha^2 / variance), falling; +inf where sigma is 0 and -inf where alpha is 0."""
        return 2.0 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def alpha_dot(self, t: Array) -> Array:
        """The time derivative d alpha / dt."""
        return numerics.time_derivative(self.alpha, t)

    def sigma_dot(self, t: Array) -> Array:
        """The time derivative d sigma / dt; +inf at t = 0 where variance starts linearly."""
        return numerics.time_derivative(self.variance, t) / (2.0 * self.sigma(t))

    def drift(self, t: Array) -> Array:
        """The f of dx = f x dt + g dw: d log alpha / dt; -inf where alpha is 0."""
        return self.alpha_dot(t) / self.alpha(t)

    def diffusion_sq(self, t: Array) -> Array:
        """The g^2 of dx = f x dt + g dw: d variance / dt - 2 drift variance."""
        growth = numerics.time_derivative(self.variance, t)
        return growth - 2.0 * self.drift(t) * self.variance(t)

    def prior_sample(self, key: Key, shape: tuple[int, ...], *, dtype: Any = float) -> Array:
        """Draw x_T ~ N(0, variance(t_max) I).

        Args:
            key: one key, or `(B,)` row keys; row i depends on (key, i) only.
            shape: (B, ...).
            dtype: of the result.
        """
        noise = numerics.normal(key, jnp.empty(shape, dtype))
        return self.sigma(jnp.asarray(self.t_max, noise.dtype)) * noise


class _SigmaProcess(Process):
    """A process given by a smooth sigma rather than by its variance."""

    @abc.abstractmethod
    def sigma(self, t: Array) -> Array:
        """Standard deviation of the noise in x_t."""

    def variance(self, t: Array) -> Array:
        """Variance of the noise in x_t."""
        return self.sigma(t) ** 2

    def sigma_dot(self, t: Array) -> Array:
        """The time derivative d sigma / dt, differentiated natively: finite at t = 0."""
        return numerics.time_derivative(self.sigma, t)


class _LinearBeta(Process):
    """What `vp` and `sub_vp` share: the rate beta(t) = beta_min + t (beta_max - beta_min)."""

    beta_min: Any
    beta_max: Any

    def beta(self, t: Array) -> Array:
        """Rate of the noise, linear in t."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Array) -> Array:
        """B(t), the integral of beta from 0 to t."""
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _time_of_integral(self, integral: Array) -> Array:
        slope = self.beta_max - self.beta_min
        root = jnp.sqrt(self.beta_min**2 + 2.0 * slope * integral)
        return 2.0 * integral / (self.beta_min + root)

    def alpha(self, t: Array) -> Array:
        """Scale of the data in x_t: exp(-B/2)."""
        return jnp.exp(-0.5 * self._integral(t))

    def drift(self, t: Array) -> Array:
        """The drift -beta(t) / 2."""
        return -0.5 * self.beta(t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VP(_LinearBeta):
    """See :func:`vp`."""

    beta_min: Any
    beta_max: Any

    def variance(self, t: Array) -> Array:
        """Variance 1 - exp(-B), by expm1: exact in relative terms down to t = 0."""
        return -jnp.expm1(-self._integral(t))

    def log_snr(self, t: Array) -> Array:
        """The log-SNR -log(exp(B) - 1)."""
        return -self._integral(t) - jnp.log(self.variance(t))

    def time_of_log_snr(self, log_snr: Array) -> Array:
        """The time at which B = softplus(-log_snr)."""
        return self._time_of_integral(jax.nn.softplus(-log_snr))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SubVP(_LinearBeta, _SigmaProcess):
    """See :func:`sub_vp`."""

    beta_min: Any
    beta_max: Any

    def sigma(self, t: Array) -> Array:
        """Standard deviation 1 - exp(-B)."""
        return -jnp.expm1(-self._integral(t))

    def time_of_log_snr(self, log_snr: Array) -> Array:
        """The time at which sigma / alpha = 2 sinh(B / 2)."""
        return self._time_of_integral(2.0 * jnp.arcsinh(0.5 * jnp.exp(-0.5 * log_snr)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VE(_SigmaProcess):
    """See :func:`ve`."""

    sigma_min: Any
    sigma_max: Any

    def alpha(self, t: Array) -> Array:
        """Scale of the data in x_t: 1."""
        return jnp.ones_like(numerics.as_time(t))

    def sigma(self, t: Array) -> Array:
        """Standard deviation sigma_min (sigma_max / sigma_min)^t."""
        log_min, log_max = jnp.log(self.sigma_min), jnp.log(self.sigma_max)
        return jnp.exp(log_min + t * (log_max - log_min))

    def time_of_log_snr(self, log_snr: Array) -> Array:
        """The time at which log sigma = -log_snr / 2."""
        log_min, log_max = jnp.log(self.sigma_min), jnp.log(self.sigma_max)
        return (-0.5 * log_snr - log_min) / (log_max - log_min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cosine(_SigmaProcess):
    """See :func:`cosine`."""

    log_snr_shift: Any

    def _parts(self, t: Array) -> tuple[Array, Array, Array]:
        cos = jnp.exp(0.5 * self.log_snr_shift) * jnp.sin(0.5 * jnp.pi * (1.0 - t))  # 0 at t = 1
        sin = jnp.sin(0.5 * jnp.pi * t)
        return cos, sin, jnp.sqrt(cos**2 + sin**2)

    def alpha(self, t: Array) -> Array:
        """Scale of the data in x_t: exactly 0 at t = 1."""
        cos, _, norm = self._parts(t)
        return cos / norm

    def sigma(self, t: Array) -> Array:
        """Standard deviation of the noise in x_t."""
        _, sin, norm = self._parts(t)
        return sin / norm

    def time_of_log_snr(self, log_snr: Array) -> Array:
        """The time at which tan(pi t / 2) = exp((shift - log_snr) / 2)."""
        return 2.0 / jnp.pi * jnp.arctan(jnp.exp(0.5 * (self.log_snr_shift - log_snr)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EDM(_SigmaProcess):
    """See :func:`edm`."""

    sigma_max: Any

    @property
    def t_max(self) -> Any:
        """The time of pure noise: sigma_max."""
        return self.sigma_max

    def alpha(self, t: Array) -> Array:
        """Scale of the data in x_t: 1."""
        return jnp.ones_like(numerics.as_time(t))

    def sigma(self, t: Array) -> Array:
        """Standard deviation t."""
        return numerics.as_time(t)

    def time_of_log_snr(self, log_snr: Array) -> Array:
        """The time exp(-log_snr / 2)."""
        return jnp.exp(-0.5 * log_snr)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flow(_SigmaProcess):
    """See :func:`flow`."""

    def alpha(self, t: Array) -> Array:
        """Scale of the data in x_t: 1 - t."""
        return 1.0 - numerics.as_time(t)

    def sigma(self, t: Array) -> Array:
        """Standard deviation t."""
        return numerics.as_time(t)

    def time_of_log_snr(self, log_snr: Array) -> Array:
        """The time 1 / (1 + exp(log_snr / 2))."""
        return jax.nn.sigmoid(-0.5 * log_snr)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
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
        """Factor alpha as fall * exp(log_rest), fall < 1 only on a last interval ending at 0."""
        position = t * self.num_steps
        index = jnp.clip(jnp.floor(position).astype(int), 0, self.num_steps - 1)
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
        ValueError: if `betas` is not a vector of such numbers.

    Source: Ho et al. 2020 (arXiv:2006.11239), eqs. 2 and 4; zero terminal SNR: Lin et al. 2024
    (arXiv:2305.08891).
    """
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
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1; got {num_steps}.")
    return from_betas(np.linspace(beta_start, beta_end, num_steps))


def _scalar(name: str, value: Any, *, positive: bool = False) -> Any:
    """Check a hyper-parameter where its value is known; return it as a float, or traced."""
    if np.shape(value) != ():
        raise ValueError(f"`{name}` must be one number; got shape {np.shape(value)}.")
    known = numerics.concrete(value)
    if known is None:
        return value
    if not np.issubdtype(known.dtype, np.number) or np.iscomplexobj(known):
        raise TypeError(f"`{name}` must be a real number; got {value!r}.")
    number = float(known)
    if not math.isfinite(number) or (positive and number <= 0.0):
        raise ValueError(f"`{name}` must be {'positive and ' * positive}finite; got {number}.")
    return number


def _all_known(*values: Any) -> bool:
    return all(isinstance(value, float) for value in values)


def vp(beta_min: Any = 0.1, beta_max: Any = 20.0) -> VP:
    """Make the variance-preserving process: alpha = exp(-B/2), variance = 1 - alpha^2.

    B(t) = beta_min t + (beta_max - beta_min) t^2 / 2.

    Raises:
        ValueError: if `beta_min` is not positive or exceeds `beta_max`.

    Source: Song et al. 2021 (arXiv:2011.13456), eqs. 32-33.
    """
    return VP(*_rates(beta_min, beta_max))


def sub_vp(beta_min: Any = 0.1, beta_max: Any = 20.0) -> SubVP:
    """Make the sub-VP process: alpha of `vp`, sigma = 1 - alpha^2.

    Raises:
        ValueError: if `beta_min` is not positive or exceeds `beta_max`.

    Source: Song et al. 2021 (arXiv:2011.13456), eq. 29.
    """
    return SubVP(*_rates(beta_min, beta_max))


def _rates(beta_min: Any, beta_max: Any) -> tuple[Any, Any]:
    beta_min = _scalar("beta_min", beta_min, positive=True)
    beta_max = _scalar("beta_max", beta_max, positive=True)
    if _all_known(beta_min, beta_max) and beta_min > beta_max:
        raise ValueError(
            f"`beta_min` must be at most `beta_max`; got beta_min={beta_min} > beta_max={beta_max}."
        )
    return beta_min, beta_max


def ve(sigma_min: Any = 0.01, sigma_max: Any = 50.0) -> VE:
    """Make the variance-exploding process: alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t.

    sigma(0) is `sigma_min`, not 0: some noise is left at t = 0, and the analytic last step of
    the samplers never applies.

    Raises:
        ValueError: if `sigma_min` is not positive or not below `sigma_max`.

    Source: Song et al. 2021 (arXiv:2011.13456), eqs. 30-31.
    """
    sigma_min = _scalar("sigma_min", sigma_min, positive=True)
    sigma_max = _scalar("sigma_max", sigma_max, positive=True)
    if _all_known(sigma_min, sigma_max) and sigma_min >= sigma_max:
        raise ValueError(
            f"`sigma_min` must be below `sigma_max`; "
            f"got sigma_min={sigma_min} >= sigma_max={sigma_max}."
        )
    return VE(sigma_min, sigma_max)


def cosine(log_snr_shift: Any = 0.0) -> Cosine:
    """Make the cosine process: log_snr = -2 log tan(pi t / 2) + shift, variance preserving.

    Unshifted, alpha = cos(pi t / 2) and sigma = sin(pi t / 2). An image of d times the
    resolution asks for a shift of -2 log d.

    Raises:
        ValueError: if `log_snr_shift` is not finite.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, without its offset s; the shift:
    Hoogeboom et al. 2023 (arXiv:2301.11093), section 3.1.
    """
    return Cosine(_scalar("log_snr_shift", log_snr_shift))


def edm(sigma_max: Any = 80.0) -> EDM:
    """Make the process of EDM: alpha = 1, sigma = t, t_max = `sigma_max`.

    Raises:
        ValueError: if `sigma_max` is not positive.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1.
    """
    return EDM(_scalar("sigma_max", sigma_max, positive=True))


def flow() -> Flow:
    """Make the straight path of flow matching: x_t = (1 - t) x_0 + t eps.

    Time runs from data to noise here as everywhere; the paper's time is 1 - t.

    Source: Lipman et al. 2023 (arXiv:2210.02747), eq. 20 with sigma_min = 0; Liu et al. 2023
    (arXiv:2209.03003), eq. 1.
    """
    return Flow()
