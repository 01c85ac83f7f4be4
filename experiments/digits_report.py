"""What a trained image model is worth: likelihood, baseline, speed, figures, and the report."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command import REPORT
from experiments.image_model import (
    Config,
    Model,
    brightness,
    build_model,
    make_generator,
    open_images,
    pixels,
)
from jaxdiff import data, forward, likelihood, numerics, plotting
from jaxdiff.training import distributed, parallel
from jaxdiff.training import run as runs
from jaxdiff.typing import Array, Key, PyTree

EVALUATION = "evaluation.json"
PER_CLASS = 8


def write(
    config: Config,
    params: PyTree,
    directory: Path,
    *,
    exact: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> None:
    """Judge and draw a model: evaluation.json, the figures and, last, report.md.

    The likelihoods are spread over `devices`, by default all, of every process: all call this
    alike, and process 0 draws and writes.
    """
    train, test = (open_images(config, split) for split in ("train", "test"))
    model = build_model(config, train)
    key_judge, key_draw = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
    results = judge(config, model, params, key_judge, train, test, exact=exact, devices=devices)
    if not distributed.is_main():
        return
    results["steps_per_second"] = _median_rate(directory)
    results["samples_per_second"] = draw(
        config, model, params, key_draw, test, directory, devices=devices
    )
    runs.replace_text(directory / EVALUATION, json.dumps(results, indent=2) + "\n")
    runs.replace_text(directory / REPORT, _report(config, model, results, directory, train, test))


# --- Likelihood -----------------------------------------------------------------------------


def judge(
    config: Config,
    model: Model,
    params: PyTree,
    key: Key,
    train: data.Images,
    test: data.Images,
    *,
    exact: bool,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, float]:
    """Return bits per dimension of the model and of the best Gaussian mixture, by name.

    The model's are those of an image and its class: log p(x | y) + log(1 / K), which bounds
    log p(x) from below, so that they can stand beside a mixture that knows no class.
    """
    key_test, key_train, key_probes, key_mixture = jax.random.split(key, 4)
    x_test = _dequantized(key_test, test)
    x_train = _dequantized(key_train, train)
    count = min(config.eval_examples, len(test), len(train))
    bits_of = make_bits_of(config, model, test, devices=devices)
    held_out = bits_of(params, key_probes, x_test[:count], _labels(test)[:count])
    seen = bits_of(params, key_probes, x_train[:count], _labels(train)[:count])
    results = {
        "held_out_bits_per_dim": float(held_out.mean()),
        "held_out_bits_per_dim_stderr": float(held_out.std(ddof=1) / math.sqrt(count)),
        "train_bits_per_dim": float(seen.mean()),
    }
    if exact:
        exact_bits_of = make_bits_of(config, model, test, exact=True, devices=devices)
        values = exact_bits_of(params, key_probes, x_test[:count], _labels(test)[:count])
        results["held_out_bits_per_dim_exact"] = float(values.mean())
    if not distributed.is_main():
        return results
    seed = int(jax.random.bits(key_mixture, dtype=jnp.uint16))
    by_components = mixture_bits(
        x_train, x_test[:count], config.mixture_components, test.bin_width, seed
    )
    best = min(by_components, key=by_components.__getitem__)
    results |= {"mixture_bits_per_dim": by_components[best], "mixture_components": best}
    return results


def make_bits_of(
    config: Config,
    model: Model,
    images: data.Images,
    *,
    exact: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Any:
    """Return ``bits_of(params, key, x (N, H, W, C), labels (N,)) -> (N,)`` bits per dimension."""
    num_dims = math.prod(images.shape)

    def of_chunk(params: PyTree, keys: Key, x: Array, labels: Array) -> Array:
        def of_one(key: Key, x: Array, label: Array) -> Array:
            log_prob, _ = likelihood.log_prob(
                model.process,
                model.denoiser(params, label[None]),
                x[None],
                key=None if exact else key[None],
                num_probes=None if exact else 1,
                rtol=config.eval_tolerance,
                atol=config.eval_tolerance,
                t_min=model.process.time_of_log_snr(jnp.float32(config.log_snr_high)),
            )
            return log_prob[0]

        log_prob = jax.vmap(of_one)(keys, x, labels)
        log_prob -= math.log(images.num_classes or 1)
        return likelihood.bits_per_dim(log_prob, num_dims, images.bin_width)

    spread = parallel.map_rows(of_chunk, devices=devices)

    def bits_of(params: PyTree, key: Key, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
        mine = distributed.rows_of(len(x))
        rows = numerics.row_keys(key, len(x))[mine], x[mine], labels[mine]
        size = 16 if exact else max(len(mine), 1)
        parts = [
            spread(params, *(each[i : i + size] for each in rows))
            for i in range(0, len(mine), size)
        ]
        return distributed.join_rows(np.concatenate([np.zeros(0, np.float32), *parts]), len(x))

    return bits_of


def mixture_bits(
    x_train: np.ndarray,
    x_test: np.ndarray,
    components: tuple[int, ...],
    bin_width: float,
    seed: int,
) -> dict[int, float]:
    """Fit Gaussian mixtures of full covariance by EM; return held-out bits by their size."""
    from sklearn.mixture import GaussianMixture

    flat_train, flat_test = (x.reshape(len(x), -1).astype(np.float64) for x in (x_train, x_test))
    results = {}
    for num_components in components:
        if num_components > len(flat_train):
            continue
        fitted = GaussianMixture(num_components, reg_covar=1e-3, random_state=seed)
        log_prob = jnp.asarray(fitted.fit(flat_train).score_samples(flat_test))
        bits = likelihood.bits_per_dim(log_prob, flat_test.shape[1], bin_width)
        results[num_components] = float(np.mean(bits))
    return results


def _dequantized(key: Key, images: data.Images) -> np.ndarray:
    draw = jax.jit(data.dequantize, static_argnums=2, static_argnames="dtype")
    return np.asarray(draw(key, images.levels, images.num_levels, dtype=jnp.float32))


def _labels(images: data.Images) -> np.ndarray:
    return np.zeros(len(images), np.int32) if images.labels is None else images.labels


def _median_rate(directory: Path) -> float:
    rates = [
        line["steps_per_second"]
        for line in runs.read_metrics(directory / runs.METRICS)
        if "steps_per_second" in line
    ]
    return float(np.median(rates)) if rates else 0.0


# --- Figures --------------------------------------------------------------------------------


def draw(
    config: Config,
    model: Model,
    params: PyTree,
    key: Key,
    test: data.Images,
    directory: Path,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> float:
    """Draw the figures; return samples per second, compilation left out."""
    num_classes = test.num_classes or 1
    labels = np.repeat(np.arange(num_classes), PER_CLASS)
    generate = make_generator(model, test.shape, "ddim", config.sample_steps, devices=devices)
    key_warm, key_samples, key_noise, key_path = jax.random.split(key, 4)
    generate(params, key_warm, labels)
    start = time.perf_counter()
    x0, _ = generate(params, key_samples, labels)
    rate = len(labels) / (time.perf_counter() - start)
    drawn = pixels(x0, test.num_levels).reshape(num_classes, PER_CLASS, *test.shape)
    plotting.save_by_class(
        directory / "samples.png",
        _by_class(test, num_classes),
        drawn,
        [str(k) for k in range(num_classes)],
        f"{test.name}: held-out images and samples (DDIM, {config.sample_steps} steps)",
    )
    _draw_noising(model, key_noise, test, num_classes, directory)

    one_each = np.arange(min(num_classes, 10))
    _, path = generate(params, key_path, one_each, keep_path=True)
    assert path is not None
    frames = pixels(path, test.num_levels)
    kept = np.unique(np.linspace(0, len(frames) - 1, 11).round().astype(int))
    times = np.linspace(float(model.process.t_max), 0.0, len(frames))
    plotting.save_strip(
        directory / "reverse.png",
        frames[kept],
        [f"{times[i]:.2g}" for i in kept],
        "From noise to data: the reverse trajectory",
        "time t",
    )
    plotting.save_animation(directory / "reverse.gif", frames[:: max(1, len(frames) // 50)])
    metrics = runs.read_metrics(directory / runs.METRICS)
    plotting.save_curve(
        directory / "loss.png",
        [line["step"] for line in metrics],
        [line["loss"] for line in metrics],
        title="Training loss",
        ylabel=f"squared error of {config.loss_on or config.prediction}",
    )
    return rate


def _by_class(images: data.Images, num_classes: int) -> np.ndarray:
    """The first images of each class, uint8 (K, PER_CLASS, H, W, C), cycling where too few."""
    labels = _labels(images)
    chosen = [np.resize(np.flatnonzero(labels == k), PER_CLASS) for k in range(num_classes)]
    return brightness(images.levels[np.stack(chosen)], images.num_levels)


def _draw_noising(
    model: Model, key: Key, test: data.Images, num_classes: int, directory: Path
) -> None:
    """Draw q(x_t | x_0) of one image a class, the same noise at every time."""
    labels = _labels(test)
    firsts = [int(np.flatnonzero(labels == k)[0]) for k in range(min(num_classes, 10))]
    x0 = data.centers(
        jnp.asarray(test.levels[np.array(firsts)]), test.num_levels, dtype=jnp.float32
    )
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
    model: Model,
    results: dict[str, float],
    directory: Path,
    train: data.Images,
    test: data.Images,
) -> str:
    record = runs.read_record(directory) or {}
    versions = ", ".join(f"{name} {v}" for name, v in record.get("versions", {}).items())
    count = min(config.eval_examples, len(test), len(train))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init_params)))
    rate = results["steps_per_second"]
    exact = results.get("held_out_bits_per_dim_exact")
    exact_row = "" if exact is None else f"| the same, exact divergence | {exact:.3f} |\n"
    gain = results["mixture_bits_per_dim"] - results["held_out_bits_per_dim"]
    return f"""\
# {test.name}: {config.network}, {config.process} process, {config.num_steps} steps

![samples](samples.png)

## Likelihood

| bits per dimension | |
|---|---|
| held out, image and class (probability-flow ODE, one Hutchinson probe) \
| {results["held_out_bits_per_dim"]:.3f} ± {results["held_out_bits_per_dim_stderr"]:.3f} |
{exact_row}| training images, likewise | {results["train_bits_per_dim"]:.3f} |
| best Gaussian mixture by EM ({results["mixture_components"]:.0f} components, full covariance) \
| {results["mixture_bits_per_dim"]:.3f} |

The model is {gain:.3f} bits per dimension below the mixture. Both are densities of the same \
{count} uniformly dequantised held-out images; ± is the standard error over images. The mixture \
knows no class, so the model pays for it: log2(K)/D = {_class_bits(test):.3f} bits per dimension \
are in its numbers, which bound those of the image alone from above. The ODE runs from log-SNR \
{config.log_snr_high:g}, at tolerance {config.eval_tolerance:g}; nothing is subtracted.

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


def _class_bits(images: data.Images) -> float:
    return math.log2(images.num_classes or 1) / math.prod(images.shape)
