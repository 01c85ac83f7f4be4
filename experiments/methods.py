"""Every sampler by name, for command lines and comparisons."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp

from jaxdiff import denoisers, samplers
from jaxdiff.processes import Process
from jaxdiff.samplers import Sampler
from jaxdiff.typing import Denoiser

MethodName = Literal[
    "ddim",
    "ddim_eta_1",
    "ancestral",
    "ancestral_upper",
    "euler",
    "heun",
    "euler_maruyama",
    "edm",
    "edm_churn",
    "dpm_solver_pp_1",
    "dpm_solver_pp_2",
    "dpm_solver_pp_3",
    "dpm_solver_pp_sde",
    "unipc_1",
    "unipc_2",
    "unipc_3",
    "deis_2",
    "deis_3",
    "deis_4",
    "predictor_corrector",
    "adaptive",
]
LOW_LOG_SNR = -8.0
"""Where what needs signal starts, where the process has none left at t_max."""
SIGNAL_NEEDED = ("eps", "score")
"""Predictions from which x0 cannot be had at alpha = 0."""

NAMES: tuple[str, ...] = get_args(MethodName)


class Method(NamedTuple):
    """A sampler and what a comparison must know of it.

    Attributes:
        make: the sampler of a process and a denoiser.
        order: of convergence; None where the sampler draws noise, or is adaptive.
        calls_a_step: evaluations of the network a step; a step to sigma = 0 takes one.
        needs_signal: whether it cannot start where alpha = 0.
    """

    make: Callable[[Process, Denoiser], Sampler]
    order: int | None = None
    calls_a_step: int = 1
    needs_signal: bool = False

    def start(self, process: Process, prediction: str | None = None) -> Any:
        """Return the time that the method starts at with a network of a prediction."""
        return start(process, prediction, needs_signal=self.needs_signal)

    def calls(self, num_steps: int, *, to_data: bool = True) -> int:
        """Return the evaluations of so many steps, the last of them to sigma = 0 or not."""
        return self.calls_a_step * num_steps - (to_data and self.calls_a_step > 1)


def start(process: Process, prediction: str | None, *, needs_signal: bool = False) -> Any:
    """Return the time that samples and likelihoods start or end at: t_max, where they can.

    Args:
        process: its hyper-parameters known.
        prediction: of the network; None for a denoiser that can be asked anywhere.
        needs_signal: whether the method cannot start where alpha = 0 either.
    """
    if not (needs_signal or prediction in SIGNAL_NEEDED):
        return process.t_max
    if process.alpha(jnp.asarray(process.t_max, float)) > 0.0:
        return process.t_max
    return process.time_of_log_snr(jnp.asarray(LOW_LOG_SNR))


def corrected(process: Process, denoise: Denoiser) -> Sampler:
    """Make DDIM with one Langevin move after each step, of a tenth of the noise's variance."""
    score = denoisers.to_score(process, denoise)
    corrector = samplers.langevin(score, lambda t: 0.1 * process.variance(t))
    return samplers.predictor_corrector(samplers.ddim(process, denoise), corrector)


def _with(make: Callable[..., Sampler], **options: object) -> Callable[..., Sampler]:
    return functools.partial(make, **options)


METHODS: dict[str, Method] = {
    "ddim": Method(samplers.ddim, 1),
    "ddim_eta_1": Method(_with(samplers.ddim, eta=1.0)),
    "ancestral": Method(samplers.ancestral),
    "ancestral_upper": Method(_with(samplers.ancestral, variance="upper")),
    "euler": Method(samplers.euler, 1),
    "heun": Method(samplers.heun, 2, 2),
    "euler_maruyama": Method(samplers.euler_maruyama, needs_signal=True),
    "edm": Method(samplers.edm, 2, 2, needs_signal=True),
    "edm_churn": Method(_with(samplers.edm, churn=0.1), None, 2, needs_signal=True),
    **{f"dpm_solver_pp_{p}": Method(_with(samplers.dpm_solver_pp, order=p), p) for p in (1, 2, 3)},
    "dpm_solver_pp_sde": Method(samplers.dpm_solver_pp_sde),
    **{f"unipc_{p}": Method(_with(samplers.unipc, order=p), p + 1) for p in (1, 2, 3)},
    **{f"deis_{p}": Method(_with(samplers.deis, order=p), p) for p in (2, 3, 4)},
    "predictor_corrector": Method(corrected, None, 2),
    "adaptive": Method(_with(samplers.adaptive, rtol=1e-3, atol=1e-3)),
}
