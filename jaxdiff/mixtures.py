r"""The oracle: Gaussian mixtures, which the forward process leaves Gaussian mixtures.

If p(x_0) = sum_k w_k N(x_0; mu_k, S_k) then, at every time,

    q(x_t)         = sum_k w_k N(x_t; alpha mu_k, C_k),           C_k = alpha^2 S_k + sigma^2 I
    E[x_0 | x_t]   = sum_k r_k(x_t) (mu_k + alpha S_k C_k^{-1} (x_t - alpha mu_k)),

with r_k the responsibilities. Density, score, denoiser and hence the probability flow are
closed forms, against which every sampler, loss and likelihood of this library is checked.

Source: Bishop 2006, Pattern Recognition and Machine Learning, eqs. 2.115-2.117 for each
component and 9.13 for the responsibilities.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.scipy.special import logsumexp

from jaxdiff import checks, numerics
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Key

__all__ = ["Mixture", "MixtureDenoiser"]


@numerics.pytree_dataclass
class Mixture:
    """A mixture of K Gaussians in D dimensions; a pytree of its three arrays.

    Attributes:
        weights: (K,), non-negative, summing to 1.
        means: (K, D).
        covariances: (K, D, D), symmetric and positive semi-definite; densities and scores need
            them definite, which any noise makes them.

    Raises:
        TypeError: if a field holds no floating-point numbers.
        ValueError: if the shapes do not fit, or what is known of them is not so: weights negative
            or not summing to 1, means not finite, covariances not symmetric or with a negative
            eigenvalue.
    """

    weights: Array
    means: Array
    covariances: Array

    def __post_init__(self):
        for field in dataclasses.fields(self):
            array = numerics.as_float(getattr(self, field.name), field.name)
            object.__setattr__(self, field.name, array)
        if self.weights.ndim != 1 or self.weights.shape[0] == 0:
            raise ValueError(f"`weights` must have shape (K,); got {self.weights.shape}.")
        num_components = self.weights.shape[0]
        if self.means.ndim != 2 or self.means.shape[0] != num_components:
            raise ValueError(
                f"`means` must have shape (K, D) with K={num_components}; got {self.means.shape}."
            )
        wanted = (num_components, self.num_dims, self.num_dims)
        if self.covariances.shape != wanted:
            raise ValueError(
                f"`covariances` must have shape (K, D, D) = {wanted}; got {self.covariances.shape}."
            )
        weights = numerics.concrete(self.weights)
        if weights is not None and not (weights.min() >= 0 and abs(weights.sum() - 1) < 1e-5):
            raise ValueError(
                f"`weights` must be non-negative and sum to 1; got {weights}, sum {weights.sum()}."
            )
        means = numerics.concrete(self.means)
        if means is not None and not np.isfinite(means).all():
            raise ValueError(f"`means` must be finite; got {means}.")
        matrices = numerics.concrete(self.covariances)
        if matrices is not None:
            _check_covariances(matrices)

    @property
    def num_dims(self) -> int:
        """D."""
        return self.means.shape[1]

    def log_prob(self, x: Array) -> Array:
        """Return log p(x) in nats, shape (...), for x (..., D)."""
        logits, _, _ = self._components(x)
        return logsumexp(logits, axis=0).reshape(jnp.shape(x)[:-1])

    def score(self, x: Array) -> Array:
        """Return grad log p(x), (..., D), for x (..., D)."""
        logits, deviations, factors = self._components(x)
        shares = jax.nn.softmax(logits, axis=0)
        pulls = jax.vmap(_solve)(factors, deviations)
        return -jnp.sum(shares[:, :, None] * pulls, axis=0).reshape(jnp.shape(x))

    def sample(self, key: Key, n: int) -> Array:
        """Draw n points, (n, D); point i depends on (key, i) only.

        Raises:
            TypeError: if `key` is no typed key or `n` no whole number.
            ValueError: if `n` is negative.
        """
        n = checks.count("n", n, 0)
        key_component, key_noise = numerics.split(key)
        rows = numerics.row_keys(key_component, n)
        component = jax.vmap(lambda row: jax.random.categorical(row, jnp.log(self.weights)))(rows)
        noise = numerics.normal(key_noise, self.means[component])
        values, vectors = jnp.linalg.eigh(self.covariances)  # exists where Cholesky does not
        roots = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[:, None, :]
        return self.means[component] + jnp.einsum("nij,nj->ni", roots[component], noise)

    def diffuse(self, process: Process, t: Array) -> "Mixture":
        """Return the mixture that q(x_t) is at one time t.

        Raises:
            TypeError: if `process` is no process.
            ValueError: if the shape of `t` is not ().
        """
        checks.process(process)
        t = numerics.as_time(t).astype(self.means.dtype)
        if t.ndim != 0:
            raise ValueError(f"`t` must be one time, shape (); got {t.shape}.")
        noise = process.variance(t) * jnp.eye(self.num_dims, dtype=self.means.dtype)
        alpha = process.alpha(t)
        diffused = (self.weights, alpha * self.means, alpha**2 * self.covariances + noise[None])
        return jax.tree.unflatten(jax.tree.structure(self), diffused)

    def denoiser(self, process: Process) -> "MixtureDenoiser":
        """Return the exact denoiser E[x_0 | x_t], for x_t (B, D) and t of shape () or (B,).

        Where sigma is 0 it needs definite covariances, and returns x_t / alpha.

        Raises:
            TypeError: if `process` is no process.
        """
        checks.process(process)

        return MixtureDenoiser(self, process)

    def _components(self, x: Array) -> tuple[Array, Array, Array]:
        """Log of weight times density (K, N), deviations (K, N, D), Cholesky factors (K, D, D)."""
        x = numerics.as_float(x, "x")
        if x.ndim == 0 or x.shape[-1] != self.num_dims:
            raise ValueError(f"`x` must have shape (..., D) with D={self.num_dims}; got {x.shape}.")
        deviations = x.reshape(1, -1, self.num_dims) - self.means[:, None, :]
        factors = jnp.linalg.cholesky(self.covariances)
        whitened = jax.vmap(lambda f, d: solve_triangular(f, d.T, lower=True))(factors, deviations)
        log_det = jnp.sum(jnp.log(jnp.diagonal(factors, axis1=1, axis2=2)), axis=1)
        offsets = jnp.log(self.weights) - log_det - 0.5 * self.num_dims * jnp.log(2.0 * jnp.pi)
        return offsets[:, None] - 0.5 * jnp.sum(whitened**2, axis=1), deviations, factors


@dataclasses.dataclass(frozen=True, eq=False)
class MixtureDenoiser:
    """The exact denoiser of a mixture; see :meth:`Mixture.denoiser`.

    Attributes:
        mixture: of the data.
        process: the forward process.
    """

    mixture: Mixture
    process: Process

    def __call__(self, x_t: Array, t: Array) -> Array:
        """Return E[x_0 | x_t], (B, D)."""
        return _at_times(lambda x_t, t: self._pair(x_t, t)[0], x_t, t)

    def v(self, x_t: Array, t: Array) -> Array:
        """Return alpha E[eps | x_t] - sigma E[x_0 | x_t], (B, D), neither taken from the other."""

        def at_one_time(x_t: Array, t: Array) -> Array:
            x0_hat, eps_hat = self._pair(x_t, t)
            t = t.astype(self.mixture.means.dtype)
            return self.process.alpha(t) * eps_hat - self.process.sigma(t) * x0_hat

        return _at_times(at_one_time, x_t, t)

    def _pair(self, x_t: Array, t: Array) -> tuple[Array, Array]:
        """Return the means of x_0 and of eps at one time."""
        mixture, process = self.mixture, self.process
        logits, deviations, factors = mixture.diffuse(process, t)._components(x_t)
        shares = jax.nn.softmax(logits, axis=0)[:, :, None]
        pulls = jax.vmap(_solve)(factors, deviations)
        t = t.astype(mixture.means.dtype)
        moves = process.alpha(t) * jnp.einsum("kij,knj->kni", mixture.covariances, pulls)
        x0_hat = jnp.sum(shares * (mixture.means[:, None, :] + moves), axis=0)
        eps_hat = process.sigma(t) * jnp.sum(shares * pulls, axis=0)
        return x0_hat.reshape(x_t.shape), eps_hat.reshape(x_t.shape)


def _at_times(at_one_time: Callable[[Array, Array], Array], x_t: Array, t: Array) -> Array:
    t = numerics.as_time(t)
    if t.ndim == 0:
        return at_one_time(x_t, t)
    numerics.expand_like(t, x_t)
    return jax.vmap(at_one_time)(x_t, t)


def _check_covariances(matrices: np.ndarray) -> None:
    if not np.isfinite(matrices).all():
        raise ValueError(f"`covariances` must be finite; got {matrices}.")
    if not np.allclose(matrices, matrices.swapaxes(1, 2), rtol=1e-4):
        raise ValueError("`covariances` must be symmetric matrices.")
    values = np.linalg.eigvalsh(matrices)
    rounding = 1e-4 * np.abs(values).max(axis=1, initial=0.0)
    if (values.min(axis=1, initial=0.0) < -rounding).any():
        raise ValueError(
            f"`covariances` must have no negative eigenvalue; got {values.min():g} at least."
        )


def _solve(factor: Array, deviations: Array) -> Array:
    return cho_solve((factor, True), deviations.T).T
