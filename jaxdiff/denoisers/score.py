"""From a denoiser to a score."""

import dataclasses

from jaxdiff import checks, numerics, predictions
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser


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
