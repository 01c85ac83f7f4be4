"""Processes in continuous time, each class followed by the function that makes it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import numerics
from jaxdiff.processes.base import Process, SigmaProcess, scalar
from jaxdiff.typing import Array


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


def _rates(beta_min: Any, beta_max: Any) -> tuple[Any, Any]:
    beta_min = scalar("beta_min", beta_min, positive=True)
    beta_max = scalar("beta_max", beta_max, positive=True)
    if _all_known(beta_min, beta_max) and beta_min > beta_max:
        raise ValueError(
            f"`beta_min` must be at most `beta_max`; got beta_min={beta_min} > beta_max={beta_max}."
        )
    return beta_min, beta_max


def _all_known(*values: Any) -> bool:
    return all(isinstance(value, float) for value in values)


@numerics.pytree_dataclass
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


def vp(beta_min: Any = 0.1, beta_max: Any = 20.0) -> VP:
    """Make the variance-preserving process: alpha = exp(-B/2), variance = 1 - alpha^2.

    B(t) = beta_min t + (beta_max - beta_min) t^2 / 2.

    Raises:
        ValueError: if `beta_min` is not positive or exceeds `beta_max`.

    Source: Song et al. 2021 (arXiv:2011.13456), eqs. 32-33.
    """
    return VP(*_rates(beta_min, beta_max))


@numerics.pytree_dataclass
class SubVP(_LinearBeta, SigmaProcess):
    """See :func:`sub_vp`."""

    beta_min: Any
    beta_max: Any

    def sigma(self, t: Array) -> Array:
        """Standard deviation 1 - exp(-B)."""
        return -jnp.expm1(-self._integral(t))

    def time_of_log_snr(self, log_snr: Array) -> Array:
        """The time at which sigma / alpha = 2 sinh(B / 2)."""
        return self._time_of_integral(2.0 * jnp.arcsinh(0.5 * jnp.exp(-0.5 * log_snr)))


def sub_vp(beta_min: Any = 0.1, beta_max: Any = 20.0) -> SubVP:
    """Make the sub-VP process: alpha of `vp`, sigma = 1 - alpha^2.

    Raises:
        ValueError: if `beta_min` is not positive or exceeds `beta_max`.

    Source: Song et al. 2021 (arXiv:2011.13456), eq. 29.
    """
    return SubVP(*_rates(beta_min, beta_max))


@numerics.pytree_dataclass
class VE(SigmaProcess):
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


def ve(sigma_min: Any = 0.01, sigma_max: Any = 50.0) -> VE:
    """Make the variance-exploding process: alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t.

    sigma(0) is `sigma_min`, not 0: some noise is left at t = 0, and the analytic last step of
    the samplers never applies.

    Raises:
        ValueError: if `sigma_min` is not positive or not below `sigma_max`.

    Source: Song et al. 2021 (arXiv:2011.13456), eqs. 30-31.
    """
    sigma_min = scalar("sigma_min", sigma_min, positive=True)
    sigma_max = scalar("sigma_max", sigma_max, positive=True)
    if _all_known(sigma_min, sigma_max) and sigma_min >= sigma_max:
        raise ValueError(
            f"`sigma_min` must be below `sigma_max`; "
            f"got sigma_min={sigma_min} >= sigma_max={sigma_max}."
        )
    return VE(sigma_min, sigma_max)


@numerics.pytree_dataclass
class Cosine(SigmaProcess):
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


def cosine(log_snr_shift: Any = 0.0) -> Cosine:
    """Make the cosine process: log_snr = -2 log tan(pi t / 2) + shift, variance preserving.

    Unshifted, alpha = cos(pi t / 2) and sigma = sin(pi t / 2). An image of d times the
    resolution asks for a shift of -2 log d.

    Raises:
        ValueError: if `log_snr_shift` is not finite.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, without its offset s; the shift:
    Hoogeboom et al. 2023 (arXiv:2301.11093), section 3.1.
    """
    return Cosine(scalar("log_snr_shift", log_snr_shift))


@numerics.pytree_dataclass
class EDM(SigmaProcess):
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


def edm(sigma_max: Any = 80.0) -> EDM:
    """Make the process of EDM: alpha = 1, sigma = t, t_max = `sigma_max`.

    Raises:
        ValueError: if `sigma_max` is not positive.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1.
    """
    return EDM(scalar("sigma_max", sigma_max, positive=True))


@numerics.pytree_dataclass
class Flow(SigmaProcess):
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


def flow() -> Flow:
    """Make the straight path of flow matching: x_t = (1 - t) x_0 + t eps.

    Time runs from data to noise here as everywhere; the paper's time is 1 - t.

    Source: Lipman et al. 2023 (arXiv:2210.02747), eq. 20 with sigma_min = 0; Liu et al. 2023
    (arXiv:2209.03003), eq. 1.
    """
    return Flow()
