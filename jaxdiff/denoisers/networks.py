"""A network of any kind as a denoiser, and a denoiser with the conditioning of its rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxdiff import checks, numerics, predictions
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, Network, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """A network of any kind as a denoiser; see :func:`from_network`.

    Attributes:
        network: (x_t (B, ...), t () or (B,)) -> the prediction (B, ...); with `cond` as a third
            argument where the denoiser is called with it.
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
        needs = self.prediction in predictions.SIGNAL_NEEDED
        return f"a network that predicts {self.prediction}" if needs else None

    @property
    def v(self) -> Callable[..., Array] | None:
        """(x_t, t) -> v, without the detour by x0_hat; None where x0_hat is clipped."""
        return None if self.clip is not None else lambda *given: self._as("v", *given)

    def __call__(self, x_t: Array, t: Array, *cond: PyTree) -> Array:
        """Return x0_hat (B, ...) in the dtype of x_t."""
        x0_hat = self._as("x0", x_t, t, *cond)
        return x0_hat if self.clip is None else jnp.clip(x0_hat, -self.clip, self.clip)

    def _as(self, kind: str, x_t: Array, t: Array, *cond: PyTree) -> Array:
        if self.needs_signal is not None:
            predictions.require_signal(self.process, t, self.needs_signal)
        output = checks.output("network", self.network(x_t, t, *cond), x_t)
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
class ConditionedDenoiser:
    """A denoiser of (x_t, t, cond) with its conditioning; see :func:`conditioned`.

    Attributes:
        denoise: (x_t, t, cond) -> x0_hat.
        cond: pytree of (B, ...) leaves.
    """

    denoise: Any
    cond: PyTree

    @property
    def needs_signal(self) -> str | None:
        """That of the denoiser."""
        return getattr(self.denoise, "needs_signal", None)

    @property
    def v(self) -> Callable[[Array, Array], Array] | None:
        """That of the denoiser, which takes `cond` as it does."""
        v = getattr(self.denoise, "v", None)
        return None if v is None else lambda x_t, t: v(x_t, t, self.cond)

    def __call__(self, x_t: Array, t: Array) -> Array:
        """Return x0_hat (B, ...)."""
        return self.denoise(x_t, t, self.cond)


def conditioned(denoise: Any, cond: PyTree) -> Denoiser:
    """Close a denoiser of (x_t, t, cond) over the conditioning of its rows.

    Args:
        denoise: (x_t (B, ...), t, cond) -> x0_hat, such as `Model.denoiser` makes; its `v`, if it
            has one, takes the same.
        cond: pytree of (B, ...) leaves; None leaves a denoiser of (x_t, t) as it is.

    Raises:
        TypeError: if there is conditioning and `denoise` does not take it.
    """
    if cond is None:
        return denoise
    checks.function("denoise", denoise, checks.CONDITIONAL_DENOISER, takes=3)
    return ConditionedDenoiser(denoise, cond)
