"""How fast training is: examples, floating-point operations, and the share of what a device can."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PEAK_FLOPS = {
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61.5e12,
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "V100": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "T4": 65e12,
}
"""Dense bfloat16 (float16 on V100 and T4) operations a second of one JAX device, by the makers'
data sheets; a TPU v3 device is one of its chip's two cores."""


class Work(NamedTuple):
    """What one training step is.

    Attributes:
        examples: in the global batch.
        flops: floating-point operations of the whole step, None where unknown.
        peak: what all devices together can a second, None where unknown.
    """

    examples: int | None = None
    flops: float | None = None
    peak: float | None = None

    def rates(self, steps_per_second: float) -> dict[str, float]:
        """Return what is known of the speed, by name."""
        rates = {"steps_per_second": steps_per_second}
        if self.examples is not None:
            rates["examples_per_second"] = self.examples * steps_per_second
        if self.flops is not None:
            rates["model_flops_per_second"] = self.flops * steps_per_second
            if self.peak is not None:
                rates["utilisation"] = self.flops * steps_per_second / self.peak
        return rates


NO_WORK = Work()


def count_flops(fn: Callable[..., Any], *args: Any) -> float | None:
    """Count the floating-point operations of one call, without running or compiling it.

    They are those that XLA counts in the program as written, before optimisation: with `remat`
    also the recomputed ones, and of a loop one turn.

    Args:
        fn: a pure function.
        *args: arrays, or their shapes.

    Returns:
        The count, or None where the backend does not tell.
    """
    cost = jax.jit(fn).lower(*args).cost_analysis()
    flops = (cost or {}).get("flops", 0.0)
    return float(flops) if flops > 0 else None


def peak_flops(device: jax.Device) -> float | None:
    """Return what a device can do a second at 16 bits, None where it is not in the table."""
    for name, peak in PEAK_FLOPS.items():
        if name in device.device_kind:
            return peak
    return None
