"""The figures of a run's report."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import evaluations
from experiments.latents import denoiser, drawing, obedience
from experiments.latents.drawing import Trained
from experiments.latents.obedience import Cell
from jaxdiff import files, forward, plotting
from jaxdiff.typing import Array, Key

NUM_PROMPTS, PER_PROMPT, NUM_PAIRS = 8, 8, 4
STEPS_BETWEEN, TIMES = 9, 9


def reconstructions(path: files.Path, real: np.ndarray, decoded: np.ndarray) -> None:
    """Draw pictures above what is decoded of their latents.

    Args:
        path: a PNG.
        real: uint8 (N, H, W, C).
        decoded: likewise.
    """
    plotting.save_sheet(path, np.concatenate([real, decoded]), num_columns=len(real))


def write(
    directory: files.Path,
    trained: Trained,
    drawings: tuple[drawing.Drawing, drawing.Drawing],
    best: float,
    scales: Sequence[float],
    asked: Sequence[Cell],
    key: Key,
    results: Mapping[str, Any],
) -> None:
    """Draw all figures.

    Args:
        directory: of the run.
        trained: the run.
        drawings: what draws pictures of prompts, and between two.
        best: the scale of guidance that was found best.
        scales: of the sweep.
        asked: the prompts that were judged, if there are any.
        key: of all noise.
        results: of the evaluation.
    """
    prompts, real = obedience.some_prompts(trained.autoencoder_config, asked, NUM_PROMPTS)
    key_rows, key_between, key_noise = jax.random.split(key, 3)
    made, mixing = drawings
    told = denoiser.told(trained.text, prompts)
    many = jax.tree.map(lambda leaf: np.repeat(leaf, PER_PROMPT, axis=0), told)
    drawn = made.draw(many, key_rows, best).reshape(len(prompts), PER_PROMPT, *real.shape[1:])
    plotting.save_by_class(
        directory / "samples.png",
        real[:, None],
        drawn,
        prompts,
        f"A scene of each prompt, and pictures at guidance {best:g}",
        ylabel="prompt",
    )
    sweep = [made.draw(told, key_rows, scale) for scale in scales]
    plotting.save_strip(
        directory / "guidance.png",
        np.stack(sweep),
        [f"{scale:g}" for scale in scales],
        "The same noise and prompts",
        "guidance scale",
    )
    path = made.path(told, key_rows, best)
    kept = np.unique(np.linspace(0, len(path) - 1, TIMES).round().astype(int))
    plotting.save_strip(
        directory / "reverse.png",
        path[kept],
        [str(i) for i in kept],
        "From noise to pictures, decoded",
        "step",
    )
    _between(directory / "between.png", trained, mixing, prompts, key_between, best)
    _noising(directory / "noising.png", trained, real, key_noise)
    _curves(directory / "obeyed.png", results)
    evaluations.draw_loss(
        directory,
        denoiser.STAGE.at(directory),
        title="Training loss of the denoiser",
        ylabel=f"squared error of {trained.config.prediction}",
    )


def _between(
    path: files.Path,
    trained: Trained,
    mixing: drawing.Drawing,
    prompts: Sequence[str],
    key: Key,
    scale: float,
) -> None:
    """Draw pictures between pairs of prompts, the same noise along a row."""
    shares = np.linspace(0.0, 1.0, STEPS_BETWEEN)
    told = [denoiser.told(trained.text, [prompt]) for prompt in prompts]
    pairs = list(zip(told[::2], told[1::2], strict=False))[:NUM_PAIRS]
    columns = []
    for share in shares:  # picture i of every call has the same noise
        each = [drawing.between(one, other, np.array([share])) for one, other in pairs]
        rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *each)
        columns.append(mixing.draw(rows, key, scale))
    plotting.save_strip(
        path,
        np.stack(columns),
        [f"{share:.2g}" for share in shares],
        "Between a prompt and the next",
        "share of the second of two prompts above",
    )


def _noising(path: files.Path, trained: Trained, real: np.ndarray, key: Key) -> None:
    """Draw the forward process of pictures: of their latents, decoded."""
    process, store = trained.recipe.process, trained.store
    times = np.linspace(0.0, float(process.t_max), TIMES, dtype=np.float32)
    if trained.config.space == "pixels":
        x0: Any = real.astype(np.float32) / 127.5 - 1.0
    else:
        encode = jax.jit(trained.autoencoder.encode)
        mean, _ = encode(trained.decoder, real.astype(np.float32) / 127.5 - 1.0)
        x0 = store.scale * (np.asarray(mean) - store.shift)
    levels = drawing.make_levels(trained)

    @jax.jit
    def noised(t: Array) -> Array:
        x_t, _ = forward.perturb(key, process, jnp.asarray(x0), t)
        return x_t / jnp.hypot(process.alpha(t), process.sigma(t))

    frames = np.stack([levels(np.asarray(noised(t))) for t in times])
    plotting.save_strip(
        path,
        frames,
        [f"{t:.2g}" for t in times],
        "From pictures to noise: latents on their way, decoded"
        if trained.config.space == "latents"
        else "From pictures to noise",
        "time t",
    )


def _curves(path: files.Path, results: Mapping[str, Any]) -> None:
    """Draw the shares of prompts obeyed against guidance, where they were judged."""
    if "obeyed" not in results:
        return
    figure, axis = plotting.new_figure(6.4, 3.8)
    for i, (name, by_scale) in enumerate(results["obeyed"].items()):
        scales = [float(scale) for scale in by_scale]
        shares = [found["all"] for found in by_scale.values()]
        errors = [found["all_stderr"] for found in by_scale.values()]
        axis.errorbar(
            scales, shares, yerr=errors, marker="o", label=name.replace("_", " "), color=f"C{i}"
        )
        ceiling = results["ceiling"][name]["all"]
        axis.axhline(ceiling, color=f"C{i}", linestyle=":", linewidth=1)
    axis.set_xlabel("guidance scale")
    axis.set_ylabel("prompts obeyed in all")
    axis.set_ylim(0.0, 1.03)
    axis.set_xticks(sorted({float(s) for by in results["obeyed"].values() for s in by}))
    axis.set_title("Pictures that show what was asked; dotted: real ones")
    axis.grid(color="#e4e7eb", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    plotting.save(figure, path)
