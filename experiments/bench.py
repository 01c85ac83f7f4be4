"""Measure what the library costs beside the bare computation, paired in one run.

    python -m experiments.bench train_step

Both sides take turns, so that a machine whose speed drifts slows both; the last line is the median
of the pairwise ratios, ours over bare.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments import command
from experiments.image_model import (
    PRESETS,
    Config,
    Model,
    build_loss,
    build_model,
    build_optimizer,
    open_images,
)
from jaxdiff import data, training
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
        state = training.init(model.params, optimizer, ema_decay=config.ema_decay)
        while True:
            for _ in range(steps):
                state, metrics = ours_step(state, key, next(batches))
            jax.block_until_ready((state, metrics))
            yield

    def run_bare() -> Iterator[None]:
        params = jax.tree.map(jnp.copy, model.params)
        opt_state, count = optimizer.init(params), 0
        while True:
            for _ in range(steps):
                count += 1
                step_key = jax.random.fold_in(key, count)
                params, opt_state, loss = bare(params, opt_state, step_key, next(batches))
            jax.block_until_ready((params, loss))
            yield

    compare({"jaxdiff": run_ours().__next__, "bare": run_bare().__next__}, rounds, steps)


def compare(sides: dict[str, Callable[[], None]], rounds: int, calls: int) -> None:
    """Time two sides in turn; print both medians and, last, the median ratio."""
    for side in sides.values():
        side()  # compiles
        side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides) if i % 2 == 0 else reversed(list(sides)):
            start = time.perf_counter()
            sides[name]()
            times[name].append((time.perf_counter() - start) / calls)
    print(f"{'side':<10} {'median ms':>10} {'min ms':>10} {'max ms':>10}")
    for name, seconds in times.items():
        row = [1e3 * f(seconds) for f in (statistics.median, min, max)]
        print(f"{name:<10} " + " ".join(f"{value:10.3f}" for value in row))
    ours, bare = times.values()
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    print(f"ratio {statistics.median(ratios):.3f}")


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("bench", {"train_step": train_step}, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
