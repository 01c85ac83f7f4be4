"""Every sampler by name, and what it runs on, for the suites that hold them all to one protocol."""

import functools

import jax
import numpy as np
from cases import NO_SIGNAL_AT_END, PROCESSES, chosen, known

from jaxdiff import denoisers, samplers, timesteps
from jaxdiff.samplers import (
    ancestral,
    ddim,
    deis,
    dpm_solver_pp,
    dpm_solver_pp_sde,
    edm,
    euler,
    euler_maruyama,
    heun,
    langevin,
    unipc,
)

KEY = jax.random.key(0)


def corrected(predictor):
    """Return a predictor with one Langevin move after each of its steps."""

    def make(process, denoise):
        score = denoisers.to_score(process, denoise)
        corrector = langevin(score, lambda t: 0.05 * process.variance(t))
        return samplers.predictor_corrector(predictor(process, denoise), corrector)

    return make


def with_options(make, **options):
    return lambda process, denoise: make(process, denoise, **options)


DETERMINISTIC = {
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "edm": edm,
    **{f"dpm_solver_pp_{p}": with_options(dpm_solver_pp, order=p) for p in (1, 2, 3)},
    **{f"unipc_{p}": with_options(unipc, order=p) for p in (1, 2, 3)},
    **{f"deis_{p}": with_options(deis, order=p) for p in (2, 3, 4)},
    "adaptive": with_options(samplers.adaptive, rtol=1e-9, atol=1e-9),
}
STOCHASTIC = {
    "ancestral": ancestral,
    "ancestral_upper": with_options(ancestral, variance="upper"),
    "ddim_0.5": with_options(ddim, eta=0.5),
    "ddim_1": with_options(ddim, eta=1.0),
    "euler_maruyama": euler_maruyama,
    "edm_churn": with_options(edm, churn=0.1),
    "dpm_solver_pp_sde": dpm_solver_pp_sde,
    "ddim_corrected": corrected(ddim),
    "unipc_corrected": corrected(unipc),
}
SAMPLERS = DETERMINISTIC | STOCHASTIC
CORRECTED = ("ddim_corrected", "unipc_corrected")
DIVIDES_BY_ALPHA = ("edm", "edm_churn", "euler_maruyama")
ASKS_AT_OTHER_TIMES = ("edm_churn", "deis_2", "deis_3", "deis_4")
FEW = ("vp", "edm", "flow", "zero_snr")
"""Processes for samplers that are slow to compile: a program must hold the process itself."""
RUNS_ON = dict.fromkeys(ASKS_AT_OTHER_TIMES, FEW) | {"adaptive": ("vp", "zero_snr"), "deis_3": ()}
SOME = (
    *("ancestral", "ddim", "heun", "edm_churn", "dpm_solver_pp_3", "dpm_solver_pp_sde", "unipc_3"),
    *("deis_2", "ddim_corrected", "adaptive"),
)
"""One sampler of each way of working."""
CASES = [(sampler, name) for sampler in SAMPLERS for name in RUNS_ON.get(sampler, PROCESSES)]


def noise(process, n=8, dtype=float):
    return process.prior_sample(jax.random.key(3), (n, 2), dtype=dtype)


def process_for(sampler, name, times):
    """Return PROCESSES[name] as an argument with which one program serves all processes."""
    if sampler == "adaptive":
        return PROCESSES[name]
    return chosen(name, FEW) if sampler in ASKS_AT_OTHER_TIMES else known(name, times)


@functools.cache
def case(sampler, name):
    """Return a process, noise (8, 2) and a grid that the sampler can run on."""
    t_max = PROCESSES[name].t_max
    late = sampler in DIVIDES_BY_ALPHA and name in NO_SIGNAL_AT_END
    steps = 2 if sampler == "adaptive" else 6
    ts = timesteps.uniform(PROCESSES[name], steps, t_start=0.95 * t_max if late else None)
    return process_for(sampler, name, ts), _noise(name), np.asarray(ts)


@functools.cache
def _noise(name):
    process = PROCESSES[name]
    return float(process.sigma(process.t_max)) * np.random.default_rng(3).normal(size=(8, 2))
