r"""Loss weights as functions of log-SNR.

The squared errors of all kinds of prediction are proportional to each other at a given time,
||eps_hat - eps||^2 = SNR ||x0_hat - x0||^2 and so on, so a weighting is a weight *and* the kind
whose squared error it multiplies. :func:`jaxdiff.losses.denoising` converts it, exactly, to
whatever the network predicts: one weighting means the same loss for every network.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff import checks, numerics, predictions
from jaxdiff.processes import Process
from jaxdiff.typing import Array

__all__ = ["Weighting", "edm", "likelihood", "min_snr", "simple"]


class Weighting(NamedTuple):
    """A weight on a squared error.

    Attributes:
        on: the kind (see `jaxdiff.predictions`) whose squared error is weighted; None for the
            one that the loss is asked for, `loss_on`.
        weight: (process, t (B,)) -> (B,).
        of_kind: (process, t (B,), kind) -> (B,): the weight that this is on the squared error of
            another kind, where the product of `weight` and the squared ratio of the errors is 0
            times infinity at an end of the process. By default that product.
    """

    on: str | None
    weight: Callable[[Process, Array], Array]
    of_kind: Callable[[Process, Array, str], Array] | None = None


def simple() -> Weighting:
    """Weight 1 on the error that the loss is asked for.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 14.
    """
    return Weighting(None, lambda process, t: jnp.ones_like(t))


def min_snr(gamma: float = 5.0) -> Weighting:
    """Weight min(SNR, gamma) on the error of x0: 1 on that of eps where SNR <= gamma.

    Raises:
        TypeError: if `gamma` is no real number.
        ValueError: if `gamma` is known and not positive.

    Source: Hang et al. 2023 (arXiv:2303.09556), section 3.4.
    """
    checks.number("gamma", gamma, 0.0, above=True)

    def of_kind(process: Process, t: Array, kind: str) -> Array:
        on_eps, on_x0 = _squared_ratios(process, t, kind)
        return jnp.minimum(on_eps, gamma * on_x0)

    return Weighting(
        "x0", lambda process, t: jnp.minimum(jnp.exp(process.log_snr(t)), gamma), of_kind
    )


def edm(sigma_data: float = 0.5) -> Weighting:
    """Weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the error of x0, sigma^2 = 1/SNR.

    Raises:
        TypeError: if `sigma_data` is no real number.
        ValueError: if `sigma_data` is known and not positive.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1 and appendix B.6.
    """
    checks.number("sigma_data", sigma_data, 0.0, above=True)

    def of_kind(process: Process, t: Array, kind: str) -> Array:
        on_eps, on_x0 = _squared_ratios(process, t, kind)
        return on_eps + on_x0 / sigma_data**2

    return Weighting(
        "x0", lambda process, t: jnp.exp(process.log_snr(t)) + 1.0 / sigma_data**2, of_kind
    )


def likelihood() -> Weighting:
    r"""Weight -1/2 d log_snr / dt on the error of eps, the same as g^2 / 2 on that of the score.

    With times uniform on (0, t_max], the expected squared norm of the error under this weight
    times t_max is the diffusion term of the variational bound in nats (losses here are means
    over dimensions: multiply by D for norms).

    On the error of kind k, which is c_k times that of a common direction, it is
    alpha (alpha sigma' - alpha' sigma) / (sigma c_k^2), with one factor alpha cancelled where c_k
    has it: 0 at alpha = 0 on x0, v and velocity, infinite there on eps and the score.

    Source: Song et al. 2021b (arXiv:2101.09258), theorem 1; Kingma et al. 2021 (arXiv:2107.00630),
    eq. 17.
    """

    def of_kind(process: Process, t: Array, kind: str) -> Array:
        alpha, variance = process.alpha(t), process.variance(t)
        # sigma (alpha sigma' - alpha' sigma), by the variance, whose slope is finite at t = 0
        slope = 0.5 * alpha * numerics.time_derivative(process.variance, t)
        slope -= process.alpha_dot(t) * variance
        factors: dict[str, Callable[[], Array]] = {
            "x0": lambda: alpha * slope / variance**2,
            "eps": lambda: slope / (alpha * variance),
            "v": lambda: alpha * slope / (variance * (alpha**2 + variance) ** 2),
            "score": lambda: slope / alpha,
            "velocity": lambda: alpha / slope,
        }
        return factors[kind]()

    return Weighting("eps", lambda process, t: of_kind(process, t, "eps"), of_kind)


def _squared_ratios(process: Process, t: Array, kind: str) -> tuple[Array, Array]:
    """Return the squared errors of eps and of x0 over that of a kind."""
    on_eps, on_x0 = (predictions.error_ratio(process, on, kind, t) for on in ("eps", "x0"))
    return on_eps**2, on_x0**2
