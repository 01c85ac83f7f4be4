r"""From a density of continuous data to the probability of integer levels.

Level k of L owns a bin of width 2/L on [-1, 1]; with x = 2 (k + u)/L - 1, u in (0, 1)^D, and any
distribution q(u | k) of the noise,

    log P(k) >= E_q [ log p(x) + D log(2/L) - log q(u | k) ].

q is uniform (Theis et al. 2016, arXiv:1511.01844, section 3.1) or learned: variational
dequantisation (Ho et al. 2019, arXiv:1902.00275, section 3.1).
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxdiff import checks, numerics, variational
from jaxdiff.typing import Array, Batch, Key, LossFn, PyTree

Dequantizer: TypeAlias = Callable[[PyTree, Key, Array], tuple[Array, Array]]
"""(params, key, levels (B, ...)) -> (u (B, ...) in (0, 1), log q(u | levels) in nats (B,))."""


def uniform() -> Dequantizer:
    """Draw u uniformly: log q = 0, no parameters."""

    def draw(params: PyTree, key: Key, levels: Array) -> tuple[Array, Array]:
        del params
        rows = numerics.row_keys(key, levels.shape[0])
        u = jax.vmap(lambda row: jax.random.uniform(row, levels.shape[1:], float))(rows)
        smallest = jnp.finfo(u.dtype).eps
        return jnp.clip(u, smallest, 1.0 - smallest), jnp.zeros(levels.shape[0], u.dtype)

    return draw


def logistic_normal(
    network: Callable[[PyTree, Array], tuple[Array, Array]], num_levels: int
) -> Dequantizer:
    """Draw u = sigmoid(mean + std eps), mean and log std being a network's of the levels.

    Args:
        network: (params, x (B, ...)) -> (mean, log_std), each (B, ...), x being the centres of
            the levels' bins in [-1, 1].
        num_levels: L.

    Raises:
        ValueError: if `num_levels` is less than 2.
    """
    num_levels = checks.count("num_levels", num_levels, 2)

    def draw(params: PyTree, key: Key, levels: Array) -> tuple[Array, Array]:
        mean, log_std = network(params, _place(levels, jnp.asarray(0.5, float), num_levels))
        eps = numerics.normal(key, mean)
        logit = mean + jnp.exp(log_std) * eps
        log_slope = jax.nn.log_sigmoid(logit) + jax.nn.log_sigmoid(-logit)  # of u by logit
        log_normal = -0.5 * eps**2 - 0.5 * math.log(2.0 * math.pi) - log_std
        return jax.nn.sigmoid(logit), variational.row_sum(log_normal - log_slope)

    return draw


def levels_log_prob(
    key: Key,
    log_density: Callable[[Key, Array], Array],
    levels: Array,
    num_levels: int,
    *,
    dequantizer: Dequantizer | None = None,
    params: PyTree = None,
    num_samples: int = 1,
) -> Array:
    """Return log-weights of the probability of levels, one a sample: (K, B) in nats.

    Their mean over K bounds log P(levels) from below; `importance_weighted` of them does so
    more tightly. Bits per dimension are minus either over D log 2.

    Args:
        key: one key, or `(B,)` row keys; consumed.
        log_density: (key, x (B, ...)) -> log p(x) in nats (B,), x in [-1, 1].
        levels: integers in 0..L-1, (B, ...); a traced one outside makes its row NaN.
        num_levels: L.
        dequantizer: by default :func:`uniform`.
        params: of the dequantizer.
        num_samples: K, at least 1; evaluated one after another.

    Raises:
        TypeError: if `levels` holds no integers, `num_levels` or `num_samples` is no whole number,
            or `log_density` no function.
        ValueError: if `num_levels` is less than 2, `num_samples` less than 1, a known level outside
            0..L-1 or `log_density` returns another shape than (B,).
    """
    num_levels = checks.count("num_levels", num_levels, 2)
    num_samples = checks.count("num_samples", num_samples)
    checks.function("log_density", log_density, "(key, x) -> log p(x), (B,)", takes=2)
    levels = _batch_of_levels(levels, num_levels)
    draw = uniform() if dequantizer is None else dequantizer

    def weigh(key: Key) -> Array:
        key_u, key_density = numerics.split(key)
        u, log_q = draw(params, key_u, levels)
        log_width = math.prod(levels.shape[1:]) * math.log(2.0 / num_levels)
        log_prob = log_density(key_density, _place(levels, u, num_levels))
        return checks.output("log_density", log_prob, log_q, "(B,)") + log_width - log_q

    return jax.lax.map(weigh, numerics.split(key, num_samples))


def dequantized(loss_fn: LossFn, dequantizer: Dequantizer, num_levels: int) -> LossFn:
    """Turn a bound on densities into one on levels, which also trains the dequantizer.

    Args:
        loss_fn: a bound on -log p(x) in nats an example, as `losses.elbo` makes it.
        dequantizer: whose parameters are ``params["dequantizer"]``; the loss gets
            ``params["network"]``.
        num_levels: L; ``batch["x0"]`` holds levels.

    Returns:
        ``loss_fn(params, key, batch)``, a bound on -log P(levels) in nats an example.
    """
    num_levels = checks.count("num_levels", num_levels, 2)

    def bound(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        key_u, key_loss = jax.random.split(key)
        levels = _batch_of_levels(batch["x0"], num_levels, 'batch["x0"]')
        u, log_q = dequantizer(params["dequantizer"], key_u, levels)
        x0 = _place(levels, u, num_levels)
        loss, metrics = loss_fn(params["network"], key_loss, {**batch, "x0": x0})
        loss += log_q - math.prod(levels.shape[1:]) * math.log(2.0 / num_levels)
        return loss, {**metrics, "loss": loss, "log_q": log_q}

    return bound


def _place(levels: Array, u: Array, num_levels: int) -> Array:
    k = levels.astype(u.dtype)
    return jnp.where((k >= 0) & (k < num_levels), 2.0 * (k + u) / num_levels - 1.0, jnp.nan)


def _batch_of_levels(levels: Array, num_levels: int, name: str = "levels") -> Array:
    levels = checks.whole_numbers(name, levels, num_levels)
    if levels.ndim == 0 or levels.shape[0] == 0:
        raise ValueError(f"`{name}` must hold one row or more, (B, ...); got shape {levels.shape}.")
    return levels
