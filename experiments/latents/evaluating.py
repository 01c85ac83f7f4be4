"""What a trained run is worth: evaluation.json, and all that its report shows."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from experiments.common import evaluations, flows
from experiments.common.devices import Devices
from experiments.common.evaluations import MAIN
from experiments.common.methods import MethodName
from experiments.common.options import Count, Natural, Tolerance, Within
from experiments.latents import autoencoder as autoencoders
from experiments.latents import (
    bounds,
    coding,
    denoiser,
    drawing,
    figures,
    obedience,
    report,
    sources,
)
from experiments.latents.autoencoder import Autoencoder
from experiments.latents.drawing import Trained
from experiments.latents.obedience import Cell
from jaxdiff import data, files, metrics
from jaxdiff.typing import PyTree

BLOCK = 4
"""Side of the blocks of pixels whose means the Frechet distance is of."""
_DEFAULT_SCALE = 2.0
_FITTED_ON = 128


@dataclasses.dataclass(frozen=True)
class Judging:
    """How a run is judged."""

    num_prompts: Annotated[int, Within(2)] = 512
    """Prompts of each kind, seen and held out; as many captions of a folder's pictures."""
    guidance_scales: Annotated[tuple[float, ...], Within(0.0)] = (1.0, 2.0, 3.0)
    """Scales of guidance at which pictures are judged."""
    sampler: MethodName = "euler"
    """The method of all pictures."""
    sample_steps: Count = 25
    """Its steps."""
    likelihood_examples: Natural = 64
    """Pictures held out whose bits are bounded, two at least; 0 leaves it out."""
    likelihood_tolerance: Tolerance = 1e-2
    """Relative and absolute tolerance of the likelihood's ODE."""
    judge_steps: Count = 1000
    """Updates of the judge that is trained on real scenes."""
    beside: str | None = None
    """Folder of another judged run of the same pictures, whose figures stand beside."""


PRESETS = {
    "full": Judging(),
    "relations": Judging(num_prompts=256),
    "smoke": Judging(
        num_prompts=32,
        guidance_scales=(1.0, 2.0),
        sample_steps=10,
        likelihood_examples=4,
        likelihood_tolerance=1e-1,
        judge_steps=100,
    ),
}


def reconstruct(
    config: autoencoders.Config,
    built: Autoencoder,
    params: PyTree,
    held_out: data.Captioned,
    directory: files.Path,
    devices: list[jax.Device],
) -> None:
    """Judge an autoencoder by pictures held out: evaluation.json and a figure in its folder."""
    numbers = np.arange(min(config.eval_examples, len(held_out)))
    levels = held_out.rows(numbers)["image"]
    found, decoded = coding.quality(built, params, levels, devices)
    found["frechet"] = frechet(levels, decoded)
    figures.reconstructions(directory / "reconstructions.png", levels[:8], decoded[:8])
    evaluations.write_numbers(directory, {"step": config.num_steps, **found})
    print(f"Autoencoder: PSNR {found['psnr']:.1f} dB, SSIM {found['ssim']:.4f}, {directory}")


def best_scale(directory: files.Path) -> float:
    """Return the scale of guidance that the evaluation of a run found best, 2 where none did."""
    return float(evaluations.numbers(directory).get("best_guidance_scale", _DEFAULT_SCALE))


def write(
    trained: Trained,
    directory: files.Path,
    judging: Judging,
    devices: Devices,
    *,
    average: str = MAIN,
    progress: bool = False,
) -> None:
    """Judge and draw a run: evaluation.json, the figures and, last, report.md.

    Args:
        trained: the run.
        directory: its folder.
        judging: how.
        devices: which share the work.
        average: which average its parameters are.
        progress: say on stderr what takes its time.
    """
    beside = report.read_beside(judging)
    config, local = trained.autoencoder_config, devices.local()
    scales = [s for s in judging.guidance_scales if s == 1.0 or trained.config.drop_cond > 0.0]
    say = _sayer(progress)
    asked = obedience.cells(config, judging.num_prompts) if obedience.is_of_scenes(config) else []
    results: dict[str, Any] = {**_reconstruction(trained)}
    key_draw, key_bits, key_figures = jax.random.split(
        jax.random.fold_in(jax.random.key(trained.config.seed), 1), 3
    )
    steps: dict[str, Any] = {"sampler": judging.sampler, "num_steps": judging.sample_steps}
    made = drawing.make_drawing(trained, **steps, devices=local)

    def draw(scale: float, captions: Sequence[str]) -> np.ndarray:
        return made.draw(denoiser.told(trained.text, list(captions)), key_draw, scale)

    evaluations.begin(directory)
    if asked:
        say("Judge")
        judges = obedience.train_judge(trained.home, config, judging.judge_steps)
        found = obedience.measure(
            judges,
            asked,
            scales,
            lambda scale, cell: draw(scale, cell.captions),
            lambda pictures: _recoded(trained, pictures, local),
            say,
        )
        results |= found.numbers
        best, drawn = found.best_scale, [p for n, p in found.pictures.items() if n.endswith("seen")]
        real = [cell.pictures() for cell in asked if cell.is_seen]
        results |= distances(np.concatenate(real), np.concatenate(drawn))
    else:
        best = _best_by_distance(trained, judging, scales, draw, results, say)
    if judging.likelihood_examples:
        say("Bits")
        results |= _bits(trained, judging, key_bits, asked, local)
    say("Figures")
    mixing = drawing.make_drawing(
        trained, **steps, mixes=True, at_once=figures.NUM_PAIRS, devices=local
    )
    figures.write(directory, trained, (made, mixing), best, scales, asked, key_figures, results)
    of = {"step": trained.step, "average": average, **_settings(judging)}
    text = report.write(trained, directory, judging, results, best, beside)
    evaluations.write(directory, of, results, text)


def _settings(judging: Judging) -> dict[str, Any]:
    found = dataclasses.asdict(judging)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}


def _sayer(progress: bool) -> Callable[[str], None]:
    def say(what: str) -> None:
        if progress:
            print(f"{what} ...", file=sys.stderr, flush=True)

    return say


def _reconstruction(trained: Trained) -> dict[str, float]:
    """Return the figures of the autoencoder, as they were found when it was trained."""
    if trained.config.space == "pixels":
        return {}
    found = evaluations.numbers(autoencoders.STAGE.at(trained.home))
    names = {"psnr": "psnr", "psnr_stderr": "psnr_stderr", "ssim": "ssim"}
    names["frechet"] = "frechet_of_reconstructions"
    return {name: found[key] for key, name in names.items() if key in found}


def _recoded(trained: Trained, pictures: np.ndarray, devices: list[jax.Device]) -> np.ndarray:
    encode, decode = coding.make_coders(trained.autoencoder, devices)
    return decode(trained.decoder, encode(trained.decoder, pictures)[0])


def _best_by_distance(
    trained: Trained,
    judging: Judging,
    scales: Sequence[float],
    draw: Callable[..., np.ndarray],
    results: dict[str, Any],
    say: Callable[[str], None],
) -> float:
    """Return the scale at which pictures of held-out captions are nearest to the real ones."""
    held_out = sources.open_pictures(trained.autoencoder_config, "test", recorded=True)
    numbers = np.arange(min(judging.num_prompts, len(held_out)))
    captions, real = held_out.captions(numbers), held_out.rows(numbers)["image"]
    found = {}
    for scale in scales:
        say(f"Pictures at guidance {scale:g}")
        found[scale] = distances(real, draw(scale, captions))
    best = min(scales, key=lambda scale: found[scale]["frechet"])
    results |= found[best] | {"best_guidance_scale": best}
    results["frechet_by_guidance"] = {f"{s:g}": found[s]["frechet"] for s in scales}
    return best


def distances(real: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """Return how far drawn pictures are from as many real ones, and halves of the real ones.

    Args:
        real: uint8 (N, H, W, C).
        drawn: likewise.
    """
    half = len(real) // 2
    found = {"frechet": frechet(real, drawn), "frechet_examples": len(real)}
    if half >= 2:
        found["frechet_of_halves"] = frechet(real[:half], real[half : 2 * half])
    return found


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Return the Frechet distance of pictures, of the means of 4 x 4 pixels in [-1, 1]."""

    def features(levels: np.ndarray) -> np.ndarray:
        num, height, width, channels = levels.shape
        rows, columns = height // BLOCK, width // BLOCK
        kept = levels[:, : rows * BLOCK, : columns * BLOCK].astype(np.float64)
        blocks = kept.reshape(num, rows, BLOCK, columns, BLOCK, channels).mean((2, 4))
        return blocks.reshape(num, -1) / 127.5 - 1.0

    return metrics.frechet(features(x), features(y)) if min(len(x), len(y)) > 1 else float("nan")


def _bits(
    trained: Trained,
    judging: Judging,
    key: Any,
    asked: Sequence[Cell],
    devices: list[jax.Device],
) -> dict[str, float]:
    """Return bounds of the bits of pictures held out, given their captions."""
    config = trained.autoencoder_config
    held_out = sources.open_pictures(config, "test", recorded=True)
    numbers = np.arange(min(judging.likelihood_examples, len(held_out)))
    levels, captions = held_out.rows(numbers)["image"], held_out.captions(numbers)
    train = sources.open_pictures(config, "train", recorded=True)
    fitted_on = train.rows(np.arange(min(_FITTED_ON, len(train))))["image"]
    try:
        return bounds.bits_of(
            trained,
            key,
            levels,
            denoiser.told(trained.text, captions),
            fitted_on,
            judging.likelihood_tolerance,
            devices,
        )
    except flows.Unsolved as error:
        print(f"warning: no bits: {error}", file=sys.stderr)
        return {}
