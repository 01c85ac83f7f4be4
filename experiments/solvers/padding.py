"""Grids of several lengths for one compiled program."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.samplers import Sampler
from jaxdiff.typing import Array, Key


def pad(ts: Array, sizes: Sequence[int]) -> Array:
    """Add steps of no length, which change nothing, so that one program serves all sizes."""
    return jnp.pad(ts, (0, 1 + max(sizes) - len(ts)), mode="edge")


def skipping(sampler: Sampler) -> Sampler:
    """Return a sampler that does not evaluate its network in steps of no length."""

    def step(key: Key, state: Any, t: Array, s: Array) -> Any:
        def move() -> Any:
            moved = sampler.step(key, state, t, s)
            return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state)

        return jax.lax.cond(t == s, lambda: state, move)

    return sampler._replace(step=step)
