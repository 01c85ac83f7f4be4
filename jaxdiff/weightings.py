r"""Loss weights as functions of log-SNR.

The squared errors of all kinds of prediction are proportional to each other at a given time,
||eps_hat - eps||^2 = SNR ||x0_hat - x0||^2 and so on, so a weighting is a weight *and* the kind
whose squared error it multiplies. :func:`jaxdiff.losses.denoising` converts it, exactly, to
whatever the network predicts: one weighting means the same loss for every network.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff import numerics
from jaxdiff.processes import Process
from jaxdiff.typing import Array

__all__ = ["Weighting", "edm", "likelihood", "min_snr", "simple"]


class Weighting(NamedTuple):
    """A weight on a squared error.

    Attributes:
        on: the kind (see `jaxdiff.predictions`) whose squared error is weighted; None for the
            one that the loss is asked for, `loss_on`.
        weight: (process, t (B,)) -> (B,).
    """

    on: str | None
    weight: Callable[[Process, Array], Array]


def simple() -> Weighting:
    """Weight 1 on the error that the loss is asked for.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 14.
    """
    return Weighting(None, lambda process, t: jnp.ones_like(t))


def min_snr(gamma: float = 5.0) -> Weighting:
    """Weight min(SNR, gamma) on the error of x0.

    Raises:
        ValueError: if `gamma` is known and not positive.

    Source: Hang et al. 2023 (arXiv:2303.09556), section 3.4.
    """
    _check_positive("gamma", gamma)
    return Weighting("x0", lambda process, t: jnp.minimum(jnp.exp(process.log_snr(t)), gamma))


def edm(sigma_data: float = 0.5) -> Weighting:
    """Weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the error of x0, sigma^2 = 1/SNR.

    Raises:
        ValueError: if `sigma_data` is known and not positive.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1 and appendix B.6.
    """
    _check_positive("sigma_data", sigma_data)
    return Weighting("x0", lambda process, t: jnp.exp(process.log_snr(t)) + 1.0 / sigma_data**2)


def likelihood() -> Weighting:
    """Weight -1/2 d log_snr / dt on the error of eps, the same as g^2 / 2 on that of the score.

    With times uniform on (0, t_max], the expected squared norm of the error under this weight
    times t_max is the diffusion term of the variational bound in nats (losses here are means
    over dimensions: multiply by D for norms).

    Source: Song et al. 2021b (arXiv:2101.09258), theorem 1; Kingma et al. 2021 (arXiv:2107.00630),
    eq. 17.
    """

    def weight(process: Process, t: Array) -> Array:
        return 0.5 * process.diffusion_sq(t) / process.variance(t)

    return Weighting("eps", weight)


def _check_positive(name: str, value: float) -> None:
    known = numerics.concrete(value)
    if known is not None and not known > 0:
        raise ValueError(f"`{name}` must be positive; got {value}.")
