"""What a model of a distribution in the plane is worth: its evaluation, figures and report."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import evaluations, flows
from experiments.common.evaluations import MAIN
from experiments.common.methods import METHODS
from experiments.common.tables import markdown
from experiments.toy2d.model import Config, Model
from jaxdiff import (
    denoisers,
    files,
    likelihood,
    metrics,
    plotting,
    predictions,
    sample,
    timesteps,
    variational,
)
from jaxdiff.training import run as runs
from jaxdiff.typing import Array, Key, Network, PyTree

LogProb = Callable[[PyTree, np.ndarray, float, float], np.ndarray]
CHUNK = 2000
"""Points whose likelihood is solved for at once."""
HALF_WIDTH = 1.6
"""Of the pictures."""


def write(
    config: Config, model: Model, params: PyTree, directory: files.Path, *, progress: bool = False
) -> None:
    """Judge and draw the model of a finished run: evaluation.json, the figures, report.md last."""

    def say(text: str) -> None:
        if progress:
            print(f"{text} ...", file=sys.stderr, flush=True)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 2), 4)
    draw_target = jax.jit(model.target.sample, static_argnums=1)
    held_out, others = (np.asarray(draw_target(key, config.eval_points)) for key in keys[:2])
    samples = draw_samples(config, model, params, keys[2], config.eval_points)
    log_prob_of = make_log_prob(config, model)
    say(f"The likelihood of {config.eval_points} points")
    found, notes = judge(config, model, params, keys[3], held_out, log_prob_of)
    results = dict(found)
    say("A classifier of samples and draws")
    if np.isfinite(samples).all():
        told = metrics.c2st(others, samples)
        results |= {"c2st": told.accuracy, "c2st_stderr": told.stderr}
    else:
        notes.append("Some samples are not finite: no classifier can tell them from draws.")
    points = mesh(config.grid_size)
    try:
        log_prob = log_prob_of(params, points, config.log_snr_high, 10 * config.eval_tolerance)
    except flows.Unsolved as reason:
        notes.append(f"The density of the model is not drawn: {reason}.")
        log_prob = np.full(len(points), -np.inf, np.float32)
    say("Figures")
    evaluations.begin(directory)
    draw_density(config, held_out, np.exp(log_prob), samples, directory)
    draw_field(config, model, params, directory)
    title = f"Training loss: {config.loss}"
    evaluations.draw_loss(directory, directory, title=title, ylabel="loss")
    kept = evaluations.finite(results)
    if len(kept) < len(results):
        lost = ", ".join(sorted(results.keys() - kept.keys()))
        notes.append(f"Not finite, and left out: {lost}.")
    of = {"step": config.num_steps, "average": MAIN, **settings(config)}
    evaluations.write(directory, of, kept, report(config, kept, notes, directory))


def settings(config: Config) -> dict[str, Any]:
    """Return how a run is judged, as judged.json says it."""
    names = ("eval_points", "eval_tolerance", "sampler", "sample_steps", "grid_size")
    return {name: getattr(config, name) for name in names}


def make_log_prob(config: Config, model: Model) -> LogProb:
    """Return ``(params, x (N, 2), log_snr_high, tolerance) -> (N,)``, compiled once, in nats."""
    size = min(CHUNK, config.eval_points)
    process = flows.until_start(model.process, config.prediction)

    @jax.jit
    def of_chunk(params: PyTree, x: Array, high: Array, tolerance: Array) -> Array:
        return likelihood.log_prob(
            process,
            model.denoiser(params),
            x,
            rtol=tolerance,
            atol=tolerance,
            t_min=flows.data_end(process, high),
        )[0]

    def log_prob(params: PyTree, x: np.ndarray, high: float, tolerance: float) -> np.ndarray:
        padded = np.concatenate([x, np.repeat(x[-1:], -len(x) % size, axis=0)])
        numbers = jnp.asarray(high, x.dtype), jnp.asarray(tolerance, x.dtype)
        with flows.solving():
            parts = [
                np.asarray(of_chunk(params, padded[i : i + size], *numbers))
                for i in range(0, len(padded), size)
            ]
        return np.concatenate(parts)[: len(x)]

    return log_prob


def judge(
    config: Config,
    model: Model,
    params: PyTree,
    key: Key,
    held_out: np.ndarray,
    log_prob_of: LogProb,
) -> tuple[dict[str, float], list[str]]:
    """Return the likelihoods of held-out points by name, in nats, and what is not known of them."""
    high, tolerance = config.log_snr_high, config.eval_tolerance
    few, notes, results = held_out[:CHUNK], [], {}
    start = time.perf_counter()
    try:
        log_prob = log_prob_of(params, held_out, high, tolerance)
        results = {
            "nll": float(-log_prob.mean()),
            "nll_stderr": stderr(log_prob),
            "nll_seconds": time.perf_counter() - start,
        }
        closer = log_prob_of(params, few, high + 1.0, tolerance) - log_prob[: len(few)]
        results["t_min_effect"] = float(-closer.mean())
    except flows.Unsolved as reason:
        notes.append(
            f"The likelihood{' closer to the data' * bool(results)} is not known: {reason}."
        )
    ended = flows.until_start(model.process, config.prediction)
    results["prior_mismatch"] = float(variational.prior_divergence(ended, jnp.asarray(few)).mean())
    if model.target.log_prob is not None:
        exact = np.asarray(jax.jit(model.target.log_prob)(held_out))
        results["entropy"] = float(-exact.mean())
        if "nll" in results:
            results["nll_gap"] = float((exact - log_prob).mean())
            results["nll_gap_stderr"] = stderr(exact - log_prob)
    if config.loss != "flow_matching_ot":  # of whose coupling no reverse chain is known
        bound = negative_elbo(config, model, params, key, few)
        results |= {"negative_elbo": float(bound.mean()), "negative_elbo_stderr": stderr(bound)}
    return results, notes


def negative_elbo(
    config: Config, model: Model, params: PyTree, key: Key, x: np.ndarray, num_steps: int = 200
) -> np.ndarray:
    """Return the negative bound of the reverse chain in so many steps, in nats (N,)."""
    process = model.process
    t_end = flows.data_end(process, jnp.asarray(config.log_snr_high))
    ts = timesteps.log_snr(process, num_steps, t_end, timesteps.start(process, True))

    @jax.jit
    def bound(params: PyTree, x: Array) -> Array:
        return -likelihood.elbo(key, process, model.denoiser(params), x, ts).log_weight

    return np.asarray(bound(params, x))


def draw_samples(config: Config, model: Model, params: PyTree, key: Key, num: int) -> np.ndarray:
    """Return samples of the model (N, 2)."""
    method = METHODS[config.sampler]
    start = method.start(model.process, config.prediction in predictions.SIGNAL_NEEDED)
    ts = timesteps.uniform(model.process, config.sample_steps, t_start=start)

    @jax.jit
    def draw(params: PyTree, key: Key) -> Array:
        key_start, key_path = jax.random.split(key)
        x_T = model.process.prior_sample(key_start, (num, 2), t=start)  # noqa: N806
        return sample(key_path, method.make(model.process, model.denoiser(params)), x_T, ts)

    return np.asarray(draw(params, key))


def stderr(values: np.ndarray) -> float:
    """Return the standard error of a mean."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


# --- Figures --------------------------------------------------------------------------------


def mesh(size: int) -> np.ndarray:
    """Return the points of a square grid, (size * size, 2)."""
    places = np.linspace(-HALF_WIDTH, HALF_WIDTH, size, dtype=np.float32)
    return np.stack(np.meshgrid(places, places), axis=-1).reshape(-1, 2)


def draw_density(
    config: Config,
    held_out: np.ndarray,
    density: np.ndarray,
    samples: np.ndarray,
    directory: files.Path,
) -> None:
    """Draw draws of the target, the model's density on the mesh and its samples, side by side."""
    density = density.reshape(config.grid_size, config.grid_size)
    figure, axes = plotting.new_figure(11.0, 3.6, ncols=3)
    box = (-HALF_WIDTH, HALF_WIDTH)
    for axis, shown, title in (
        (axes[0], held_out, f"{config.target}: draws"),
        (axes[2], samples, f"samples ({config.sampler}, {config.sample_steps} steps)"),
    ):
        inside = bool((np.abs(shown).max(axis=1) <= HALF_WIDTH).any())  # else there is none
        axis.hist2d(*shown.T, bins=config.grid_size, range=[box, box], density=inside, cmap="magma")
        axis.set_title(title, fontsize=11)
    picture = axes[1].imshow(density, origin="lower", extent=(*box, *box), cmap="magma")
    axes[1].set_title("density of the model, by its likelihood", fontsize=11)
    figure.colorbar(picture, ax=axes, shrink=0.75, label="density of the model")
    _square(axes, "x")
    plotting.save(figure, directory / "density.png")


def draw_field(config: Config, model: Model, params: PyTree, directory: files.Path) -> None:
    """Draw the learned score at three noise levels, beside the exact one where it is known."""
    process, exact = model.process, model.target.mixture
    fields = {"learned": denoisers.to_score(process, model.denoiser(params))}
    if exact is not None:
        fields["exact"] = denoisers.to_score(process, exact.denoiser(process))
    levels = (4.0, 1.0, -2.0)
    points = mesh(17)
    figure, axes = plotting.new_figure(11.0, 3.9 * len(fields), ncols=3, nrows=len(fields))
    for row, (name, score) in zip(np.atleast_2d(axes), fields.items(), strict=True):

        @jax.jit
        def pull(level: Array, score: Network = score) -> Array:
            t = process.time_of_log_snr(level)
            return process.sigma(t) * score(process.alpha(t) * points, t)

        for axis, level in zip(row, levels, strict=True):
            arrows = np.asarray(pull(jnp.asarray(level, jnp.float32)))
            size = np.linalg.norm(arrows, axis=1)
            shown = axis.quiver(*points.T, *arrows.T, size, cmap="viridis", clim=(0.0, 4.0))
            axis.set_title(f"{name}: score at log-SNR {level:g}", fontsize=11)
    figure.colorbar(shown, ax=axes, shrink=0.7, label="sigma times the score's length")
    _square(axes, "x / alpha")
    plotting.save(figure, directory / "field.png")


def _square(axes: Any, name: str) -> None:
    for axis in np.ravel(axes):
        axis.set_aspect("equal")
        axis.set_xlabel(f"{name}, first coordinate", fontsize=9)
        axis.set_ylabel(f"{name}, second", fontsize=9)
        axis.tick_params(labelsize=8)


# --- Report ---------------------------------------------------------------------------------


def report(
    config: Config, results: dict[str, Any], notes: Sequence[str], directory: files.Path
) -> str:
    """Return the report of a run."""
    record = runs.read_record(directory) or {}

    def of(name: str) -> str:
        error = results.get(f"{name}_stderr")
        return f"{results[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")

    table = {
        "nll": "negative log-likelihood",
        "entropy": "entropy, on the same points",
        "nll_gap": "gap, point by point",
        "negative_elbo": "negative ELBO, 200 steps",
    }
    rows = [[what, of(name)] for name, what in table.items() if name in results]
    for name, what in (
        ("prior_mismatch", "divergence of q(x_T) from the prior"),
        ("t_min_effect", "change with t_min one log-SNR closer"),
    ):
        rows += [[what, f"{results[name]:.5f}"]] if name in results else []
    nats = "\n".join(markdown(["nats", ""], rows))
    said = "".join(f"- {note}\n" for note in notes)
    told = ""
    if "c2st" in results:
        told = f"""
A classifier tells samples from draws with accuracy {results["c2st"]:.3f} ± \
{results["c2st_stderr"]:.3f}; 0.5 is perfect.
"""
    return f"""\
# {config.target}: {config.loss}, {config.process}, {config.num_steps} steps

![target, density, samples](density.png)

Judged: the parameters of step {config.num_steps}, average `{MAIN}` (decay \
{config.ema_decay:g}).

{said}
{nats}

The likelihood is that of the probability flow (exact divergence, tolerance \
{config.eval_tolerance:g}, down to log-SNR {config.log_snr_high:g}) of {config.eval_points} fresh \
points; ± is a standard error. The ELBO belongs to another model, that of the reverse chain, of \
which it is a bound: the two need not be in order. Neither the prior's mismatch nor t_min is \
corrected for.
{told}
![score](field.png)

![loss](loss.png)

Config hash `{record.get("hash")}`, seed {config.seed}. {record.get("device")}. \
All of it: [config.json](config.json), [evaluation.json](evaluation.json).
"""
