"""Guidance as command lines ask for it, whatever the model: its rules, its numbers, its denoiser.

Scale and interval are parts of a model's parameters, so one compiled program takes any.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from experiments.common.command import Refusal
from jaxdiff import guidance
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, PyTree

RULES = {
    "linear": guidance.linear,
    "rescaled": guidance.rescaled(0.7),
    "projected": guidance.projected(),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """How and where guidance acts; how much is said beside it."""

    rule: Literal["linear", "rescaled", "projected"] = "linear"
    """How the difference acts: as it is, rescaled by 0.7 to the contrast of the model, or only
    across what the model says."""
    interval: tuple[float, float] | None = None
    """LOW HIGH: guide only where LOW <= sigma / alpha <= HIGH."""

    def check_numbers(self, scale: float) -> None:
        """Refuse a scale or an interval that cannot be meant.

        Raises:
            Refusal: naming the option.
        """
        if not math.isfinite(scale):
            raise Refusal(f"--guidance-scale must be finite; got {scale}.")
        if self.interval is None:
            return
        low, high = self.interval
        if not 0.0 <= low <= high:
            raise Refusal(
                "--interval must be LOW HIGH with 0 <= LOW <= HIGH, levels sigma / alpha; "
                f"got {low:g} {high:g}."
            )

    def record_of(self, scale: float) -> dict[str, Any]:
        """Return what images that it acts on are recorded with."""
        interval = None if self.interval is None else list(self.interval)
        return {"scale": scale, "rule": self.rule, "interval": interval}

    def numbers(self, scale: float) -> dict[str, Any]:
        """Return scale and interval, as parts of a model's parameters."""
        low, high = self.interval or (0.0, 0.0)
        float_type = jnp.zeros(()).dtype.type
        numbers = {"scale": scale, "low": low, "high": high}
        return {name: float_type(number) for name, number in numbers.items()}

    def within(
        self, process: Process, guided: Denoiser, model: Denoiser, numbers: Mapping[str, Any]
    ) -> Denoiser:
        """Let a guided denoiser act within the interval, and the model alone outside of it."""
        if self.interval is None:
            return guided
        return guidance.interval(process, guided, model, numbers["low"], numbers["high"])


@dataclasses.dataclass(frozen=True, eq=False)
class GuidedDenoiser:
    """A guided denoiser of the conditioning of its rows.

    Attributes:
        of: cond -> the guided denoiser.
        needs_signal: see `typing.Denoiser`.
        has_v: whether what `of` gives has a `v`: see there too.
    """

    of: Callable[[PyTree], Denoiser]
    needs_signal: str | None
    has_v: bool = False

    @property
    def v(self) -> Callable[..., Array] | None:
        """(x_t, t, cond) -> v, where the guidance is linear."""
        if not self.has_v:
            return None
        return lambda x_t, t, cond=None: getattr(self.of(cond), "v")(x_t, t)  # noqa: B009

    def __call__(self, x_t: Array, t: Array, cond: PyTree = None) -> Array:
        """Return x0_hat (B, ...)."""
        return self.of(cond)(x_t, t)
