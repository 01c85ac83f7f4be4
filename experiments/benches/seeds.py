"""Time seeds side by side in one run against one command a seed, start and compilation included."""

import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.ablations import plane, results
from experiments.ablations.definition import Ablation
from experiments.common import command, options

PLANE = Ablation(
    question="What do seeds cost?",
    world=plane.WORLD,
    base=plane.Config(width=32, depth=3, batch_size=128, num_steps=1000, eval_points=1000),
    axes={},
    measures=("score_error",),
    seeds=1,
)
"""A network in the plane."""
NAME = "experiments.benches.seeds:PLANE"


def seeds(num: int = 8, seed: int = 0, rounds: int = 1) -> None:
    """Time seeds of a 2-D network in one vmapped command against as many commands.

    The last line is the ratio of the whole times, one command over many; the line before it that
    of the training alone.

    Args:
        num: How many seeds.
        seed: The first of them.
        rounds: How many pairs are timed; the sides take turns.
    """
    command.check_seed(seed)
    options.check_counts(num=num, rounds=rounds)
    times: dict[str, list[tuple[float, float]]] = {"one command": [], "one a seed": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            times["one command"].append(_command(Path(folder) / f"{i}_all", num, seed))
            each = [_command(Path(folder) / f"{i}_{k}", 1, seed + k) for k in range(num)]
            times["one a seed"].append((sum(a for a, _ in each), sum(b for _, b in each)))
    print(f"{'side':<12} {'whole s':>9} {'training s':>11}")
    for name, found in times.items():
        whole, training = (statistics.median(side) for side in zip(*found, strict=True))
        print(f"{name:<12} {whole:9.2f} {training:11.2f}")
    together, apart = times.values()
    pairs = list(zip(together, apart, strict=True))
    print(f"training alone {statistics.median([a[1] / b[1] for a, b in pairs]):.3f}")
    print(f"ratio {statistics.median([a[0] / b[0] for a, b in pairs]):.3f}")


def _command(folder: Path, num: int, seed: int) -> tuple[float, float]:
    """Run one command; return its seconds in all and those of its training."""
    start = time.perf_counter()
    options = ["--run-dir", str(folder), "--seeds", str(num), "--seed", str(seed), "--quiet"]
    command = [sys.executable, "-m", "experiments.ablate", NAME, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    seconds = time.perf_counter() - start
    with (folder / results.TIMINGS).open() as file:
        return seconds, sum(float(row["train_seconds"]) for row in csv.DictReader(file))
