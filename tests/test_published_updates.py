"""Samplers against the papers' own algorithms, written out in NumPy in the papers' own symbols."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxdiff import denoisers, processes, sample, samplers
from jaxdiff.samplers import ancestral, ddim

KEY = jax.random.key(0)
BETAS = np.array([0.1, 0.2, 0.3, 0.4])
X_T, EPS_HAT = np.array([[0.7, -1.1]]), 0.3


def draws(num_steps):
    """The noise that each step of `sample` draws for the one row."""
    keys = jax.random.split(KEY, num_steps)
    return [np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (2,)))[None] for key in keys]


def run(make, process, denoise, ts):
    return np.asarray(
        jax.jit(lambda ts: sample(KEY, make(process, denoise), X_T, ts))(np.asarray(ts))
    )


@functools.cache
def published_steps(make, t, s):
    """Return the step of a chain of BETAS whose network says EPS_HAT, and the noise it draws."""

    @jax.jit
    def step(t, s):
        process = processes.from_betas(BETAS)
        denoise = denoisers.from_network(lambda x, t: jnp.full_like(x, EPS_HAT), process, "eps")
        z = jax.random.normal(jax.random.fold_in(KEY, 0), (2,))
        return make(process, denoise).step(KEY, X_T, t, s), z[None]

    return step(t, s)


@pytest.mark.parametrize("variance", ["posterior", "upper"])
def test_ancestral_step_is_the_published_ddpm_update(variance):
    """Algorithm 2 of Ho et al. 2020, both variances, written with eps and beta."""
    kept = np.cumprod(1 - BETAS)
    mean = (X_T - BETAS[2] / np.sqrt(1 - kept[2]) * EPS_HAT) / np.sqrt(1 - BETAS[2])
    shrink = {"posterior": (1 - kept[1]) / (1 - kept[2]), "upper": 1.0}[variance]
    x_s, z = published_steps(functools.partial(ancestral, variance=variance), 3 / 4, 2 / 4)
    np.testing.assert_allclose(x_s, mean + np.sqrt(shrink * BETAS[2]) * z, rtol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_step_is_the_published_update(eta):
    """Eqs. 12 and 16 of Song et al. 2021, whose alpha is the cumulative product."""
    a = np.cumprod(1 - BETAS)
    sigma = eta * np.sqrt((1 - a[1]) / (1 - a[3])) * np.sqrt(1 - a[3] / a[1])
    x0 = (X_T - np.sqrt(1 - a[3]) * EPS_HAT) / np.sqrt(a[3])
    x_s, z = published_steps(functools.partial(ddim, eta=eta), 4 / 4, 2 / 4)
    expected = np.sqrt(a[1]) * x0 + np.sqrt(1 - a[1] - sigma**2) * EPS_HAT + sigma * z
    np.testing.assert_allclose(x_s, expected, rtol=1e-10)


# --- DPM-Solver++, UniPC, DEIS: a vp process and a denoiser that bends --------------------------

VP = processes.vp()
TS = np.array([1.0, 0.85, 0.6, 0.5, 0.2, 0.05])


def bent(x, t):
    return np.tanh(2.0 * x) * (1.0 - 0.5 * t)


def bent_jax(x, t):
    return jnp.tanh(2.0 * x) * (1.0 - 0.5 * t)


def coefficients(t):
    """alpha, sigma and lambda = log(alpha / sigma) of vp."""
    integral = 0.1 * t + 0.5 * 19.9 * t**2
    alpha, sigma = np.exp(-0.5 * integral), np.sqrt(1.0 - np.exp(-integral))
    return alpha, sigma, np.log(alpha / sigma)


ALPHA, SIGMA, LAMBDA = coefficients(TS)
H = np.diff(LAMBDA)


def test_dpm_solver_pp_is_the_published_2m():
    """Algorithm 2 of Lu et al. 2022."""
    x, outputs = X_T, []
    for i in range(1, len(TS)):
        outputs.append(bent(x, TS[i - 1]))
        d, h = outputs[-1], H[i - 1]
        if i > 1:
            r = H[i - 2] / h
            d = (1 + 1 / (2 * r)) * outputs[-1] - 1 / (2 * r) * outputs[-2]
        x = SIGMA[i] / SIGMA[i - 1] * x - ALPHA[i] * (np.exp(-h) - 1) * d
    ours = run(samplers.dpm_solver_pp, VP, bent_jax, TS)
    np.testing.assert_allclose(ours, x, rtol=1e-10)


def test_dpm_solver_pp_of_order_3_integrates_the_quadratic_exactly():
    x, outputs = X_T, []
    for i in range(1, len(TS)):
        outputs.append(bent(x, TS[i - 1]))
        if i == 2:
            r = H[0] / H[1]
            mean = (1 + 1 / (2 * r)) * outputs[1] - 1 / (2 * r) * outputs[0]
            integral = (1 - np.exp(-H[1])) * mean
        else:
            nodes = LAMBDA[max(0, i - 3) : i]
            basis = [exponential_integral(nodes, j, i) for j in range(len(nodes))]
            integral = sum(w * d for w, d in zip(basis, outputs[-3:], strict=True))
        x = SIGMA[i] / SIGMA[i - 1] * x + ALPHA[i] * integral
    ours = run(functools.partial(samplers.dpm_solver_pp, order=3), VP, bent_jax, TS)
    np.testing.assert_allclose(ours, x, rtol=1e-10)


def lagrange(nodes, j):
    others = np.delete(nodes, j)
    return lambda u: np.prod((u - others) / (nodes[j] - others))


def exponential_integral(nodes, j, i):
    """The integral of exp(lambda - lambda_i) times a Lagrange polynomial over step i."""
    weigh = lagrange(nodes, j)
    return integrate.quad(
        lambda u: np.exp(u - LAMBDA[i]) * weigh(u), LAMBDA[i - 1], LAMBDA[i], epsabs=1e-14
    )[0]


def test_dpm_solver_pp_sde_is_the_published_2m():
    """SDE-DPM-Solver++(2M) of Lu et al. 2022, appendix D."""
    x, outputs, z = X_T, [], draws(len(TS) - 1)
    for i in range(1, len(TS)):
        outputs.append(bent(x, TS[i - 1]))
        d, h = outputs[-1], H[i - 1]
        if i > 1:
            d = d + (outputs[-1] - outputs[-2]) / (2 * H[i - 2] / h)
        x = SIGMA[i] / SIGMA[i - 1] * np.exp(-h) * x + ALPHA[i] * (1 - np.exp(-2 * h)) * d
        x = x + SIGMA[i] * np.sqrt(1 - np.exp(-2 * h)) * z[i - 1]
    ours = run(samplers.dpm_solver_pp_sde, VP, bent_jax, TS)
    np.testing.assert_allclose(ours, x, rtol=1e-10)


def unified(i, order, outputs, new=None):
    """The sum over m of a_m D_m / r_m of UniPC's step to node i, and B(h), with data prediction.

    R_p(h) a = phi_p(h) / B(h) of Zhao et al. 2023, theorem 3.1, with h -> -h and B_2; a_1 = 1/2
    for UniP-2 and UniC-1.
    """
    h = -H[i - 1]
    b = np.expm1(h)
    start = outputs[-1]
    ratios = [(LAMBDA[i - 1 - m] - LAMBDA[i - 1]) / H[i - 1] for m in range(1, order)]
    slopes = [(outputs[-1 - m] - start) / r for m, r in zip(range(1, order), ratios, strict=True)]
    if new is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, new - start]
    if not ratios:
        return np.zeros_like(start), b
    phi, factorial, right = np.expm1(h) / h - 1.0, 1.0, []
    for m in range(1, len(ratios) + 1):
        right.append(phi * factorial / b)
        factorial *= m + 1
        phi = phi / h - 1.0 / factorial
    weights = np.linalg.solve(np.vander(ratios, increasing=True).T, right)
    if len(ratios) == 1:
        weights = [0.5]
    return sum(w * slope for w, slope in zip(weights, slopes, strict=True)), b


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_the_published_bh2(order):
    """Algorithms 5 and 6 of Zhao et al. 2023; the corrector reuses the predictor's evaluation."""
    outputs, x, base = [], X_T, X_T
    for i in range(len(TS) - 1):
        new = bent(x, TS[i])
        if i > 0:  # UniC, of the order of the prediction that led here
            change, b = unified(i, min(order, i), outputs, new)
            x = base - ALPHA[i] * b * change
        outputs.append(new)
        base = SIGMA[i + 1] / SIGMA[i] * x - ALPHA[i + 1] * np.expm1(-H[i]) * new
        change, b = unified(i + 1, min(order, i + 1), outputs)
        x = base - ALPHA[i + 1] * b * change
    ours = run(functools.partial(samplers.unipc, order=order), VP, bent_jax, TS)
    np.testing.assert_allclose(ours, x, rtol=1e-10)


def test_deis_is_the_published_tab():
    """Eqs. 14 and 15 of Zhang & Chen 2023: eps a polynomial in t, integrated over rho."""

    def rho(t):
        alpha, sigma, _ = coefficients(t)
        return sigma / alpha

    def drho(t):
        alpha, sigma, _ = coefficients(t)
        return 0.5 * (0.1 + 19.9 * t) / (alpha * sigma)

    x, noises = X_T, []
    for i in range(1, len(TS)):
        noises.append((x - ALPHA[i - 1] * bent(x, TS[i - 1])) / SIGMA[i - 1])
        nodes, total = TS[max(0, i - 3) : i], 0.0
        for j, eps in enumerate(noises[-3:]):
            weigh = lagrange(nodes, j)
            weight = integrate.quad(
                lambda t, w=weigh: drho(t) * w(t), TS[i - 1], TS[i], epsabs=1e-14, epsrel=1e-13
            )[0]
            total = total + weight * eps
        x = ALPHA[i] * (x / ALPHA[i - 1] + total)
    ours = run(samplers.deis, VP, bent_jax, TS)
    np.testing.assert_allclose(ours, x, rtol=1e-10)


# --- EDM ------------------------------------------------------------------------------------

SIGMAS = np.array([80.0, 20.0, 5.0, 1.0, 0.1, 0.0])


def denoise_level(x, sigma):
    return np.tanh(x / (1.0 + sigma))


def edm_algorithm(churn, s_tmin, s_tmax, s_noise):
    """Algorithm 2 of Karras et al. 2022, line by line; algorithm 1 without churn."""
    x, num_steps = X_T, len(SIGMAS) - 1
    z = draws(num_steps)
    for i in range(num_steps):
        t, t_next = SIGMAS[i], SIGMAS[i + 1]
        gamma = min(churn / num_steps, np.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        t_hat = t + gamma * t
        x_hat = x + np.sqrt(t_hat**2 - t**2) * s_noise * z[i]
        d = (x_hat - denoise_level(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if t_next != 0:
            d_next = (x - denoise_level(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (0.5 * d + 0.5 * d_next)
    return x


@pytest.mark.parametrize(
    ("churn", "s_tmin", "s_tmax", "s_noise"),
    [(0.0, 0.0, np.inf, 1.0), (1.0, 0.0, np.inf, 1.0), (40.0, 0.5, 50.0, 1.003)],
)
@pytest.mark.parametrize("name", ["edm", "vp"])
def test_edm_is_the_published_algorithm(name, churn, s_tmin, s_tmax, s_noise):
    """For vp: the same trajectory of x / alpha over sigma / alpha."""
    process = {"edm": processes.edm(), "vp": processes.vp(beta_max=40.0)}[name]

    def denoise(x, t):
        level = process.sigma(t) / process.alpha(t)
        return jnp.tanh(x / process.alpha(t) / (1.0 + level))

    options = {"churn": churn / 5, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    ts = [float(process.time_of_log_snr(-2.0 * jnp.log(s))) if s else 0.0 for s in SIGMAS]
    alpha = float(process.alpha(jnp.asarray(ts[0])))
    made = functools.partial(samplers.edm, **options)
    ours = jax.jit(lambda: sample(KEY, made(process, denoise), alpha * X_T, jnp.asarray(ts)))()
    np.testing.assert_allclose(ours, edm_algorithm(churn, s_tmin, s_tmax, s_noise), rtol=1e-10)
