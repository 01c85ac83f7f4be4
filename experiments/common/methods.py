"""Every sampler by name, for command lines and comparisons."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp

from jaxdiff import denoisers, processes, samplers, timesteps
from jaxdiff.processes import Process
from jaxdiff.samplers import Sampler
from jaxdiff.typing import Array, Denoiser, PyTree

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
NAMES: tuple[str, ...] = get_args(MethodName)


class Method(NamedTuple):
    """A sampler and what a comparison must know of it.

    Attributes:
        factory: the sampler of a process and a denoiser; where `by_row`, of `cond` too.
        order: of convergence; None where the sampler draws noise, or is adaptive.
        by_row: whether it solves each row by itself, and so is given the conditioning by row.
    """

    factory: Callable[..., Sampler]
    order: int | None = None
    by_row: bool = False

    def make(self, process: Process, denoise: Any, cond: PyTree = None) -> Sampler:
        """Make the sampler.

        Args:
            process: the forward process.
            denoise: the denoiser; with `cond`, one of (x_t, t, cond).
            cond: pytree of (B, ...) leaves, the conditioning of the rows.
        """
        if self.by_row:
            return self.factory(process, denoise, cond=cond)
        return self.factory(process, denoisers.conditioned(denoise, cond))

    @property
    def deterministic(self) -> bool:
        """Whether it follows the probability flow."""
        return self._anywhere().deterministic

    @property
    def needs_signal(self) -> bool:
        """Whether it cannot start where alpha is 0, whatever the network."""
        return self._anywhere().needs_signal

    def start(self, process: Process, needs_signal: bool = False) -> Any:
        """Return the time that it starts at, with a network that needs signal or not."""
        return timesteps.start(process, needs_signal or self.needs_signal)

    def calls(self, num_steps: int, *, to_data: bool = True) -> int | None:
        """Return the evaluations of so many steps, the last of them to sigma = 0 or not.

        None where they depend on the rows.
        """
        ts = timesteps.uniform(PROCESS, num_steps, 0.0 if to_data else 0.5)
        return samplers.count_calls(self._anywhere(), ts)

    def _anywhere(self) -> Sampler:
        """Make it of a denoiser that can be asked anywhere, for what it says of itself."""
        return self.make(PROCESS, lambda x_t, t: x_t)


PROCESS = processes.vp()
"""Any process: what a method says of itself is the same on all."""


EDM_LEVELS = (0.002, 80.0)
"""The noise levels sigma / alpha that EDM's grid runs between, where a process has them."""


def make_grid(name: str, process: Process, num_steps: int, start: Any) -> Array:
    """Make the grid of a name.

    Args:
        name: "uniform", equal steps of t from `start` to 0; or "karras", EDM's levels down from 80,
            or that of `start` if it is lower, and then 0.
        process: the forward process.
        num_steps: N >= 1.
        start: the first time at which the method may be asked.

    Raises:
        ValueError: if the process has no such levels.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1.
    """
    if name == "uniform":
        return timesteps.uniform(process, num_steps, t_start=start)
    low, high = EDM_LEVELS
    level = jnp.exp(-0.5 * process.log_snr(jnp.asarray(start, float)))
    return timesteps.karras(process, num_steps, low, jnp.minimum(high, level))


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
    "heun": Method(samplers.heun, 2),
    "euler_maruyama": Method(samplers.euler_maruyama),
    "edm": Method(samplers.edm, 2),
    "edm_churn": Method(_with(samplers.edm, churn=0.1)),
    **{f"dpm_solver_pp_{p}": Method(_with(samplers.dpm_solver_pp, order=p), p) for p in (1, 2, 3)},
    "dpm_solver_pp_sde": Method(samplers.dpm_solver_pp_sde),
    **{f"unipc_{p}": Method(_with(samplers.unipc, order=p), p + 1) for p in (1, 2, 3)},
    **{f"deis_{p}": Method(_with(samplers.deis, order=p), p) for p in (2, 3, 4)},
    "predictor_corrector": Method(corrected),
    "adaptive": Method(_with(samplers.adaptive, rtol=1e-3, atol=1e-3), by_row=True),
}
