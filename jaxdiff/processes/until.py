"""A process that ends early."""

import math
from typing import Any

from jaxdiff import checks, numerics
from jaxdiff.processes.base import Process
from jaxdiff.typing import Array


@numerics.pytree_dataclass
class Until(Process):
    """See :func:`until`; `end` is its t_max."""

    process: Process
    end: Any

    @property
    def t_max(self) -> Any:
        """Where it ends."""
        return self.end

    def alpha(self, t: Array) -> Array:
        """Scale of the data in x_t."""
        return self.process.alpha(t)

    def variance(self, t: Array) -> Array:
        """Variance of the noise in x_t."""
        return self.process.variance(t)

    def sigma(self, t: Array) -> Array:
        """Standard deviation of the noise in x_t."""
        return self.process.sigma(t)

    def log_snr(self, t: Array) -> Array:
        """The log-SNR."""
        return self.process.log_snr(t)

    def time_of_log_snr(self, log_snr: Array) -> Array:
        """The inverse of log_snr."""
        return self.process.time_of_log_snr(log_snr)

    def alpha_dot(self, t: Array) -> Array:
        """The time derivative d alpha / dt."""
        return self.process.alpha_dot(t)

    def sigma_dot(self, t: Array) -> Array:
        """The time derivative d sigma / dt."""
        return self.process.sigma_dot(t)

    def drift(self, t: Array) -> Array:
        """The f of dx = f x dt + g dw."""
        return self.process.drift(t)

    def diffusion_sq(self, t: Array) -> Array:
        """The g^2 of dx = f x dt + g dw."""
        return self.process.diffusion_sq(t)


def until(process: Process, t_max: Any) -> Until:
    """Make a process end at a time before its own, with the signal and the noise that it has there.

    Samples and likelihoods of what needs signal end where `timesteps.start` says:
    ``until(process, timesteps.start(process, model.needs_signal))``.

    Args:
        process: any.
        t_max: the end, in (0, process.t_max].

    Raises:
        TypeError: if `process` is no process or `t_max` no real number.
        ValueError: if `t_max` is known and out of range.
    """
    checks.process(process)
    last = numerics.concrete(process.t_max)
    most = math.inf if last is None else float(last) * (1.0 + 1e-6)
    checks.number("t_max", t_max, 0.0, most, above=True)
    return Until(process, t_max)
