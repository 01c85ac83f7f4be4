"""What every process is: alpha and variance, and all that follows from them."""

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import checks, numerics
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

    def time_of_log_snr(self, log_snr: Array) -> Array:
        """The inverse of :meth:`log_snr`; beyond its values, the time of its nearest.

        Found by bisection where a process has no closed form, and differentiable.
        """
        target = numerics.as_time(log_snr)
        t = jax.lax.stop_gradient(self._bisected(target))
        slope = jax.lax.stop_gradient(numerics.time_derivative(self.log_snr, t))
        inside = jnp.isfinite(slope) & (slope < 0) & (t > 0) & (t < self.t_max)
        safe = jnp.where(inside, t, 0.5 * jnp.asarray(self.t_max, t.dtype))
        newton = (target - self.log_snr(safe)) / jnp.where(inside, slope, 1.0)
        return jnp.where(inside, jnp.clip(safe + newton, 0.0, self.t_max), t).astype(target.dtype)

    def _bisected(self, target: Array) -> Array:
        def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = 0.5 * (low + high)
            early = self.log_snr(middle) > target
            return jnp.where(early, middle, low), jnp.where(early, high, middle)

        ends = jnp.zeros_like(target), jnp.full_like(target, self.t_max)
        halvings = 3 * jnp.finfo(target.dtype).nmant  # times near 0 to full precision too
        low, high = jax.lax.fori_loop(0, halvings, halve, ends)
        return jnp.where(self.log_snr(jnp.zeros_like(target)) <= target, low, high)

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

    def prior_sample(
        self, key: Key, shape: tuple[int, ...], *, dtype: Any = float, t: Any = None
    ) -> Array:
        """Draw x_t ~ N(0, variance(t) I), the noise that a sampler starts from.

        Args:
            key: one key, or `(B,)` row keys; row i depends on (key, i) only.
            shape: (B, ...).
            dtype: of the result, floating point.
            t: the first time of the sampler's grid, in [0, t_max]; by default t_max.

        Raises:
            TypeError: if `key` is no typed key, `shape` no tuple of whole numbers, or `dtype`
                holds no floating-point numbers.
            ValueError: if `shape` is empty, or `t` is known and out of range.
        """
        if not isinstance(shape, tuple | list):
            raise TypeError(f"`shape` must be a tuple (B, ...); got {checks.shown(shape)}.")
        if len(shape) == 0:
            raise ValueError("`shape` must have a leading batch axis; got ().")
        shape = tuple(checks.count(f"shape[{i}]", size) for i, size in enumerate(shape))
        if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise TypeError(f"`dtype` must be a floating-point one; got {jnp.dtype(dtype)}.")
        if t is None:
            t = self.t_max
        else:
            last = numerics.concrete(self.t_max)
            checks.number("t", t, 0.0, math.inf if last is None else float(last) * (1 + 1e-6))
        noise = numerics.normal(key, jnp.empty(shape, dtype))
        return self.sigma(jnp.asarray(t, noise.dtype)) * noise


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
    checks.number(name, value, 0.0 if positive else -math.inf, above=positive)
    known = numerics.concrete(value)
    return value if known is None else float(known)
