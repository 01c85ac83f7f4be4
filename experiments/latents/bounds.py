r"""A bound on the bits of pictures: those of the latents by their flow, and those of the decoder.

    -log P(x | c) <= E_q(z | x) [ log q(z | x) - log p(z | c) - log P(x | z) ],

p(z | c) being the density of the denoiser's probability flow, and P(x | z) a logistic around what
is decoded, of one scale, over the levels of a pixel. Of a model of pixels it is the density of
their flow, dequantised uniformly.

Source: Vahdat et al. 2021 (arXiv:2106.05931), eq. 4; the logistic is that of Kingma et al. 2016
(arXiv:1606.04934), appendix C.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import flows
from experiments.latents.coding import make_coders
from experiments.latents.drawing import Trained
from experiments.latents.sources import NUM_LEVELS
from jaxdiff import data, likelihood, numerics
from jaxdiff.typing import Array, Key, PyTree

AT_ONCE = 64
SCALES = np.exp(np.linspace(math.log(1e-3), math.log(1.0), 40)).astype(np.float32)
"""Of the logistic: that with the fewest bits of training pictures is taken."""


def bits_of(
    trained: Trained,
    key: Key,
    levels: np.ndarray,
    told: PyTree,
    fitted_on: np.ndarray,
    tolerance: float,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, float]:
    """Return bits per dimension of pixels, by name, with the standard error of their mean.

    Args:
        trained: the run.
        key: of draws and probes.
        levels: pictures that were held out, uint8 (N, H, W, C).
        told: what the denoiser is given for their captions.
        fitted_on: training pictures by which the scale of the logistic is chosen.
        tolerance: of the solver, relative and absolute.
        devices: which share the work.

    Raises:
        flows.Unsolved: where the solver does not come to an end.
    """
    key_z, key_fit, key_probes = jax.random.split(key, 3)
    num_dims = int(np.prod(levels.shape[1:]))
    if trained.config.space == "pixels":
        draw = jax.jit(data.dequantize, static_argnums=2, static_argnames="dtype")
        x = np.asarray(draw(key_z, levels, NUM_LEVELS, dtype=jnp.float32))
        log_prob = _log_prob(trained, key_probes, x, told, tolerance, devices)
        bits = np.asarray(
            likelihood.bits_per_dim(jnp.asarray(log_prob), num_dims, data.bin_width(NUM_LEVELS))
        )
        return _summary(bits)
    drawn, std, decoded = _sampled(trained, key_z, levels, devices)
    z = trained.store.scale * (drawn - trained.store.shift)
    log_prob = _log_prob(trained, key_probes, z, told, tolerance, devices)
    std = trained.store.scale * std
    entropy = np.sum(np.log(std) + 0.5 * math.log(2.0 * math.pi * math.e), axis=(1, 2, 3))
    _, _, decoded_train = _sampled(trained, key_fit, fitted_on, devices)
    scale = _fitted(fitted_on, decoded_train)
    of_pixels = np.asarray(_logistic_nats(levels, decoded, scale))
    to_bits = 1.0 / (num_dims * math.log(2.0))
    bits = to_bits * (of_pixels - log_prob - entropy)
    return {
        **_summary(bits),
        "latent_bits_per_dim": float(np.mean(-log_prob - entropy) * to_bits),
        "decoder_bits_per_dim": float(np.mean(of_pixels) * to_bits),
    }


def _summary(bits: np.ndarray) -> dict[str, float]:
    stderr = float(bits.std(ddof=1) / math.sqrt(len(bits)))
    return {"bits_per_dim": float(bits.mean()), "bits_per_dim_stderr": stderr}


def _sampled(
    trained: Trained, key: Key, levels: np.ndarray, devices: Sequence[jax.Device] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a draw of the latents of pictures, their deviation, and what is decoded of the draw.

    Pixels are not rounded.
    """
    encode, _ = make_coders(trained.autoencoder, devices)
    mean, std = encode(trained.decoder, levels)
    z = mean + std * np.asarray(numerics.normal(key, jnp.asarray(mean)))
    decode = jax.jit(trained.autoencoder.decode)
    parts = [
        np.asarray(decode(trained.decoder, z[chosen]))
        for chosen in flows.chunks(np.arange(len(z)), AT_ONCE)
    ]
    return z, std, np.concatenate(parts)[: len(z)]


def _log_prob(
    trained: Trained,
    key: Key,
    x: np.ndarray,
    told: PyTree,
    tolerance: float,
    devices: Sequence[jax.Device] | None,
) -> np.ndarray:
    """Return the log-density of the denoiser's flow at x, given the captions, in nats (N,)."""
    model = trained.recipe.model
    process = flows.until_start(model.process, model.prediction)

    def of_rows(params: PyTree, keys: Key, x: Array, cond: PyTree) -> Array:
        log_prob, _ = likelihood.log_prob(
            process,
            model.denoiser(params),
            x,
            cond=cond,
            key=keys,
            num_probes=1,
            rtol=tolerance,
            atol=tolerance,
        )
        return log_prob

    count = AT_ONCE * (1 if devices is None else len(devices))
    solve = flows.solve_by_row(of_rows, count, devices=devices)
    return solve(trained.params, numerics.row_keys(key, len(x)), x.astype(np.float32), told)


def _fitted(levels: np.ndarray, decoded: np.ndarray) -> float:
    """Return the scale at which the pictures have the fewest bits."""
    nats = [float(np.mean(_logistic_nats(levels, decoded, scale))) for scale in SCALES]
    return float(SCALES[int(np.argmin(nats))])


@jax.jit
def _logistic_nats(levels: Array, decoded: Array, scale: Array) -> Array:
    """Return -log P of levels (N, H, W, C) around what was decoded, in nats (N,).

    The outermost levels have all that is beyond them.
    """
    centre = data.centers(levels, NUM_LEVELS, dtype=jnp.float32)
    half = 0.5 * data.bin_width(NUM_LEVELS)
    above = (centre + half - decoded) / scale
    below = (centre - half - decoded) / scale
    # log(sigmoid(a) - sigmoid(b)) = log sigmoid(a) + log sigmoid(-b) + log(1 - exp(b - a))
    within = (
        jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-below) + jnp.log(-jnp.expm1(below - above))
    )
    log_prob = jnp.where(levels == 0, jax.nn.log_sigmoid(above), within)
    log_prob = jnp.where(levels == NUM_LEVELS - 1, jax.nn.log_sigmoid(-below), log_prob)
    return -jnp.sum(log_prob, axis=(1, 2, 3))
