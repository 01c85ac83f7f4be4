"""From a network to a denoiser (x_t, t) -> x0_hat, and from that to a score."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxdiff import numerics, predictions
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, Network


def from_network(
    network: Network, process: Process, prediction: str = "eps", clip: Any = None
) -> Denoiser:
    """Make a denoiser of a network that predicts any kind.

    Args:
        network: (x_t (B, ...), t () or (B,)) -> the prediction (B, ...), in any float dtype.
        process: the one that the network was trained on.
        prediction: what it predicts, one of `predictions.KINDS`. eps and score hold no x0 where
            alpha = 0: start those from t_start < t_max where alpha(t_max) = 0.
        clip: limit x0_hat to [-clip, clip].

    Returns:
        The denoiser; it computes in the dtype of x_t whatever the network's.

    Raises:
        ValueError: if the kind is unknown, `clip` is negative, the network's output has another
            shape than x_t, or an eps or score network is asked at a known time of alpha = 0.
    """
    predictions.check_kind("prediction", prediction)
    known = numerics.concrete(clip) if clip is not None else None
    if known is not None and not known >= 0:
        raise ValueError(f"`clip` must be at least 0; got {clip}.")
    needs_signal = prediction in ("eps", "score")

    def denoise(x_t: Array, t: Array) -> Array:
        if needs_signal:
            predictions.require_signal(process, t, f"a network that predicts {prediction}")
        output = _check_output(network(x_t, t), x_t)
        t = numerics.as_time(t).astype(x_t.dtype)
        x0_hat = predictions.convert(process, prediction, "x0", output, x_t, t).astype(x_t.dtype)
        return x0_hat if clip is None else jnp.clip(x0_hat, -clip, clip)

    if needs_signal:
        denoise.needs_signal = f"a network that predicts {prediction}"  # type: ignore[attr-defined]
    return denoise


def edm_preconditioned(network: Network, process: Process, sigma_data: Any = 0.5) -> Denoiser:
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
        ValueError: if `sigma_data` is not positive or the network changes the shape.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 7 and table 1.
    """
    known = numerics.concrete(sigma_data)
    if known is not None and not known > 0:
        raise ValueError(f"`sigma_data` must be positive; got {sigma_data}.")

    def denoise(x_t: Array, t: Array) -> Array:
        t = numerics.as_time(t).astype(x_t.dtype)
        time = numerics.expand_like(t, x_t)
        alpha, sigma = process.alpha(time), process.sigma(time)
        total = sigma**2 + (alpha * sigma_data) ** 2
        output = _check_output(network(x_t / jnp.sqrt(total), -process.log_snr(t) / 8.0), x_t)
        skip = alpha * sigma_data**2 / total
        out = sigma * sigma_data / jnp.sqrt(total)
        return (skip * x_t + out * output).astype(x_t.dtype)

    return denoise


def to_score(process: Process, denoise: Denoiser) -> Callable[[Array, Array], Array]:
    """Make the score grad log q(x_t) = (alpha x0_hat - x_t) / variance of a denoiser.

    Args:
        process: the forward process.
        denoise: the denoiser.

    Returns:
        (x_t (B, ...), t of shape () or (B,)) -> the score (B, ...), infinite where sigma = 0.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 3, with x_t = alpha y.
    """

    def score(x_t: Array, t: Array) -> Array:
        t = numerics.as_time(t).astype(x_t.dtype)
        return predictions.convert(process, "x0", "score", denoise(x_t, t), x_t, t)

    return score


def _check_output(output: Array, x_t: Array) -> Array:
    """Return what a network gave in the dtype of its input, if it has the shape of it."""
    if jnp.shape(output) != x_t.shape:
        raise ValueError(
            f"`network` must return the shape of x_t, {x_t.shape}; got {jnp.shape(output)}."
        )
    return output.astype(x_t.dtype)
