"""Every sampler against its network calls alone."""

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benches.timing import median_ratio, time_in_turn
from experiments.common import command, options
from experiments.common.methods import METHODS
from jaxdiff import processes, sample, timesteps
from jaxdiff.typing import Array


def samplers(
    seed: int = 0, rounds: int = 15, num_steps: int = 20, batch_size: int = 64, width: int = 24_576
) -> None:
    """Time every sampler against its network calls alone, in a bare scan.

    The last line is the largest of the samplers' median ratios.

    Args:
        seed: Of the network and the noise.
        rounds: How many pairs are timed.
        num_steps: Steps from noise to data.
        batch_size: Rows of 64 numbers.
        width: Of the two-layer network; 24576 take a few milliseconds a call on two cores.
    """
    command.check_seed(seed)
    options.check_counts(rounds=rounds, num_steps=num_steps, batch_size=batch_size, width=width)
    key_in, key_out, key_x = jax.random.split(jax.random.key(seed), 3)
    into = jax.random.normal(key_in, (64, width)) / 8.0
    out = jax.random.normal(key_out, (width, 64)) / width**0.5
    process = processes.vp()
    x_T = process.prior_sample(key_x, (batch_size, 64))  # noqa: N806
    ts = timesteps.uniform(process, num_steps)

    def denoise(x_t: Array, t: Array) -> Array:
        return jnp.tanh(x_t @ into + t) @ out

    @functools.partial(jax.jit, static_argnums=1)
    def bare(x: Array, calls: int) -> Array:
        times = jnp.linspace(1.0, 0.0, calls)
        return jax.lax.scan(lambda x, t: (denoise(x, t), None), x, times)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def whole(make: Any, x: Array, ts: Array) -> Array:
        return sample(key_x, make(process, denoise), x, ts)

    @jax.jit
    def ddim_step(x: Array, t: Array, s: Array) -> Array:
        return METHODS["ddim"].make(process, denoise).step(key_x, x, t, s)

    def loop(x: Array) -> Array:
        for t, s in itertools.pairwise(ts):
            x = ddim_step(x, t, s)
        return x

    print(f"{'sampler':<20} {'calls':>6} {'ms':>9} {'bare ms':>9} {'ratio':>7}")

    def row(name: str, ours: Callable[[], Any], calls: int) -> float:
        def finish(run: Callable[[], Any]) -> Any:
            return jax.block_until_ready(run())

        def run_bare() -> Array:
            return bare(x_T, calls)

        sides = {
            name: functools.partial(finish, run)
            for name, run in (("ours", ours), ("bare", run_bare))
        }
        times = time_in_turn(sides, rounds)
        ratio = median_ratio(times)
        medians = [1e3 * statistics.median(seconds) for seconds in times.values()]
        print(f"{name:<20} {calls:6d} {medians[0]:9.2f} {medians[1]:9.2f} {ratio:7.3f}", flush=True)
        return ratio

    ratios = []
    for name, method in METHODS.items():
        calls = method.calls(num_steps)
        if calls is not None:  # the rows do not decide
            ratios.append(row(name, functools.partial(whole, method.make, x_T, ts), calls))
    row("ddim, Python loop", functools.partial(loop, x_T), num_steps)
    print(f"ratio {max(ratios):.3f}")
