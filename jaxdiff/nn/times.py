r"""What the time of a network is, and the waves that it is embedded by.

The argument t of a network is one number an example. It becomes a vector of sines and cosines,
which a two-layer perceptron takes to the network's width. Networks of this package take log-SNR,
published ones often the number of a step.

**Log-SNR** l is clipped to [-20, 20]: beyond it alpha or sigma is 1 to float32 precision, so
nothing is lost, and the infinite log-SNR at the ends of a schedule is harmless. The embedding is
(cos(w_k l), sin(w_k l)) with angular frequencies w_k spaced geometrically from pi/40 (half a turn
over the range) to 8.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxdiff import checks
from jaxdiff.nn.layers import sinusoidal, waves
from jaxdiff.typing import Array

__all__ = ["MAX_LOG_SNR", "LogSNR", "Steps", "Time"]

MAX_LOG_SNR = 20.0
"""The embedding of log-SNR clips it to [-MAX_LOG_SNR, MAX_LOG_SNR]."""


class Time(abc.ABC):
    """A kind of time. Subclasses are frozen dataclasses."""

    name: ClassVar[str]
    """What a network says that its time is; see :func:`jaxdiff.nn.functional`."""
    width: Any
    """The size of the embedding."""

    @abc.abstractmethod
    def embed(self, time: Array) -> Array:
        """Embed times (B,) as (B, width), in float32 at least."""


@dataclasses.dataclass(frozen=True)
class LogSNR(Time):
    """Log-SNR, infinities allowed; embedded in float32.

    Source: the sinusoids of Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, over the range
    of log-SNR rather than of positions.
    """

    num_frequencies: int = 32
    name: ClassVar[str] = "log_snr"

    def __post_init__(self) -> None:
        checks.count("num_frequencies", self.num_frequencies)

    @property
    def width(self) -> int:
        """Twice the number of frequencies."""
        return 2 * self.num_frequencies

    def embed(self, time: Array) -> Array:
        """Embed log-SNR (B,) as (B, width)."""
        clipped = jnp.clip(time.astype(jnp.float32), -MAX_LOG_SNR, MAX_LOG_SNR)
        frequencies = np.geomspace(math.pi / (2.0 * MAX_LOG_SNR), 8.0, self.num_frequencies)
        return waves(clipped, frequencies)


@dataclasses.dataclass(frozen=True)
class Steps(Time):
    """The number of a step, 0 the first that adds noise; cosines first.

    Args:
        width: of the embedding, even.
        shift: as in :func:`jaxdiff.nn.layers.sinusoidal`.

    Raises:
        TypeError: if `width` is no whole number.
        ValueError: if it is below 2 or odd.

    Source: as :func:`jaxdiff.nn.layers.sinusoidal`, in the order of Dhariwal and Nichol 2021
    (arXiv:2105.05233).
    """

    width: int = 256
    shift: float = 0.0
    name: ClassVar[str] = "step"

    def __post_init__(self) -> None:
        if checks.count("width", self.width, 2) % 2:
            raise ValueError(f"`width` must be even; got {self.width}.")

    def embed(self, time: Array) -> Array:
        """Embed steps (B,) as (B, width)."""
        return sinusoidal(time, self.width, flip=True, shift=self.shift)
