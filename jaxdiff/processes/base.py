"""What every process is: alpha and variance, and all that follows from them."""

import abc
import math
from typing import Any

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


class SigmaProcess(Process):
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


def scalar(name: str, value: Any, *, positive: bool = False) -> Any:
    """Check a hyper-parameter where its value is known; return it as a float, or traced.

    Raises:
        TypeError: if it is no real number.
        ValueError: if it is not finite, or not positive where it must be.
    """
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
