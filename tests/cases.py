"""What many tests share: one process of every kind, and a mixture that none is easy for.

Compiling costs far more than running here. A program is therefore compiled once and given the
process as an argument: `chosen` makes all processes arguments of one type.
"""

import csv
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import Mixture, processes
from jaxdiff.processes import Process

PROCESSES = {
    "vp": processes.vp(),
    "sub_vp": processes.sub_vp(),
    "ve": processes.ve(),
    "cosine": processes.cosine(),
    "cosine_shifted": processes.cosine(-2.0),
    "edm": processes.edm(),
    "flow": processes.flow(),
    "ddpm": processes.ddpm(),
    "zero_snr": processes.from_betas(np.append(np.linspace(1e-4, 0.04, 99), 1.0)),
}

NO_SIGNAL_AT_END = ("cosine", "cosine_shifted", "flow", "zero_snr")

MIXTURE = Mixture(
    np.array([0.3, 0.7]),
    np.array([[1.0, 1.0], [-1.0, 0.5]]),
    np.array([[[0.1, 0.0], [0.0, 0.1]], [[0.2, 0.05], [0.05, 0.1]]]),
)


def rows_of(directory):
    """Return the rows of a command's results.csv, texts by column."""
    with (directory / "results.csv").open() as file:
        return list(csv.DictReader(file))


def drawn(seed, num):
    """Draw `num` points of MIXTURE by numpy, which has nothing to compile."""
    rng = np.random.default_rng(seed)
    weights, means, covariances = (np.asarray(leaf) for leaf in jax.tree.leaves(MIXTURE))
    component, roots = rng.choice(2, num, p=weights), np.linalg.cholesky(covariances)
    return means[component] + np.einsum("nij,nj->ni", roots[component], rng.normal(size=(num, 2)))


def few(cases, kept):
    """Keep some cases, values or tuples of them; the others run with test-all."""
    slow = pytest.mark.slow
    return [
        each
        if each in kept
        else pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=slow)
        for each in cases
    ]


def _switch(method):
    def chosen_method(self, t):
        branches = [getattr(process, method) for process in self.processes]
        return jax.lax.switch(self.index, branches, jnp.asarray(t))

    return chosen_method


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen(Process):
    """The process of a traced number: each method branches to that of all processes."""

    index: jax.Array
    processes: tuple[Process, ...]

    @property
    def t_max(self):
        return jnp.stack([jnp.asarray(process.t_max) for process in self.processes])[self.index]

    alpha = _switch("alpha")
    variance = _switch("variance")
    sigma = _switch("sigma")
    log_snr = _switch("log_snr")
    time_of_log_snr = _switch("time_of_log_snr")
    alpha_dot = _switch("alpha_dot")
    sigma_dot = _switch("sigma_dot")
    drift = _switch("drift")
    diffusion_sq = _switch("diffusion_sq")


def chosen(name, names=tuple(PROCESSES)):
    """Return PROCESSES[name] as an argument with which one compiled program serves all `names`."""
    return Chosen(jnp.asarray(names.index(name)), tuple(PROCESSES[each] for each in names))


def _look_up(field):
    def known_method(self, t):
        t = jnp.asarray(t)
        index = jnp.searchsorted(self.times, t, method="compare_all")
        return jnp.where(self.times[index] == t, getattr(self, field)[index], jnp.nan)

    return known_method


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Known(Process):
    """A table of what a process says at a few rising times: there, all processes are alike.

    For tests of what is done with alpha and sigma, wherever they come from; at other times NaN.
    """

    times: jax.Array
    alphas: jax.Array
    variances: jax.Array
    sigmas: jax.Array
    alpha_dots: jax.Array
    sigma_dots: jax.Array
    drifts: jax.Array
    diffusions_sq: jax.Array

    def time_of_log_snr(self, log_snr):
        raise AssertionError("a table of values has no inverse")

    alpha = _look_up("alphas")
    variance = _look_up("variances")
    sigma = _look_up("sigmas")
    alpha_dot = _look_up("alpha_dots")
    sigma_dot = _look_up("sigma_dots")
    drift = _look_up("drifts")
    diffusion_sq = _look_up("diffusions_sq")


@jax.jit
def _known(process, t):
    values = (process.alpha(t), process.variance(t), process.sigma(t))
    rates = (process.alpha_dot(t), process.sigma_dot(t), process.drift(t), process.diffusion_sq(t))
    return Known(t, *values, *rates)


@functools.cache
def _table(name, times):
    return _known(chosen(name), np.array(times))


def known(name, times, length=16):
    """Return PROCESSES[name] as a table at the `times`, as an argument of one shape for all."""
    times = np.unique(times)
    padding = np.full(length - times.size, PROCESSES[name].t_max, float)
    return _table(name, (*times, *padding))
