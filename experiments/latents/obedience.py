"""Do pictures show what their prompts say? Read by two judges, by factor, against guidance."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common.devices import Running
from experiments.latents import sources
from experiments.latents.autoencoder import Config
from experiments.latents.judges import Reading, detector, obeyed, shares, templates
from jaxdiff import data, files, training
from jaxdiff.data.scenes import Combinations, Factors, Scenes
from jaxdiff.typing import PyTree

FOLDER = "judge"
"""Of the judge that is trained, below the run's."""
KINDS = ("", "two_objects_", "several_objects_")
"""How a cell's name begins, by the kind of its scenes."""
Read = Callable[[np.ndarray], Reading]


class Cell(NamedTuple):
    """Prompts of one kind, and the scenes that they describe.

    Attributes:
        name: "seen", "held_out", "two_objects_held_out_order", ...
        kind: in `scenes.KINDS`.
        captions: of N scenes.
        factors: what is in them.
        scenes: which make the pictures that would obey.
    """

    name: str
    kind: int
    captions: list[str]
    factors: Factors
    scenes: Scenes

    @property
    def is_seen(self) -> bool:
        """Whether training saw such combinations."""
        return self.name.endswith("seen")

    def pictures(self) -> np.ndarray:
        """Return the scenes, uint8 (N, S, S, 3)."""
        found: np.ndarray = self.scenes.rows(np.arange(len(self.scenes)))["image"]
        return found


def cells(config: Config, num: int) -> list[Cell]:
    """Return prompts of each kind that a run's scenes have, seen and held out, `num` of each.

    Args:
        config: says which scenes the run is of.
        num: of prompts a cell.
    """
    made = []
    for kind, share in enumerate(config.scene_shares):
        if share == 0.0:
            continue
        names: list[Combinations] = ["seen", "held_out"]
        names += ["held_out_order"] if kind == 1 else []
        alone = tuple(float(i == kind) for i in range(3))
        for combinations in names:
            scenes = sources.scenes_of(
                config,
                "test",
                num=num,
                shares=(alone[0], alone[1], alone[2]),
                combinations=combinations,
            )
            numbers = np.arange(num)
            name = KINDS[kind] + combinations
            made.append(Cell(name, kind, scenes.captions(numbers), scenes.factors(numbers), scenes))
    return made


class Judges(NamedTuple):
    """Who reads pictures.

    Attributes:
        learned: the trained one.
        templates: the one that learns nothing, of pictures of one object.
    """

    learned: Read
    templates: Read


def train_judge(
    directory: files.Path, config: Config, num_steps: int, running: Running | None = None
) -> Judges:
    """Train the judge of a run, or what is left of it, and return both.

    Args:
        directory: of the run.
        config: says which scenes.
        num_steps: how long.
        running: how; by default on one device.
    """
    size = config.image_size or sources.SCENE_SIZE
    asked = detector.Config(seed=config.seed, size=size, num_steps=num_steps)
    state = training.fit(
        directory / FOLDER,
        lambda: detector.make_update(asked).init(detector.init_params(asked)),
        detector.make_update(asked),
        lambda step: detector.batches_from(asked, step),
        key=jax.random.key(asked.seed),
        num_steps=num_steps,
        cadence=training.Cadence(log=50, save=500),
        mode=None if running is None else running.mode(asked.batch_size),
        record=json.loads(json.dumps(dataclasses.asdict(asked))),
    )
    params: PyTree = jax.tree.map(np.asarray, state.params)
    return Judges(lambda pictures: detector.read(params, pictures), templates.read)


def judged(read: Read, cell: Cell, pictures: np.ndarray) -> dict[str, float]:
    """Return the shares of pictures that obey the prompts of a cell, by factor."""
    return shares(obeyed(read(pictures), cell.factors))


def shuffled(read: Read, cell: Cell, pictures: np.ndarray) -> dict[str, float]:
    """Return the same of each other's prompts: what chance, or a judge's wishes, would give."""
    moved = Factors(*(np.roll(field, 1, axis=0) for field in cell.factors))
    return shares(obeyed(read(pictures), moved))


class Obedience(NamedTuple):
    """What was found, for evaluation.json.

    Attributes:
        numbers: by name.
        best_scale: the scale of guidance at which most prompts that are seen are obeyed.
        pictures: those at the best scale, by cell.
    """

    numbers: dict[str, Any]
    best_scale: float
    pictures: dict[str, np.ndarray]


def measure(
    judges: Judges,
    asked: Sequence[Cell],
    scales: Sequence[float],
    draw: Callable[[float, Cell], np.ndarray],
    reconstruct: Callable[[np.ndarray], np.ndarray],
    say: Callable[[str], None],
) -> Obedience:
    """Judge pictures of all prompts at each scale of guidance, and real ones.

    Args:
        judges: who read them.
        asked: the prompts.
        scales: of guidance.
        draw: (scale, cell) -> pictures, uint8 (N, H, W, C).
        reconstruct: pictures -> what the autoencoder makes of them.
        say: is told what is under way.
    """
    found: dict[str, Any] = {"obeyed": {}, "obeyed_by_templates": {}, "obeyed_shuffled": {}}
    drawn: dict[tuple[str, float], np.ndarray] = {}
    for cell in asked:
        for name in found if cell.kind == 0 else ("obeyed", "obeyed_shuffled"):
            found[name][cell.name] = {}
        for scale in scales:
            say(f"Pictures of {cell.name} prompts at guidance {scale:g}")
            pictures = drawn[cell.name, scale] = draw(scale, cell)
            at = f"{scale:g}"
            found["obeyed"][cell.name][at] = judged(judges.learned, cell, pictures)
            found["obeyed_shuffled"][cell.name][at] = shuffled(judges.learned, cell, pictures)
            if cell.kind == 0:
                by_templates = judged(judges.templates, cell, pictures)
                found["obeyed_by_templates"][cell.name][at] = by_templates
    seen = [cell.name for cell in asked if cell.is_seen]
    best = max(scales, key=lambda s: sum(found["obeyed"][name][f"{s:g}"]["all"] for name in seen))
    say("Real pictures")
    ceilings: dict[str, Any] = {"ceiling": {}, "ceiling_of_reconstructions": {}}
    ceilings["ceiling_by_templates"] = {}
    for cell in asked:
        real = cell.pictures()
        ceilings["ceiling"][cell.name] = judged(judges.learned, cell, real)
        ceilings["ceiling_of_reconstructions"][cell.name] = judged(
            judges.learned, cell, reconstruct(real)
        )
        if cell.kind == 0:
            ceilings["ceiling_by_templates"][cell.name] = judged(judges.templates, cell, real)
    pictures_at_best = {cell.name: drawn[cell.name, best] for cell in asked}
    return Obedience({**found, **ceilings, "best_guidance_scale": best}, best, pictures_at_best)


def is_of_scenes(config: Config) -> bool:
    """Tell whether the pictures of a run are scenes, which can be judged so."""
    return config.data == sources.SCENES


def some_prompts(config: Config, asked: Sequence[Cell], num: int) -> tuple[list[str], np.ndarray]:
    """Return some prompts, and what they are of, for figures: of all cells in turn, or held out."""
    if asked:
        num = min(num, sum(len(cell.captions) for cell in asked))
        chosen = [(asked[i % len(asked)], i // len(asked)) for i in range(num)]
        pictures = [cell.scenes.rows(np.array([i]))["image"][0] for cell, i in chosen]
        return [cell.captions[i] for cell, i in chosen], np.stack(pictures)
    held_out: data.Captioned = sources.open_pictures(config, "test", recorded=True)
    numbers = np.arange(min(num, len(held_out)))
    return held_out.captions(numbers), held_out.rows(numbers)["image"]
