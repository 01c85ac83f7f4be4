"""Measure what the library costs beside the bare computation, paired in one run.

    python -m experiments.bench train_step
    python -m experiments.bench samplers

Both sides take turns, so that a machine whose speed drifts slows both; the last line is the median
of the pairwise ratios, ours over bare.
"""

import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments import command
from experiments.fitting import build_optimizer
from experiments.image_model import (
    PRESETS,
    Config,
    Model,
    build_loss,
    build_model,
    open_images,
)
from experiments.methods import METHODS
from jaxdiff import data, processes, sample, timesteps, training
from jaxdiff.training import parallel
from jaxdiff.typing import Array, Batch, Key, PyTree


def bare_step(config: Config, model: Model, optimizer: optax.GradientTransformation) -> Any:
    """The default digits step written out by hand: no library, no average, one draw of noise."""
    low, high, num_classes = config.log_snr_low, config.log_snr_high, model.null_label
    assert num_classes is not None

    def loss_fn(params: PyTree, key: Key, batch: Batch) -> Array:
        key_u, key_t, key_eps, key_drop = jax.random.split(key, 4)
        levels, labels = batch["x0"], batch["cond"]
        num = levels.shape[0]
        x0 = 2.0 * (levels + jax.random.uniform(key_u, levels.shape)) / 17 - 1.0
        u = (jax.random.uniform(key_t) + jnp.arange(num) / num) % 1.0
        log_snr = low + (high - low) * u
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))[:, None, None, None]
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr))[:, None, None, None]
        eps = jax.random.normal(key_eps, x0.shape)
        drop = jax.random.uniform(key_drop, (num,)) < config.drop_cond
        t = model.process.time_of_log_snr(log_snr)
        v = model.apply(params, alpha * x0 + sigma * eps, t, jnp.where(drop, num_classes, labels))
        return jnp.mean((alpha * (v - (alpha * eps - sigma * x0))) ** 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: PyTree, opt_state: PyTree, key: Key, batch: Batch) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, key, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def train_step(
    preset: Literal["full", "smoke"] = "full", seed: int = 0, rounds: int = 15, steps: int = 5
) -> None:
    """Time one update of the digits DiT against the same update written out by hand.

    Args:
        preset: Of the digits experiment.
        seed: Of parameters and noise.
        rounds: How many pairs are timed.
        steps: How many updates one timing holds.
    """
    config = dataclasses.replace(PRESETS[preset], seed=seed)
    config = dataclasses.replace(config, decay_steps=config.num_steps)
    images = open_images(config, "train")
    model, optimizer = build_model(config, images), build_optimizer(config)
    key = jax.random.key(seed)
    batches = data.batches(images, config.batch_size, seed=seed)

    update = training.make_update(
        build_loss(config, model, images.num_levels), optimizer, ema_decay=config.ema_decay
    )
    ours_step = parallel.jit(update, donate=True)
    bare = bare_step(config, model, optimizer)

    def run_ours() -> Iterator[None]:
        state = training.init(model.init_params(), optimizer, ema_decay=config.ema_decay)
        while True:
            for _ in range(steps):
                state, metrics = ours_step(state, key, next(batches))
            jax.block_until_ready((state, metrics))
            yield

    def run_bare() -> Iterator[None]:
        params = jax.tree.map(jnp.copy, model.init_params())
        opt_state, count = optimizer.init(params), 0
        while True:
            for _ in range(steps):
                count += 1
                step_key = jax.random.fold_in(key, count)
                params, opt_state, loss = bare(params, opt_state, step_key, next(batches))
            jax.block_until_ready((params, loss))
            yield

    compare({"jaxdiff": run_ours().__next__, "bare": run_bare().__next__}, rounds, steps)


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
    for option, value in (("--rounds", rounds), ("--num-steps", num_steps)):
        if value < 1:
            raise command.Refusal(f"{option} must be at least 1; got {value}.")
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
        if name == "adaptive":  # chooses its own number of calls
            continue
        ratios.append(
            row(name, functools.partial(whole, method.make, x_T, ts), method.calls(num_steps))
        )
    row("ddim, Python loop", functools.partial(loop, x_T), num_steps)
    print(f"ratio {max(ratios):.3f}")


def time_in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each side's calls, the sides taking turns."""
    for side in sides.values():
        side()  # compiles
        side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides) if i % 2 == 0 else reversed(list(sides)):
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: dict[str, list[float]]) -> float:
    """Return the median of the pairwise ratios of two sides, the first over the second."""
    ours, bare = times.values()
    return statistics.median([a / b for a, b in zip(ours, bare, strict=True)])


def compare(sides: dict[str, Callable[[], None]], rounds: int, calls: int) -> None:
    """Time two sides in turn; print both medians and, last, the median ratio."""
    times = time_in_turn(sides, rounds)
    print(f"{'side':<10} {'median ms':>10} {'min ms':>10} {'max ms':>10}")
    for name, seconds in times.items():
        row = [1e3 * f(seconds) / calls for f in (statistics.median, min, max)]
        print(f"{name:<10} " + " ".join(f"{value:10.3f}" for value in row))
    print(f"ratio {median_ratio(times):.3f}")


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("bench", {"train_step": train_step, "samplers": samplers}, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
