"""What a trained image model is worth: likelihood, baseline, speed, figures, and the report."""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import evaluations, flows
from experiments.common.choices import PROCESSES
from experiments.common.evaluations import MAIN
from experiments.common.methods import METHODS, make_grid
from experiments.images import data as image_data
from experiments.images.generator import make_generator
from experiments.images.judging import Judged, judge, make_bits_of, num_examples, say
from experiments.images.model import Config, Recipe, brightness, build_model, pixels
from jaxdiff import data, files, forward, plotting, timesteps
from jaxdiff.training import distributed
from jaxdiff.training import run as runs
from jaxdiff.typing import Array, Key, PyTree

__all__ = ["make_bits_of", "settings", "write"]

PER_CLASS, MAX_CLASSES = 8, 20
PATH_NUMBERS = 2**25
"""Numbers at most, of all images at all times, that the figure of trajectories is drawn from."""
TIMED_NUMBERS = 2**21
"""Numbers of all samples at all times beyond which the few trajectories are timed instead."""


def write(
    config: Config,
    params: PyTree,
    directory: files.Path,
    train: data.Images,
    test: data.Images,
    *,
    step: int,
    average: str = MAIN,
    exact: bool = False,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> None:
    """Judge and draw a model: evaluation.json, the figures and, last, report.md.

    The likelihoods are spread over `devices`, by default all, of every process: all call this
    alike, and process 0 draws and writes.

    Args:
        config: of the run, and how it is judged.
        params: what is judged.
        directory: of the run.
        train: the training images.
        test: the images that judge.
        step: how long `params` were trained.
        average: which average of the parameters they are.
        exact: also take the likelihood with the exact divergence.
        devices: which share the work.
        progress: say on stderr what takes its time.
    """
    model = build_model(config, train)
    key_judge, key_draw = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
    judged = judge(
        config,
        model,
        params,
        key_judge,
        train,
        test,
        exact=exact,
        devices=devices,
        progress=progress,
    )
    if not distributed.is_main():
        return
    say("Figures", progress)
    evaluations.begin(directory)
    results = {**judged.results, "steps_per_second": _median_rate(directory)}
    results["samples_per_second"] = draw(
        config, model, params, key_draw, test, directory, devices=devices
    )
    of = {"step": step, "average": average, **settings(config, test)}
    report = _report(config, model, of, results, judged, directory, train, test)
    evaluations.write(directory, of, results, report)


def settings(config: Config, test: data.Images) -> dict[str, Any]:
    """Return how a run is judged by a split of images, as judged.json says it."""
    return {
        "eval_split": test.split,
        "eval_examples": num_examples(config, test),
        "eval_tolerance": config.eval_tolerance,
        "sample_steps": config.sample_steps,
        "mixture_sizes": list(config.mixture_components),
    }


def _median_rate(directory: files.Path) -> float:
    rates = [
        line["steps_per_second"]
        for line in runs.read_metrics(directory / runs.METRICS)
        if "steps_per_second" in line
    ]
    return float(np.median(rates)) if rates else 0.0


# --- Figures --------------------------------------------------------------------------------


def draw(
    config: Config,
    model: Recipe,
    params: PyTree,
    key: Key,
    test: data.Images,
    directory: files.Path,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> float:
    """Draw the figures; return samples per second, compilation left out."""
    shown, size = shown_classes(test), config.sample_steps * math.prod(test.shape)
    labels = np.repeat(shown, PER_CLASS)
    generate = make_generator(
        model,
        test.shape,
        "ddim",
        config.sample_steps,
        grid=config.sample_grid,
        devices=devices,
    )
    key_noise = jax.random.split(key, 4)[2]
    x0, path, rate = _sampled(partial(generate, params), key, labels, shown[:10], size)
    drawn = pixels(x0, test.num_levels).reshape(len(shown), PER_CLASS, *test.shape)
    names = test.class_names or [str(k) for k in range(test.num_classes or 1)]
    plotting.save_by_class(
        directory / "samples.png",
        _by_class(test, shown),
        drawn,
        [names[k] for k in shown],
        f"{test.name}: held-out images and samples (DDIM, {config.sample_steps} steps)",
    )
    _draw_noising(model, key_noise, test, shown[:10], directory)

    frames = pixels(path, test.num_levels)
    kept = np.unique(np.linspace(0, len(frames) - 1, 11).round().astype(int))
    starts = METHODS["ddim"].start(model.process, model.model.needs_signal)
    times = np.asarray(make_grid(config.sample_grid, model.process, len(frames) - 1, starts))
    plotting.save_strip(
        directory / "reverse.png",
        frames[kept],
        [f"{times[i]:.2g}" for i in kept],
        "From noise to data: the reverse trajectory",
        "time t",
    )
    plotting.save_animation(directory / "reverse.gif", frames[:: max(1, len(frames) // 50)])
    evaluations.draw_loss(
        directory,
        directory,
        title="Training loss",
        ylabel=f"squared error of {config.loss_on or config.prediction}",
    )
    return rate


def _sampled(
    generate: Any, key: Key, labels: np.ndarray, one_each: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return samples, trajectories (T + 1, N, H, W, C) of some, and samples per second.

    Args:
        generate: draws images of labels.
        key: of all.
        labels: of the samples, which are timed after a first call, unless they are large: then
            the fewer trajectories are.
        one_each: labels of the trajectories; of very large images only the first are drawn.
        size: numbers in one trajectory.
    """
    key_warm, key_samples, _, key_path = jax.random.split(key, 4)
    one_each = one_each[: max(1, PATH_NUMBERS // size)]
    large = len(labels) * size > TIMED_NUMBERS
    timed, key_timed = (one_each, key_path) if large else (labels, key_samples)
    generate(key_warm, timed, keep_path=large)
    start = time.perf_counter()
    found = generate(key_timed, timed, keep_path=large)
    rate = len(timed) / (time.perf_counter() - start)
    if large:
        return generate(key_samples, labels)[0], found[1], rate
    return found[0], generate(key_path, one_each, keep_path=True)[1], rate


def shown_classes(images: data.Images) -> np.ndarray:
    """Return the classes that figures show: the first ones that occur."""
    return np.unique(image_data.scan(images)[1])[:MAX_CLASSES]


def _by_class(images: data.Images, classes: np.ndarray) -> np.ndarray:
    """The first images of each class, uint8 (K, PER_CLASS, H, W, C), cycling where too few."""
    levels, labels = image_data.scan(images)
    chosen = [np.resize(np.flatnonzero(labels == k), PER_CLASS) for k in classes]
    return brightness(levels[np.stack(chosen)], images.num_levels)


def _draw_noising(
    model: Recipe, key: Key, test: data.Images, classes: np.ndarray, directory: files.Path
) -> None:
    """Draw q(x_t | x_0) of one image a class, the same noise at every time."""
    levels, labels = image_data.scan(test)
    firsts = [int(np.flatnonzero(labels == k)[0]) for k in classes]
    x0 = data.centers(jnp.asarray(levels[np.array(firsts)]), test.num_levels, dtype=jnp.float32)
    times = np.linspace(0.0, float(model.process.t_max), 11, dtype=np.float32)

    @jax.jit
    def noised(t: Array) -> Array:
        x_t, _ = forward.perturb(key, model.process, x0, t)
        return x_t / jnp.hypot(model.process.alpha(t), model.process.sigma(t))

    frames = [pixels(noised(t), test.num_levels) for t in times]
    plotting.save_strip(
        directory / "noising.png",
        np.stack(frames),
        [f"{t:.2g}" for t in times],
        "From data to noise: the forward process",
        "time t",
    )


# --- Report ---------------------------------------------------------------------------------


def _report(
    config: Config,
    model: Recipe,
    of: Mapping[str, Any],
    results: Mapping[str, float],
    judged: Judged,
    directory: files.Path,
    train: data.Images,
    test: data.Images,
) -> str:
    record = runs.read_record(directory) or {}
    versions = ", ".join(f"{name} {v}" for name, v in record.get("versions", {}).items())
    num_params = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init_params)))
    rate = results["steps_per_second"]
    trained = evaluations.steps(of["step"], config.num_steps)
    notes = [*judged.notes, *_left_out(train, test)]
    if image_data.is_trained_on(test):
        notes.append("These images were trained on: what is called held out below is not.")
    said = "".join(f"\n- {note}" for note in notes)
    return f"""\
# {test.name}: {config.network}, {config.process} process, {trained}

![samples](samples.png)

Judged: the parameters of step {of["step"]}, average {_named(config, of["average"])}, by \
{test.name}/{test.split}.
{said}

## Likelihood

{_likelihood_table(results, judged)}

{_likelihood_words(config, results, train, test)}

## Speed

| | |
|---|---|
| training step | {1.0 / rate if rate else math.nan:.4f} s ({rate:.1f} a second) |
| sampling, DDIM with {config.sample_steps} steps | \
{results["samples_per_second"]:.1f} images a second |
| parameters | {num_params:,} |

## Figures

![forward process](noising.png)

![reverse trajectory](reverse.png)

![reverse trajectory, animated](reverse.gif)

![loss](loss.png)

## What produced it

Config hash `{record.get("hash")}`, seed {config.seed}, {len(train)} training images. \
{record.get("device")}. {versions}. Commit {record.get("git_commit")}. All of it: \
[config.json](config.json), [evaluation.json](evaluation.json).
"""


def _named(config: Config, average: str) -> str:
    return f"`{average}`" + (f" (decay {config.ema_decay:g})" if average == MAIN else "")


def _left_out(train: data.Images, test: data.Images) -> list[str]:
    """Say which classes the figures or the training lack."""
    notes = []
    for images, what in ((test, "are left out of the figures"), (train, "were never trained on")):
        never = image_data.missing_labels(images)
        if never:
            names = ", ".join(map(str, never[:MAX_CLASSES])) + (" ..." * (len(never) > MAX_CLASSES))
            notes.append(f"Labels without an image in {images.split} {what}: {names}.")
    if (test.num_classes or 0) > MAX_CLASSES:
        notes.append(f"The figures show {MAX_CLASSES} of {test.num_classes} classes.")
    return notes


def _likelihood_table(results: Mapping[str, float], judged: Judged) -> str:
    lines = ["| bits per dimension | |", "|---|---|"]
    held_out, stderr = (results.get(f"held_out_bits_per_dim{end}") for end in ("", "_stderr"))
    if held_out is not None and stderr is not None:
        what = "held out, image and class (probability-flow ODE, one Hutchinson probe)"
        lines.append(f"| {what} | {held_out:.3f} ± {stderr:.3f} |")
    for name, what in (
        ("held_out_bits_per_dim_exact", "the same, exact divergence"),
        ("train_bits_per_dim", "training images, likewise"),
        ("mixture_bits_per_dim", f"best Gaussian mixture by EM ({judged.mixture})"),
    ):
        if name in results:
            lines.append(f"| {what} | {results[name]:.3f} |")
    return "\n".join(lines)


def _likelihood_words(
    config: Config, results: Mapping[str, float], train: data.Images, test: data.Images
) -> str:
    count = min(num_examples(config, test), len(test), len(train))
    compared = ""
    if {"mixture_bits_per_dim", "held_out_bits_per_dim"} <= results.keys():
        gain = results["mixture_bits_per_dim"] - results["held_out_bits_per_dim"]
        compared = f"The model is {gain:.3f} bits per dimension below the mixture. "
    return f"""\
{compared}Both are densities of the same {count} uniformly dequantised held-out images; ± is the \
standard error over images. The mixture knows no class, so the model pays for it: log2(K)/D = \
{_class_bits(test):.3f} bits per dimension are in its numbers, which bound those of the image \
alone from above. The ODE runs from log-SNR {config.log_snr_high:g}{_end(config)}, at tolerance \
{config.eval_tolerance:g}; nothing is subtracted."""


def _end(config: Config) -> str:
    process = PROCESSES[config.process]()
    ended = flows.until_start(process, config.prediction)
    if ended is process:
        return ""
    return (
        f" to {timesteps.SIGNAL_START:g}, beyond which a network that predicts "
        f"{config.prediction} says nothing of x0"
    )


def _class_bits(images: data.Images) -> float:
    return math.log2(images.num_classes or 1) / math.prod(images.shape)
