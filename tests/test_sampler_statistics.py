"""Stochastic samplers: the moments of many draws, and the weak order at which they approach.

For one Gaussian of mean 0 the exact denoiser is linear, so a sample is a linear function of x_T
and of each step's noise. Feeding each of these alone through the sampler, as a row of a batch,
gives its variance exactly: nothing is drawn, and errors far below any standard error are seen.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, few
from sampler_cases import KEY, SAMPLERS, noise, with_options

from jaxdiff import Mixture, denoisers, numerics, processes, sample, samplers, timesteps

VP = processes.vp()
VARIANCE = 0.2
LANGEVIN_STEP = 0.05
LONGEST = 850
"""Steps of the longest grid."""
GAUSSIAN = Mixture(np.ones(1), np.zeros((1, 1)), np.full((1, 1, 1), VARIANCE))
MAKERS = {
    name: SAMPLERS[name]
    for name in ("ancestral", "ancestral_upper", "ddim_0.5", "ddim_1", "euler_maruyama")
}
MAKERS["dpm_solver_pp_sde"] = samplers.dpm_solver_pp_sde
MAKERS["langevin"] = lambda process, denoise: samplers.langevin(
    lambda x, t: -x / VARIANCE, LANGEVIN_STEP
)


def scaled(name, num_steps):
    """A sampler whose work between two times does not depend on the number of steps."""
    if name == "edm_churn":  # S_churn = 20 of the paper
        return with_options(samplers.edm, churn=20.0 / num_steps)
    if name == "ddim_corrected":

        def make(process, denoise):
            score = denoisers.to_score(process, denoise)
            size = lambda t: 2.0 / num_steps * process.variance(t)  # noqa: E731
            predictor = samplers.ddim(process, denoise)
            return samplers.predictor_corrector(predictor, samplers.langevin(score, size))

        return make
    return MAKERS[name]


@functools.cache
def variance_of(name):
    """Return a function of a grid: the exact variance of samples of q(x_T), compiled once.

    Grids have LONGEST steps; those past the end of a shorter one are not taken.
    """
    z = []  # the noise of the step being traced

    @jax.jit
    def variance(ts, num_steps):
        made = scaled(name, num_steps)(VP, GAUSSIAN.denoiser(VP))

        def body(state, inputs):
            i, t, s = inputs
            z.append(jnp.zeros((LONGEST + 1, 1)).at[i + 1].set(1.0))
            moved = made.step(KEY, state, t, s)
            return jax.tree.map(functools.partial(jnp.where, i < num_steps), moved, state), None

        start = GAUSSIAN.diffuse(VP, ts[0]).covariances[0, 0, 0]
        rows = jnp.zeros((LONGEST + 1, 1)).at[0].set(jnp.sqrt(start))
        state, _ = jax.lax.scan(body, made.init(rows), (jnp.arange(LONGEST), ts[:-1], ts[1:]))
        return jnp.sum(made.value(state) ** 2)

    def along(ts):
        padded = np.pad(ts, (0, LONGEST + 1 - len(ts)), mode="edge")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(numerics, "normal", lambda key, x: z[-1].astype(x.dtype))
            return float(variance(padded, len(ts) - 1.0))

    return along


@pytest.mark.parametrize(
    ("name", "order"),
    [(name, 1) for name in MAKERS if name not in ("dpm_solver_pp_sde", "langevin")]
    + [("dpm_solver_pp_sde", 2), ("edm_churn", 2), ("ddim_corrected", 1)],
)
def test_stochastic_samplers_reach_their_weak_order(name, order):
    t_end = 0.05
    exact = GAUSSIAN.diffuse(VP, t_end).covariances[0, 0, 0]
    sizes = np.array([200, 400, 800])
    errors = []
    for n in sizes:
        ts = timesteps.uniform(VP, n, t_end)
        errors.append(abs(variance_of(name)(ts) - exact))
    measured = -np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    print(f"weak order {measured:.3f}, errors of the variance {errors}")
    assert measured > order - 0.2


def test_langevin_is_biased_by_the_order_of_its_step():
    """Its stationary variance is v / (1 - step / 2 v) of a Gaussian of variance v."""
    expected = VARIANCE / (1.0 - 0.5 * LANGEVIN_STEP / VARIANCE)
    np.testing.assert_allclose(variance_of("langevin")(np.ones(201)), expected, rtol=1e-12)


# Weak errors with these numbers of steps are below two standard errors of 100,000 draws: the
# last test computes them exactly for one Gaussian.
STEPS = {
    "ancestral": 850,
    "ddim_0.5": 500,
    "euler_maruyama": 400,
    "edm_churn": 120,
    "dpm_solver_pp_sde": 90,
    "ddim_corrected": 300,
}
NUM_DRAWS = 100_000


def fine_grid(name):
    return timesteps.quadratic(VP, STEPS[name], t_end=1e-3)


def maker(name):
    return scaled(name, STEPS[name])


SOME = ("dpm_solver_pp_sde",)
"""Noise in a history, on a grid of few steps; test-all draws of every sampler."""


@pytest.mark.parametrize("name", few(STEPS, SOME))
def test_samples_have_the_moments_of_the_mixture(name):
    mixture = jax.tree.map(jnp.float32, MIXTURE)
    made = maker(name)(VP, mixture.denoiser(VP))
    optimized = {"xla_backend_optimization_level": 2}  # programs that run for long
    run = jax.jit(lambda key, x_T, ts: sample(key, made, x_T, ts), compiler_options=optimized)
    x_T = noise(VP, NUM_DRAWS, jnp.float32)
    x = np.asarray(run(jax.random.key(5), x_T, fine_grid(name)), float)
    weights, means, covariances = map(np.asarray, jax.tree.leaves(MIXTURE.diffuse(VP, 1e-3)))
    mean = weights @ means
    spread = means - mean
    covariance = np.einsum("k,kij->ij", weights, covariances)
    covariance += np.einsum("k,ki,kj->ij", weights, spread, spread)
    centred = x - mean
    products = centred[:, :, None] * centred[:, None, :]
    z_mean = centred.mean(0) / (x.std(0) / np.sqrt(NUM_DRAWS))
    z_cov = (products.mean(0) - covariance) / (products.std(0) / np.sqrt(NUM_DRAWS))
    print("standard errors off:", z_mean, z_cov.ravel())
    assert np.abs(z_mean).max() < 4
    assert np.abs(z_cov).max() < 4


@pytest.mark.parametrize("name", STEPS)
def test_the_weak_error_of_those_grids_is_below_two_standard_errors(name):
    ts = fine_grid(name)
    exact = float(GAUSSIAN.diffuse(VP, ts[-1]).covariances[0, 0, 0])
    error = variance_of(name)(ts) / exact - 1.0
    print(f"relative error {error:.1e}")
    assert abs(error) < 2.0 * np.sqrt(2.0 / NUM_DRAWS)
