"""One update of the digits model: against the bare one, and with checkpoints."""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.benches.timing import compare
from experiments.common import options
from experiments.common.optimization import build_optimizer
from experiments.images.model import (
    PRESETS,
    Config,
    Recipe,
    build_loss,
    build_model,
    check,
    open_images,
)
from jaxdiff import data, training
from jaxdiff.training import parallel
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.typing import Array, Batch, Key, LossFn, PyTree

Preset = Literal["full", "smoke"]


def bare_step(config: Config, model: Recipe, optimizer: optax.GradientTransformation) -> Any:
    """The default digits step written out by hand: no library, no average, one draw of noise."""
    low, high, num_classes = config.log_snr_low, config.log_snr_high, model.null_label
    assert num_classes is not None

    def loss_fn(params: PyTree, key: Key, batch: Batch) -> Array:
        key_u, key_t, key_eps, key_drop = jax.random.split(key, 4)
        levels, labels = batch["image"], batch["label"]
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


class Digits(NamedTuple):
    """The digits model of a preset, ready to be trained."""

    config: Config
    images: data.Images
    model: Recipe
    optimizer: optax.GradientTransformation
    loss_fn: LossFn

    @property
    def update(self) -> training.Update:
        """The update on one device or a mesh."""
        decay = self.config.ema_decay
        return training.make_update(self.loss_fn, self.optimizer, ema_decay=decay)

    def start(self) -> training.TrainState:
        """Return the state before the first update."""
        params = self.model.init_params()
        return training.init(params, self.optimizer, ema_decay=self.config.ema_decay)

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of a run."""
        return data.batches(self.images, self.config.batch_size, seed=self.config.seed)


def digits(preset: Preset, seed: int, **changes: Any) -> Digits:
    """Make the digits model of a preset."""
    config = dataclasses.replace(PRESETS[preset], seed=seed, **changes)
    check(config)
    config = dataclasses.replace(config, decay_steps=config.num_steps)
    images = open_images(config, "train")
    model, optimizer = build_model(config, images), build_optimizer(config)
    loss_fn = build_loss(config, model, images.num_levels)
    return Digits(config, images, model, optimizer, loss_fn)


def train_step(preset: Preset = "full", seed: int = 0, rounds: int = 15, steps: int = 5) -> None:
    """Time one update of the digits DiT against the same update written out by hand.

    Args:
        preset: Of the digits experiment.
        seed: Of parameters and noise.
        rounds: How many pairs are timed.
        steps: How many updates one timing holds.
    """
    options.check_counts(rounds=rounds, steps=steps)
    ours = digits(preset, seed)
    key, batches = jax.random.key(seed), ours.batches()
    step = parallel.jit(ours.update, donate=True)
    bare = bare_step(ours.config, ours.model, ours.optimizer)

    def run_ours() -> Iterator[None]:
        state = ours.start()
        while True:
            for _ in range(steps):
                state, metrics = step(state, key, next(batches))
            jax.block_until_ready((state, metrics))
            yield

    def run_bare() -> Iterator[None]:
        params = ours.model.init_params()
        opt_state, count = ours.optimizer.init(params), 0
        while True:
            for _ in range(steps):
                count += 1
                step_key = jax.random.fold_in(key, count)
                params, opt_state, loss = bare(params, opt_state, step_key, next(batches))
            jax.block_until_ready((params, loss))
            yield

    compare({"jaxdiff": run_ours().__next__, "bare": run_bare().__next__}, rounds, steps)


def checkpoints(
    preset: Preset = "full",
    seed: int = 0,
    rounds: int = 5,
    steps: int = 100,
    folder: str | None = None,
) -> None:
    """Time updates during which a checkpoint is written against the same number without.

    Args:
        preset: Of the digits experiment.
        seed: Of parameters and noise.
        rounds: How many pairs are timed.
        steps: Updates between checkpoints.
        folder: Where they are saved, a path or a URL; a temporary folder by default.
    """
    options.check_counts(rounds=rounds, steps=steps)
    ours = digits(preset, seed)
    key, batches = jax.random.key(seed), ours.batches()
    step = parallel.jit(ours.update, donate=True)

    def run(saved: Checkpoints | None) -> Iterator[None]:
        state = ours.start()
        for count in itertools.count():
            if saved is not None:
                saved.save(count, state, {"preset": preset})
            for _ in range(steps):
                state, metrics = step(state, key, next(batches))
            jax.block_until_ready((state, metrics))
            if saved is not None:
                saved.wait()
            yield

    with (
        tempfile.TemporaryDirectory() as temporary,
        contextlib.closing(Checkpoints(folder or temporary)) as saved,
    ):
        sides = {"saving": run(saved).__next__, "bare": run(None).__next__}
        compare(sides, rounds, steps)
