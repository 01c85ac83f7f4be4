r"""EDM's preconditioning: a raw network F between fixed scales.

With the noise level s = sigma / alpha and d = `sigma_data`,

    D(x_t, t) = d^2 / (s^2 + d^2) x_t / alpha
                + s d / sqrt(s^2 + d^2) F(x_t / alpha / sqrt(s^2 + d^2), log(s) / 4),

evaluated through alpha and sigma, so that alpha = 0 divides nothing. The same F gives
v = alpha eps_hat - sigma D with the division by sigma done by hand.

Source: Karras et al. 2022 (arXiv:2206.00364), eq. 7 and table 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxdiff import checks, numerics
from jaxdiff.processes import Process
from jaxdiff.typing import Apply, Array, Key, Network, PyTree


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
        return self._as("x0", x_t, t)

    def v(self, x_t: Array, t: Array) -> Array:
        """Return alpha eps_hat - sigma x0_hat with the division by sigma done by hand."""
        return self._as("v", x_t, t)

    def _as(self, kind: str, x_t: Array, t: Array) -> Array:
        def raw(x: Array, log_snr: Array) -> Array:
            return checks.output("network", self.network(x, edm_noise_level(log_snr)), x)

        return _precondition(self.process, self.sigma_data, kind, raw, x_t, t)


def edm_preconditioned(
    network: Network, process: Process, sigma_data: Any = 0.5
) -> PreconditionedDenoiser:
    """Make a denoiser of a network with EDM's preconditioning.

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


def preconditioned(
    apply: Apply,
    process: Process,
    sigma_data: Any = 0.5,
    *,
    prediction: str = "x0",
    noise_level: str | Callable[[Array], Array] = "edm",
) -> Apply:
    """Give a network EDM's preconditioning: it is trained and sampled as a network of x0, or of v.

    With `weightings.edm` of the same `sigma_data` the loss weighs the raw network's squared error
    by 1 at every time, and its target has unit variance, for data of that standard deviation:

        model = Model(preconditioned(apply, processes.edm()), processes.edm(), "x0")
        loss_fn = losses.denoising(
            model, weighting=weightings.edm(), times=timesteps.draw_log_normal()
        )

    Args:
        apply: ``apply(params, c_in x_t / alpha, noise level, cond, key=key)`` -> (B, ...).
        process: any.
        sigma_data: standard deviation of the data.
        prediction: "x0"; or "v" of the same network, without a division by sigma, which keeps
            the digits of likelihoods.
        noise_level: what the network sees for the time: "edm", log(sigma / alpha) / 4; "log_snr",
            for the networks of `jaxdiff.nn`; or a function of log-SNR.

    Returns:
        A network of (x_t, t), with t of shape () or (B,); its `time` is "t".

    Raises:
        TypeError: if `apply` is no function or `process` no process.
        ValueError: if `sigma_data` is not positive, another prediction is asked for, or the
            network takes another time than it would be given; when called, if it changes the
            shape.

    Source: Karras et al. 2022 (arXiv:2206.00364), eqs. 7 and 8 and table 1.
    """
    form = "(params, x, noise level, cond, *, key) -> (B, ...)"
    checks.function("apply", apply, form, takes=4)
    checks.process(process)
    checks.number("sigma_data", sigma_data, 0.0, above=True)
    checks.choice("prediction", prediction, ("x0", "v"))
    if isinstance(noise_level, str):
        checks.choice("noise_level", noise_level, tuple(NOISE_LEVELS))
        level_of = NOISE_LEVELS[noise_level]
    else:
        checks.function("noise_level", noise_level, "of log-SNR", takes=1)
        level_of = noise_level
    time = getattr(apply, "time", None)
    if time == "t":
        raise ValueError("`apply` takes times: give the network before it went through on_log_snr.")
    if time == "log_snr" and noise_level == "edm":
        raise ValueError('`apply` takes log-SNR for its time: give `noise_level="log_snr"`.')
    if time == "step" and isinstance(noise_level, str):
        raise ValueError(
            "`apply` takes steps for its time: give `noise_level`, a function from log-SNR to the "
            f"step; got {noise_level!r}."
        )

    def apply_at_time(
        params: PyTree, x_t: Array, t: Array, cond: PyTree = None, *, key: Key | None = None
    ) -> Array:
        def raw(x: Array, log_snr: Array) -> Array:
            return checks.output("apply", apply(params, x, level_of(log_snr), cond, key=key), x)

        return _precondition(process, sigma_data, prediction, raw, x_t, t)

    apply_at_time.time = "t"  # type: ignore[attr-defined]
    return apply_at_time


def edm_noise_level(log_snr: Array) -> Array:
    """Return EDM's c_noise, log(sigma / alpha) / 4."""
    return -log_snr / 8.0


NOISE_LEVELS: dict[str, Callable[[Array], Array]] = {
    "edm": edm_noise_level,
    "log_snr": lambda log_snr: log_snr,
}
"""What a preconditioned network sees for the time, by name."""


def _precondition(
    process: Process,
    sigma_data: Any,
    kind: str,
    raw: Callable[[Array, Array], Array],
    x_t: Array,
    t: Array,
) -> Array:
    """Return the x0 or v of a raw network (c_in x_t / alpha, log-SNR () or (B,)) -> (B, ...)."""
    t = numerics.as_time(t).astype(x_t.dtype)
    time = numerics.expand_like(t, x_t)
    alpha, sigma = process.alpha(time), process.sigma(time)
    total = sigma**2 + (alpha * sigma_data) ** 2
    output = raw(x_t / jnp.sqrt(total), process.log_snr(t))
    if kind == "x0":
        skip = alpha * sigma_data**2 / total
        out = sigma * sigma_data / jnp.sqrt(total)
    else:
        skip = alpha * sigma * (1.0 - sigma_data**2) / total
        out = -(alpha**2 + sigma**2) * sigma_data / jnp.sqrt(total)
    return (skip * x_t + out * output).astype(x_t.dtype)
