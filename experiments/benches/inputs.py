"""The input of the digits model's updates: whether they wait for it."""

import dataclasses
import functools
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benches import jpegs
from experiments.benches.timing import compare, time_in_turn
from experiments.benches.training import Digits, Preset, digits
from experiments.common import options
from jaxdiff import data
from jaxdiff.training import parallel

THREADS = (0, 1, 2, 4)


def input_pipeline(
    preset: Preset = "full",
    seed: int = 0,
    rounds: int = 15,
    steps: int = 5,
    data_set: str = "digits",
    data_dir: str | None = None,
    num_images: int = 4096,
    step_rows: int = 2,
) -> None:
    """Time updates fed by the pipeline against updates of one batch that is there already.

    Args:
        preset: Of the digits experiment.
        seed: Of parameters and noise.
        rounds: How many pairs are timed.
        steps: How many updates one timing holds.
        data_set: As `--data` of the digits experiment; "jpegs" without `--data-dir` is a set of 64
            x 64 JPEG images, made for the occasion and read record by record.
        data_dir: Where it lies.
        num_images: How many of those are made.
        step_rows: The batch of an update on those.
    """
    options.check_counts(rounds=rounds, steps=steps, num_images=num_images, step_rows=step_rows)
    if data_set == jpegs.NAME and data_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            jpegs.write(folder, num_images, num_shards=16)
            changes = {"data": data_set, "data_dir": folder, "batch_size": step_rows}
            ours = digits(preset, seed, **changes)
            ours = ours._replace(images=dataclasses.replace(ours.images, memory_limit=0))
            _records(ours.images, seed, rounds)
            _updates(ours, rounds, steps)
        return
    ours = digits(preset, seed, data=data_set, data_dir=data_dir)
    mode, batches = parallel.mode_of_one_device(), ours.batches()

    def pipeline_alone() -> None:
        for _ in range(steps):
            jax.block_until_ready(mode.place_batch(next(batches)))

    alone = np.median(time_in_turn({"pipeline": pipeline_alone}, rounds)["pipeline"]) / steps
    print(f"pipeline alone: {ours.config.batch_size / alone:,.0f} examples a second")
    _updates(ours, rounds, steps)


def _updates(ours: Digits, rounds: int, steps: int) -> None:
    """Time updates, fed and bare."""
    key, mode, batches = (
        jax.random.key(ours.config.seed),
        parallel.mode_of_one_device(),
        ours.batches(),
    )
    step = mode.compile(ours.update, donate=True)
    there = mode.place_batch(next(batches))
    state = {"fed": ours.start(), "bare": ours.start()}

    def run(side: str) -> None:
        for _ in range(steps):
            batch = mode.place_batch(next(batches)) if side == "fed" else there
            state[side], _ = step(state[side], key, batch)
        jax.block_until_ready(state[side])

    compare({side: functools.partial(run, side) for side in ("fed", "bare")}, rounds, steps)


def _records(images: data.Images, seed: int, rounds: int) -> None:
    """Print how many images a second are decoded alone, and come out of the pipeline."""
    size, batch = images.shape[0], min(256, len(images))
    count = max(1, min(16, len(images) // batch))
    encoded = [jpegs.jpeg(number, size) for number in range(batch)]

    def decode() -> None:
        from PIL import Image

        for _ in range(count):
            for each in encoded:
                with Image.open(io.BytesIO(each)) as image:
                    np.asarray(image)

    def pipeline(threads: int) -> None:
        reader: Any = data.batches(images, batch, seed=seed, prefetch=threads)
        for _ in range(count):  # begun anew, so that nothing was read while others had their turn
            next(reader)
        reader.close()

    work: dict[str, Callable[[], None]] = {"decoding alone": decode}
    for threads in THREADS:
        work[f"pipeline, {threads} threads"] = functools.partial(pipeline, threads)
    of_cores: dict[str, list[float]] = {name: [] for name in work}

    def side(name: str) -> None:
        start = time.process_time()
        work[name]()
        of_cores[name].append(time.process_time() - start)

    sides = {name: functools.partial(side, name) for name in work}
    print(
        f"{len(images)} JPEGs of {size} x {size}, {np.mean([*map(len, encoded)]):,.0f} bytes each"
    )
    print(f"{'images a second':<20} {'median':>10} {'max':>10} {'of one core':>12}")
    for name, seconds in time_in_turn(sides, rounds).items():
        taken = statistics.median(seconds), min(seconds), statistics.median(of_cores[name])
        rates = [count * batch / each for each in taken]
        print(f"{name:<20} " + f"{rates[0]:10,.0f} {rates[1]:10,.0f} {rates[2]:12,.0f}")
