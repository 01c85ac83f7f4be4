r"""The variational bound of a denoiser, term by term, and its importance-weighted tightening.

The model is that of the reverse chain: not that of the probability flow, whose density
`likelihood.log_prob` gives. A chain x_T, ..., x_{t_end} is drawn from q given x0; with
k^2 = SNR(s) - SNR(t) and z the noise of the step from t to s,

    log p(x_s | x_t) - log q(x_s | x_t, x0) = k z . (x0_hat - x0) - k^2 ||x0_hat - x0||^2 / 2,

whose sum with the two ends is the log of an unbiased estimate of p(x0).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff import checks, forward, numerics, predictions, timesteps, variational
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, Key


class Elbo(NamedTuple):
    """The negative bound of each example, in nats (B,).

    Attributes:
        prior: KL of q(x_T | x0) from the prior; what starting from it loses.
        diffusion: the sum of the steps' KLs.
        reconstruction: minus the decoder's log-probability.
        log_weight: log of an unbiased estimate of p(x0), from the same chain. In expectation it is
            minus the sum of the three, and the steadier estimate of the bound: for the exact
            denoiser its variance vanishes with small steps. See :func:`importance_weighted`.
    """

    prior: Array
    diffusion: Array
    reconstruction: Array
    log_weight: Array

    @property
    def total(self) -> Array:
        """The negative bound: in expectation at least -log p(x0)."""
        return self.prior + self.diffusion + self.reconstruction


def elbo(
    key: Key,
    process: Process,
    denoise: Denoiser,
    x0: Array,
    ts: Array,
    *,
    decoder: variational.Decoder | None = None,
) -> Elbo:
    """Estimate the negative variational bound of data, with one chain an example.

    Args:
        key: one key, or `(B,)` row keys; consumed.
        process: the forward process.
        denoise: the denoiser; it is called at ts[0], ..., ts[-2].
        x0: data (B, ...).
        ts: a grid (N + 1,) from t_max down to a time with noise.
        decoder: by default `variational.gaussian_decoder()`.

    Returns:
        The terms, of one chain: their means over keys are the bound's.

    Raises:
        TypeError: if `x0` or `ts` holds integers, `process` is no process, `denoise` no function or
            `key` no typed key.
        ValueError: if `x0` has no rows, the known grid increases, starts past t_max, ends without
            noise, or starts where alpha is 0 and the denoiser's network holds no x0, or if the
            denoiser changes the shape.

    Source: Kingma et al. 2021 (arXiv:2107.00630), eqs. 11 and 13.
    """
    checks.process(process)
    denoise = checks.judged("denoise", denoise, checks.DENOISER)
    x0 = checks.batch("x0", x0)
    ts = timesteps.check_grid(ts, process=process).astype(x0.dtype)
    if denoise.needs_signal is not None:
        predictions.require_signal(process, ts[0], denoise.needs_signal)
    noise = numerics.known_value(process.sigma, ts[-1])
    if noise is not None and noise == 0.0:
        raise ValueError(
            f"`ts` must end at a time with noise, which the decoder takes away; got {ts[-1]}."
        )
    decode = variational.gaussian_decoder() if decoder is None else decoder
    key_start, key_path = numerics.split(key)
    start = numerics.normal(key_start, x0)
    x_T = process.alpha(ts[0]) * x0 + process.sigma(ts[0]) * start  # noqa: N806
    prior = 0.5 * variational.snr(process, ts[0]) * variational.row_sum(x0**2)
    shift = jnp.sqrt(variational.snr(process, ts[0])) * variational.row_sum(x0 * start)

    def step(carry: tuple[Array, Array, Array], inputs: tuple[Key, Array, Array]) -> tuple:
        x_t, diffusion, log_weight = carry
        step_key, t, s = inputs
        z = numerics.normal(step_key, x0)
        mean, std = forward.posterior(process, x_t, x0, t, s)
        error = denoise(x_t, t) - x0
        gain = jnp.maximum(variational.snr(process, s) - variational.snr(process, t), 0.0)
        cost = 0.5 * gain * variational.row_sum(error**2)
        log_ratio = numerics.sqrt(gain) * variational.row_sum(z * error) - cost
        return (mean + std * z, diffusion + cost, log_weight + log_ratio), None

    keys = numerics.split(key_path, ts.shape[0] - 1)
    carry = (x_T, jnp.zeros_like(prior), -prior - shift)
    (x_end, diffusion, log_weight), _ = jax.lax.scan(step, carry, (keys, ts[:-1], ts[1:]))
    reconstruction = -decode(process, x0, x_end, ts[-1])
    return Elbo(prior, diffusion, reconstruction, log_weight - reconstruction)


def importance_weighted(log_weights: Array) -> Array:
    """Return log of the mean of K weights an example, (B,), of log_weights (K, B).

    In expectation a bound on log p(x) that rises with K, from the variational one at K = 1.

    Raises:
        ValueError: if `log_weights` is not of rank 2.

    Source: Burda et al. 2016 (arXiv:1509.00519), eq. 8.
    """
    log_weights = numerics.as_float(log_weights, "log_weights")
    if log_weights.ndim != 2 or log_weights.shape[0] == 0:
        raise ValueError(f"`log_weights` must have shape (K, B), K >= 1; got {log_weights.shape}.")
    return jax.nn.logsumexp(log_weights, axis=0) - jnp.log(log_weights.shape[0])
