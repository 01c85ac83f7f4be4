"""Carry out a group: train it, sample each run as its sampling axes say, and measure."""

import functools
import math
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablations import training
from experiments.ablations.definition import SEED, Ablation, Group, row_hash
from experiments.ablations.fields import as_json, replaced
from experiments.ablations.world import Problem
from jaxdiff.training import run as runs

PACKAGES = ("scipy", "scikit-learn", "statsmodels", "pot")

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
"""Of XLA_FLAGS: else XLA times kernels of GPUs to choose among them, and sums in any order."""
Result = dict[str, Any]
"""What a group's file holds: its rows, and what does not reproduce beside them."""


def run_group(
    ablation: Ablation, group: Group, tick: Callable[[int], None] = lambda count: None
) -> Result:
    """Return the result of a group, as JSON holds it.

    Args:
        ablation: the whole.
        group: one of its groups.
        tick: told how many steps of training each call has made, and of none between measures.
    """
    problem = ablation.world.problem(group.config)
    trained = training.train(problem, group, tick)
    began = time.perf_counter()
    found = _measure(ablation, group, problem, trained, tick)
    call_flops = problem.call_flops() if any(nfe for nfe, _ in found) else None
    rows = []
    for (i, how), row in zip(group.pairs, group.rows(), strict=True):
        nfe, values = found[how]
        rows.append(
            {
                **as_json(row),
                "hash": row_hash(ablation, replaced(group.config, row)),
                **{name: _number(value[i], trained.finite[i]) for name, value in values.items()},
                "nfe": nfe,
                "train_flops": trained.flops,
                "sample_flops": None if nfe is None or call_flops is None else nfe * call_flops,
            }
        )
    return {
        "group": group.index,
        "rows": rows,
        "seconds": {**trained.seconds, "judge": time.perf_counter() - began},
        "environment": environment(),
    }


def _measure(
    ablation: Ablation,
    group: Group,
    problem: Problem,
    trained: training.Trained,
    tick: Callable[[int], None],
) -> list[tuple[int | None, dict[str, Any]]]:
    """Return, for each sampling, the calls a sample and the values (M,) by measure."""
    world, members = ablation.world, trained.members
    measures = {name: world.measures[name] for name in ablation.measures}
    sampled = any(measure.sampled for measure in measures.values())
    programs = {
        name: members.map(functools.partial(measure.of_model, problem))
        for name, measure in measures.items()
        if measure.of_model is not None
    }
    draw = members.map(problem.draw)
    of_model: dict[float | None, dict[str, Any]] = {}
    found = []
    for sampling in group.samplings:
        average = replaced(members.config, sampling).average
        how = replaced(members.config, {f: v for f, v in sampling.items() if f in world.sampling})
        params = training.average_of(trained, average)
        samples = np.asarray(draw(how, params)) if sampled else np.zeros(0)
        known, values = of_model.setdefault(average, {}), {}
        for name, measure in measures.items():
            tick(0)
            if measure.of_samples is not None:
                values[name] = [
                    measure.of_samples(problem, how, member[SEED], x)
                    for member, x in zip(group.members, samples, strict=True)
                ]
                continue
            if name not in known:  # the same however the run is sampled
                known[name] = np.asarray(programs[name](members.config, params)).tolist()
            values[name] = known[name]
        found.append((problem.calls(how) if sampled else None, values))
    return found


def _number(value: Any, finite: Any) -> float | None:
    """Return a value as JSON holds it; None where the run or the measure has diverged."""
    return float(value) if finite and math.isfinite(float(value)) else None


def environment() -> dict[str, Any]:
    """Return what the last bits may depend on: versions, device, threads, flags, git commit."""
    found = runs.environment()
    for name in PACKAGES:
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    processor = {"machine": platform.machine(), "cpus": os.cpu_count(), "cpu": _processor()}
    return {**found, **processor, "xla_flags": os.environ.get("XLA_FLAGS", "")}


def is_repeatable(environment: dict[str, Any]) -> bool:
    """Whether what ran in an environment has the same bits when it runs there again."""
    flags = environment.get("xla_flags", "")
    return "(gpu)" not in environment.get("device", "") or DETERMINISTIC in flags


def _processor() -> str | None:
    """Return which processor this is, as Linux tells: XLA compiles for it, and so rounds by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or None
    wanted = ("model name", "cpu family", "model", "stepping")
    found = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    return ", ".join(f"{name} {found[name]}" for name in wanted if name in found) or None
