"""Compare the families of generative models on the same digits, by the same measures.

    python -m experiments.families --run-dir runs/families

A Gaussian mixture, a VAE, a GAN, DDPM and flow matching, none of them told the class. The four
with networks have as many parameters and as many floating-point operations of training, to a tenth.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments.common import command, optimization
from experiments.common.tables import write_csv
from experiments.families import report as families_report
from experiments.families.config import PRESETS, Config
from experiments.families.measures import (
    Digits,
    Row,
    bits,
    flat,
    load,
    log_probs,
    make_reader,
    to_levels,
)
from experiments.families.models import MAKERS
from experiments.families.networks import Family, describe
from jaxdiff import data, files, training
from jaxdiff.training import distributed
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


# --- Training -------------------------------------------------------------------------------


def train(directory: files.Path, config: Config, family: Family, images: data.Images) -> PyTree:
    """Train what is left of a family; return the averaged parameters."""
    state = training.fit(
        directory,
        lambda: family.state,
        family.update,
        partial(batches, config, images),
        key=jax.random.key(config.seed),
        num_steps=family.num_steps,
        cadence=optimization.cadence(config),
    )
    return distributed.gather(state.ema)


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
    directory: files.Path, config: Config, family: Family, digits: Digits, key: Key
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


@command.writes
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
