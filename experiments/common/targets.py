"""Eight distributions in the plane, of radius about 1; of four the density is known."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff import Mixture
from jaxdiff.typing import Array, Key

TargetName = Literal[
    "mixture", "grid", "unequal", "moons", "swiss_roll", "checkerboard", "pinwheel", "circles"
]


class Target(NamedTuple):
    """A distribution to learn.

    Attributes:
        sample: (key, n) -> (n, 2).
        log_prob: (x (n, 2)) -> nats (n,), where it is known.
        mixture: where it is a mixture of Gaussians, so that its score is known too.
    """

    sample: Callable[[Key, int], Array]
    log_prob: Callable[[Array], Array] | None = None
    mixture: Mixture | None = None


def make_target(name: str) -> Target:
    """Return a target by name, one of TargetName."""
    return _TARGETS[name]()


def _of_mixture(weights: Array, means: Array, covariances: Array) -> Target:
    mixture = Mixture(weights, means, covariances)
    return Target(mixture.sample, mixture.log_prob, mixture)


def _ring() -> Target:
    """Eight modes on the unit circle, std 0.1."""
    angles = jnp.arange(8) * (2.0 * jnp.pi / 8)
    means = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    return _of_mixture(jnp.full(8, 1 / 8), means, jnp.tile(0.01 * jnp.eye(2), (8, 1, 1)))


def _grid() -> Target:
    """Three by three modes, std 0.1."""
    places = jnp.array([-1.0, 0.0, 1.0])
    means = jnp.stack(jnp.meshgrid(places, places), axis=-1).reshape(9, 2)
    return _of_mixture(jnp.full(9, 1 / 9), means, jnp.tile(0.01 * jnp.eye(2), (9, 1, 1)))


def _unequal() -> Target:
    """Four modes of unequal weight and shape."""
    weights = jnp.array([0.5, 0.3, 0.15, 0.05])
    means = jnp.array([[-0.6, -0.4], [0.7, 0.5], [0.6, -0.8], [-0.7, 0.9]])
    covariances = jnp.array(
        [
            [[0.08, 0.05], [0.05, 0.06]],
            [[0.02, -0.015], [-0.015, 0.06]],
            [[0.03, 0.0], [0.0, 0.01]],
            [[0.01, 0.0], [0.0, 0.01]],
        ]
    )
    return _of_mixture(weights, means, covariances)


def _curve(curve: Callable[[Key, int], Array], noise: float) -> Target:
    """Points on a curve, with Gaussian noise."""

    def sample(key: Key, n: int) -> Array:
        key_curve, key_noise = jax.random.split(key)
        return curve(key_curve, n) + noise * jax.random.normal(key_noise, (n, 2))

    return Target(sample)


def _moons(key: Key, n: int) -> Array:
    key_angle, key_moon = jax.random.split(key)
    angle = jnp.pi * jax.random.uniform(key_angle, (n,))
    lower = jax.random.bernoulli(key_moon, shape=(n,))
    x = jnp.where(lower, 1.0 - jnp.cos(angle), jnp.cos(angle)) - 0.5
    y = jnp.where(lower, 0.5 - jnp.sin(angle), jnp.sin(angle)) - 0.25
    return 0.8 * jnp.stack([x, y], axis=1)


def _swiss_roll(key: Key, n: int) -> Array:
    angle = 1.5 * jnp.pi * (1.0 + 2.0 * jax.random.uniform(key, (n,)))
    return jnp.stack([angle * jnp.cos(angle), angle * jnp.sin(angle)], axis=1) / 12.0


def _circles(key: Key, n: int) -> Array:
    key_angle, key_ring = jax.random.split(key)
    angle = 2.0 * jnp.pi * jax.random.uniform(key_angle, (n,))
    radius = jnp.where(jax.random.bernoulli(key_ring, shape=(n,)), 1.0, 0.5)
    return radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)


def _pinwheel() -> Target:
    """Five arms, each a stretched Gaussian that turns with the radius."""

    def sample(key: Key, n: int) -> Array:
        key_arm, key_noise = jax.random.split(key)
        arm = jax.random.randint(key_arm, (n,), 0, 5)
        along, across = jnp.moveaxis(jax.random.normal(key_noise, (n, 2)), 1, 0)
        along, across = 0.65 + 0.2 * along, 0.07 * across
        angle = 2.0 * jnp.pi * arm / 5 + 0.8 * along
        turn = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        return jnp.stack(
            [along * turn[0] - across * turn[1], along * turn[1] + across * turn[0]], axis=1
        )

    return Target(sample)


def _checkerboard() -> Target:
    """Eight squares of side 1/2 on [-1, 1]^2, each uniform."""

    def sample(key: Key, n: int) -> Array:
        key_square, key_place = jax.random.split(key)
        square = jax.random.randint(key_square, (n,), 0, 8)
        row, column = square // 2, 2 * (square % 2) + (square // 2) % 2
        corner = jnp.stack([column, row], axis=1) / 2 - 1.0
        return corner + 0.5 * jax.random.uniform(key_place, (n, 2))

    def log_prob(x: Array) -> Array:
        cell = jnp.floor(2.0 * (x + 1.0)).astype(int)
        inside = (jnp.abs(x).max(axis=1) < 1.0) & (cell.sum(axis=1) % 2 == 0)
        return jnp.where(inside, -math.log(2.0), -jnp.inf)

    return Target(sample, log_prob)


_TARGETS: dict[str, Callable[[], Target]] = {
    "mixture": _ring,
    "grid": _grid,
    "unequal": _unequal,
    "moons": lambda: _curve(_moons, 0.06),
    "swiss_roll": lambda: _curve(_swiss_roll, 0.03),
    "checkerboard": _checkerboard,
    "pinwheel": _pinwheel,
    "circles": lambda: _curve(_circles, 0.05),
}
