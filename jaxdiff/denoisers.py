"""From a network to a denoiser (x_t, t) -> x0_hat, and from that to a score."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxdiff import checks, numerics, predictions
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, Network

__all__ = [
    "DenoiserScore",
    "NetworkDenoiser",
    "PreconditionedDenoiser",
    "edm_preconditioned",
    "from_network",
    "to_score",
]


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """A network of any kind as a denoiser; see :func:`from_network`.

    Attributes:
        network: (x_t (B, ...), t () or (B,)) -> the prediction (B, ...).
        process: the one that it was trained on.
        prediction: its kind.
        clip: the limit of x0_hat, or None.
    """

    network: Network
    process: Process
    prediction: str
    clip: Any = None

    @property
    def needs_signal(self) -> str | None:
        """Who cannot be asked where alpha is 0; None where it can be asked everywhere."""
        return f"a network that predicts {self.prediction}" if self._holds_no_x0 else None

    @property
    def v(self) -> Callable[[Array, Array], Array] | None:
        """(x_t, t) -> v, without the detour by x0_hat; None where x0_hat is clipped."""
        return None if self.clip is not None else lambda x_t, t: self._as("v", x_t, t)

    def __call__(self, x_t: Array, t: Array) -> Array:
        """Return x0_hat (B, ...) in the dtype of x_t."""
        x0_hat = self._as("x0", x_t, t)
        return x0_hat if self.clip is None else jnp.clip(x0_hat, -self.clip, self.clip)

    @property
    def _holds_no_x0(self) -> bool:
        return self.prediction in ("eps", "score")

    def _as(self, kind: str, x_t: Array, t: Array) -> Array:
        if self.needs_signal is not None:
            predictions.require_signal(self.process, t, self.needs_signal)
        output = checks.output("network", self.network(x_t, t), x_t)
        t = numerics.as_time(t).astype(x_t.dtype)
        converted = predictions.convert(self.process, self.prediction, kind, output, x_t, t)
        return converted.astype(x_t.dtype)


def from_network(
    network: Network, process: Process, prediction: str = "eps", clip: Any = None
) -> NetworkDenoiser:
    """Make a denoiser of a network that predicts any kind.

    Args:
        network: (x_t (B, ...), t () or (B,)) -> the prediction (B, ...), in any float dtype.
        process: the one that the network was trained on.
        prediction: what it predicts, one of `predictions.KINDS`. eps and score hold no x0 where
            alpha = 0: start those from t_start < t_max where alpha(t_max) = 0.
        clip: limit x0_hat to [-clip, clip].

    Returns:
        The denoiser; it computes in the dtype of x_t whatever the network's. Unless it clips, it
        also gives its v as it is, which keeps digits where x0_hat is nearly x_t / alpha.

    Raises:
        TypeError: if `network` is no function, `process` no process, or the output no array.
        ValueError: if the kind is unknown, `clip` is negative, the network's output has another
            shape than x_t, or an eps or score network is asked at a known time of alpha = 0.
    """
    checks.function("network", network, "(x_t, t) -> the prediction, in the shape of x_t", takes=2)
    checks.process(process)
    predictions.check_kind("prediction", prediction)
    if clip is not None:
        checks.number("clip", clip, 0.0, infinite=True)
    return NetworkDenoiser(network, process, prediction, clip)


@dataclasses.dataclass(frozen=True, eq=False)
class PreconditionedDenoiser:
    """A network with EDM's preconditioning as a denoiser; see :func:`edm_preconditioned`.

    Attributes:
        network: (c_in x_t / alpha (B, ...), log(s) / 4 of shape () or (B,)) -> (B, ...).
        process: any.
        sigma_data: standard deviation of the data.
    """

    network: Network
    process: Process
    sigma_data: Any = 0.5

    def __call__(self, x_t: Array, t: Array) -> Array:
        """Return x0_hat (B, ...) in the dtype of x_t."""
        output, alpha, sigma, total = self._evaluate(x_t, t)
        skip = alpha * self.sigma_data**2 / total
        out = sigma * self.sigma_data / jnp.sqrt(total)
        return (skip * x_t + out * output).astype(x_t.dtype)

    def v(self, x_t: Array, t: Array) -> Array:
        """Return alpha eps_hat - sigma x0_hat with the division by sigma done by hand."""
        output, alpha, sigma, total = self._evaluate(x_t, t)
        radius_sq = alpha**2 + sigma**2
        skip = alpha * sigma * (1.0 - self.sigma_data**2) / total
        out = radius_sq * self.sigma_data / jnp.sqrt(total)
        return (skip * x_t - out * output).astype(x_t.dtype)

    def _evaluate(self, x_t: Array, t: Array) -> tuple[Array, Array, Array, Array]:
        t = numerics.as_time(t).astype(x_t.dtype)
        time = numerics.expand_like(t, x_t)
        alpha, sigma = self.process.alpha(time), self.process.sigma(time)
        total = sigma**2 + (alpha * self.sigma_data) ** 2
        noise_level = -self.process.log_snr(t) / 8.0
        output = self.network(x_t / jnp.sqrt(total), noise_level)
        return checks.output("network", output, x_t), alpha, sigma, total


def edm_preconditioned(
    network: Network, process: Process, sigma_data: Any = 0.5
) -> PreconditionedDenoiser:
    r"""Make a denoiser of a network with EDM's preconditioning.

    With the noise level s = sigma / alpha and d = `sigma_data`,

        D(x_t, t) = d^2 / (s^2 + d^2) x_t / alpha
                    + s d / sqrt(s^2 + d^2) network(x_t / alpha / sqrt(s^2 + d^2), log(s) / 4),

    evaluated through alpha and sigma, so that alpha = 0 divides nothing.

    Args:
        network: (c_in x_t / alpha (B, ...), log(s) / 4 of shape () or (B,)) -> (B, ...).
        process: any.
        sigma_data: standard deviation of the data.

    Raises:
        TypeError: if `network` is no function or `process` no process.
        ValueError: if `sigma_data` is not positive or the network changes the shape.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 7 and table 1.
    """
    checks.function("network", network, "(x, log(s) / 4) -> the output, in the shape of x", takes=2)
    checks.process(process)
    checks.number("sigma_data", sigma_data, 0.0, above=True)
    return PreconditionedDenoiser(network, process, sigma_data)


@dataclasses.dataclass(frozen=True, eq=False)
class DenoiserScore:
    """The score of a denoiser; see :func:`to_score`.

    Attributes:
        process: the forward process, whose times the score takes.
        denoise: the denoiser.
    """

    process: Process
    denoise: Denoiser

    @property
    def needs_signal(self) -> str | None:
        """That of the denoiser."""
        return getattr(self.denoise, "needs_signal", None)

    def __call__(self, x_t: Array, t: Array) -> Array:
        """Return the score (B, ...)."""
        t = numerics.as_time(t).astype(x_t.dtype)
        kind, known = "v", getattr(self.denoise, "v", None)
        if known is None:
            kind, known = "x0", self.denoise
        value = checks.output("denoise", known(x_t, t), x_t)
        return predictions.convert(self.process, kind, "score", value, x_t, t)


def to_score(process: Process, denoise: Denoiser) -> DenoiserScore:
    """Make the score grad log q(x_t) = (alpha x0_hat - x_t) / variance of a denoiser.

    Args:
        process: the forward process.
        denoise: the denoiser.

    Returns:
        (x_t (B, ...), t of shape () or (B,)) -> the score (B, ...), infinite where sigma = 0.

    Raises:
        TypeError: if `process` is no process or `denoise` no function.
        ValueError: when called, if the denoiser changes the shape.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 3, with x_t = alpha y.
    """
    checks.process(process)
    checks.function("denoise", denoise, checks.DENOISER, takes=2)
    return DenoiserScore(process, denoise)
