"""Compare the families of generative models on the same digits, by the same measures.

    python -m experiments.families --run-dir runs/families

A Gaussian mixture, a VAE, a GAN, DDPM and flow matching, none of them told the class. The four
with networks have as many parameters and as many floating-point operations of training, to a tenth.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command, families_report, fitting
from experiments.families_measures import (
    Digits,
    Row,
    bits,
    flat,
    load,
    log_probs,
    make_reader,
    to_levels,
)
from experiments.families_models import MAKERS
from experiments.families_networks import Family, describe
from experiments.tables import write_csv
from jaxdiff import data
from jaxdiff.training import loop, parallel
from jaxdiff.training import run as runs
from jaxdiff.typing import Batch, Key, PyTree

MIXTURE, FLOOR = "Gaussian mixture", "training images"
COLUMNS = (
    "family",
    "parameters",
    "steps",
    "training_flops",
    "components",
    "calls",
    "exact_bits_per_dim",
    "exact_stderr",
    "elbo_bits_per_dim",
    "elbo_stderr",
    "fine_bits_per_dim",
    "fine_stderr",
    "weighted_bits_per_dim",
    "weighted_stderr",
    "frechet",
    "precision",
    "recall",
    "density",
    "coverage",
)
SMOKE = ("GAN", "flow matching")
"""Families with networks in the smoke preset; compiling is what takes its time."""
TIMINGS = ("family", "train_seconds", "sample_seconds_per_1000")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is."""

    seed: int = 0
    """Of everything random."""
    width: int = 256
    """Of the network of DDPM and of flow matching."""
    depth: int = 4
    """Its residual blocks."""
    half_width: int = 264
    """Of encoder, decoder, generator and discriminator."""
    half_depth: int = 3
    """Their residual blocks."""
    latent: int = 32
    """Numbers in the latent of VAE and GAN."""
    dropout: float = 0.1
    """In the blocks of all networks but the GAN's."""
    batch_size: int = 128
    """Images an update."""
    num_steps: int = 4000
    """Updates of VAE, DDPM and flow matching."""
    decay_steps: int | None = None
    """Updates over which their learning rate decays: all of them."""
    learning_rate: float = 1e-3
    """Peak learning rate of their AdamW."""
    warmup_steps: int = 100
    """Updates over which it rises."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: float = 0.999
    """Decay of the moving average of the parameters, which samples and is judged."""
    gan_steps: int = 1700
    """Updates of the GAN, each of both networks, as many operations as the others' have."""
    gan_learning_rate: float = 1e-3
    """Learning rate of its Adam, with no momentum."""
    slope_penalty: float = 1.0
    """Weight of the squared slope of the discriminator at real images."""
    chain_steps: int = 1000
    """Steps of DDPM's chain."""
    log_snr_low: float = -10.0
    """Log-SNR of DDPM's noisiest training times."""
    log_snr_high: float = 12.0
    """Log-SNR of its cleanest, and of the data end of both probability flows."""
    ddpm_sampler: tuple[str, int] = ("ancestral", 250)
    """Method and steps of DDPM's samples."""
    flow_sampler: tuple[str, int] = ("heun", 25)
    """Method and steps of flow matching's samples."""
    num_samples: int = 1500
    """Samples a family, as many as there are training images."""
    mixture_components: tuple[int, ...] = (2, 4, 6, 8, 10, 12, 16)
    """Numbers of components tried on a fifth of the training images, held out."""
    eval_images: int = 297
    """Held-out images whose likelihood is taken."""
    eval_tolerance: float = 1e-3
    """Relative and absolute tolerance of the probability flows."""
    num_probes: int = 4
    """Hutchinson probes an image of their divergence."""
    elbo_steps: int = 999
    """Steps of the chain that DDPM's bound is taken on."""
    elbo_draws: int = 4
    """Draws of that bound's noise an image."""
    weights: int = 256
    """Draws an image of the VAE's bounds."""
    reader_iterations: int = 300
    """Epochs at most of the classifier whose features judge."""
    checkpoint_every: int = 1000
    """Updates between checkpoints; the last is always saved."""
    log_every: int = 50
    """Updates between logged ones."""


PRESETS = {
    "full": Config(),
    "smoke": Config(
        width=16,
        depth=1,
        half_width=16,
        half_depth=1,
        latent=4,
        batch_size=16,
        num_steps=6,
        warmup_steps=2,
        gan_steps=4,
        ddpm_sampler=("ancestral", 4),
        flow_sampler=("heun", 4),
        num_samples=24,
        mixture_components=(1, 2),
        eval_images=6,
        eval_tolerance=1e-1,
        num_probes=1,
        elbo_steps=111,
        elbo_draws=1,
        weights=4,
        reader_iterations=3,
        checkpoint_every=4,
        log_every=2,
    ),
}


# --- Training -------------------------------------------------------------------------------


def train(directory: Path, config: Config, family: Family, images: data.Images) -> PyTree:
    """Train what is left of a family; return the averaged parameters."""
    state = family.state
    with contextlib.closing(fitting.open_checkpoints(directory)) as checkpoints:
        restored = checkpoints.restore(target=state)
        if restored is not None:
            state = jax.tree.map(jnp.array, restored.state)  # copies, which the loop may donate
        start = int(state.step)
        if start >= family.num_steps:
            return state.ema
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(runs.MetricsLog(directory / runs.METRICS, after=start)) as log:
            state = loop.fit(
                state,
                parallel.jit(family.update, donate=True),
                jax.random.key(config.seed),
                batches(config, images, start),
                num_steps=family.num_steps,
                checkpoints=checkpoints,
                config={},
                log=log,
                log_every=config.log_every,
                checkpoint_every=config.checkpoint_every,
            )
    return state.ema


def batches(config: Config, images: data.Images, start: int) -> Iterator[Batch]:
    """Yield rows of levels of each step from `start` on, a function of (seed, step)."""
    drawn = data.batches(images, config.batch_size, seed=config.seed, start_step=start)
    return ({"x0": flat(batch["image"])} for batch in drawn)


# --- Families -------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What is known of a family: results, timings, and levels (N, D) that it drew."""

    results: Row
    timings: Row
    drawn: np.ndarray


def fit_mixture(config: Config, digits: Digits) -> Outcome:
    """Fit a Gaussian mixture by EM, its size chosen on a fifth of the training images."""
    from sklearn.mixture import GaussianMixture

    def fit(num_components: int, x: np.ndarray) -> Any:
        mixture = GaussianMixture(num_components, reg_covar=1e-3, random_state=config.seed)
        return mixture.fit(x.astype(np.float64))

    start = time.perf_counter()
    rows = np.random.default_rng(config.seed).permutation(len(digits.x_train))
    seen, kept = (digits.x_train[part] for part in np.split(rows, [len(rows) * 4 // 5]))
    scores = {size: fit(size, seen).score(kept) for size in config.mixture_components}
    size = max(scores, key=scores.__getitem__)
    mixture = fit(size, digits.x_train)
    fitted = time.perf_counter()
    drawn, _ = mixture.sample(config.num_samples)
    end = time.perf_counter()
    num_dims = digits.x_train.shape[1]
    return Outcome(
        {
            "parameters": size * (num_dims + num_dims * (num_dims + 1) // 2 + 1) - 1,
            "components": size,
            **bits({"exact": mixture.score_samples(digits.x_held_out)}, digits),
        },
        seconds(fitted - start, end - fitted, config),
        to_levels(np.random.default_rng(config.seed).permutation(drawn), digits),
    )


def fit_network(
    directory: Path, config: Config, family: Family, digits: Digits, key: Key
) -> Outcome:
    """Train a family with networks, and judge it."""
    key_likelihood, key_draw = jax.random.split(key)
    params = train(directory, config, family, digits.train)
    found = log_probs(config, family, params, key_likelihood, digits.x_held_out)
    draw = jax.jit(family.draw).lower(params, key_draw).compile()
    start = time.perf_counter()
    drawn = np.asarray(draw(params, key_draw))
    sampling = time.perf_counter() - start
    rates = [
        line["steps_per_second"]
        for line in runs.read_metrics(directory / runs.METRICS)
        if "steps_per_second" in line
    ]
    training = family.num_steps / float(np.median(rates)) if rates else math.nan
    return Outcome(
        {
            "parameters": family.num_params,
            "steps": family.num_steps,
            "training_flops": family.training_flops(config.batch_size, drawn.shape[1]),
            "calls": family.calls,
            **bits(found, digits),
        },
        seconds(training, sampling, config),
        to_levels(drawn, digits),
    )


def seconds(training: float, sampling: float, config: Config) -> Row:
    """Return the timings of a family: the whole training, and a thousand samples."""
    return {
        "train_seconds": training,
        "sample_seconds_per_1000": 1000.0 * sampling / config.num_samples,
    }


# --- Command --------------------------------------------------------------------------------


def families(run_dir: str, preset: Literal["full", "smoke"] = "full", seed: int = 0) -> None:
    """Train the families on the digits, judge them by the same measures and draw them.

    Args:
        run_dir: Folder of the results; the same command on it resumes.
        preset: How large, how long.
        seed: Of everything random.
    """
    command.check_seed(seed)
    config = dataclasses.replace(PRESETS[preset], seed=seed)
    asked = {"experiment": "families", "preset": preset, **dataclasses.asdict(config)}
    directory = command.open_run(run_dir, json.loads(json.dumps(asked)))
    if directory is None:
        return
    with command.compiling_for(preset):
        key_data, *keys = jax.random.split(jax.random.key(seed), 1 + len(MAKERS))
        digits = load(key_data)
        digits = digits._replace(x_held_out=digits.x_held_out[: config.eval_images])
        pixels = describe(flat(digits.train.levels), digits.train.num_levels)
        reader = make_reader(config, digits)
        outcomes = {MIXTURE: fit_mixture(config, digits)}
        for (name, make), key in zip(MAKERS.items(), keys, strict=True):
            if preset == "smoke" and name not in SMOKE:
                continue
            folder = directory / name.lower().replace(" ", "_")
            outcomes[name] = fit_network(folder, config, make(config, pixels), digits, key)
        outcomes[FLOOR] = Outcome({}, {}, flat(digits.train.levels))
    rows = [
        {"family": name, **outcome.results, **reader.compare(outcome.drawn)}
        for name, outcome in outcomes.items()
    ]
    timings = [
        {"family": name, **outcome.timings} for name, outcome in outcomes.items() if outcome.timings
    ]
    write_csv(directory / "results.csv", rows, COLUMNS)
    write_csv(directory / "timings.csv", timings, TIMINGS)
    drawn = {"real, held out": flat(digits.held_out.levels)}
    drawn |= {name: outcome.drawn for name, outcome in outcomes.items() if name != FLOOR}
    families_report.write(config, directory, rows, timings, drawn, digits.held_out, reader.accuracy)
    print(f"Report: {directory / command.REPORT}")


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("families", families, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
