"""The ablations that are ready to run, each with a full and a smoke preset."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from experiments.ablations import plane
from experiments.ablations.definition import Ablation, near
from experiments.ablations.learned import LEARNED
from experiments.command import Refusal

Presets = Mapping[str, Ablation]
"""By name: full, and smoke, which runs every part in seconds."""

_PLANE_SMOKE: dict[str, Any] = {
    "width": 8,
    "depth": 1,
    "batch_size": 32,
    "num_steps": 10,
    "warmup_steps": 2,
    "eval_points": 64,
    "eval_tolerance": 1e-2,
}


def _losses() -> Presets:
    base = plane.Config(
        width=64, depth=3, batch_size=256, num_steps=2000, ema_decay=0.998, eval_points=2000
    )
    full = Ablation(
        question="Which loss finds the score of a mixture, at what cost?",
        world=plane.WORLD,
        base=base,
        axes={"num_steps": (500, 2000), "loss": ("denoising", "explicit", "implicit", "sliced")},
        measures=("score_error", "nll_gap"),
        seeds=4,
        learned=LEARNED["losses"],
    )
    smoke = dataclasses.replace(
        full,
        base=dataclasses.replace(base, **_PLANE_SMOKE),
        axes={"loss": ("denoising", "explicit", "implicit", "sliced")},
        measures=("score_error",),
        seeds=2,
        learned="",
    )
    return {"full": full, "smoke": smoke}


def _coupling() -> Presets:
    base = plane.Config(
        loss="flow_matching",
        process="flow",
        prediction="velocity",
        loss_on="velocity",
        width=64,
        depth=3,
        batch_size=256,
        num_steps=2000,
        ema_decay=0.998,
        eval_points=4000,
        sampler="euler",
        sample_steps=4,
    )
    full = Ablation(
        question="Does coupling batches by optimal transport straighten flow matching?",
        world=plane.WORLD,
        base=base,
        axes={
            "loss": ("flow_matching", "flow_matching_ot"),
            "sampler": ("euler", "heun"),
            "sample_steps": (1, 2, 4, 8, 16, 32),
        },
        measures=("wasserstein", "bend", "nll_gap"),
        seeds=5,
        learned=LEARNED["coupling"],
    )
    smoke = dataclasses.replace(
        full,
        base=dataclasses.replace(base, **_PLANE_SMOKE),
        axes={"loss": ("flow_matching", "flow_matching_ot"), "sample_steps": (2, 4)},
        measures=("wasserstein", "bend"),
        seeds=2,
        learned="",
    )
    return {"full": full, "smoke": smoke}


MAKERS = {
    "losses": _losses,
    "coupling": _coupling,
}
"""What makes the presets, by name of the ablation."""


def find(name: str, preset: str) -> Ablation:
    """Return an ablation of the catalogue, or one of the form `module:attribute`.

    The attribute is an `Ablation`, or a mapping of presets to them.

    Raises:
        Refusal: if there is none of the name, or it cannot be meant.
    """
    if name in MAKERS:
        return MAKERS[name]()[preset]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise Refusal(f"there is no ablation {name}; nearest: {near(name, MAKERS)}.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise Refusal(f"{name} gives no ablation: {error}") from error
    if isinstance(found, Mapping):
        if preset not in found:
            raise Refusal(f"{name} has no preset {preset}; it has {', '.join(found)}.")
        found = found[preset]
    if not isinstance(found, Ablation):
        raise Refusal(f"{name} is no Ablation but {type(found).__name__}.")
    return found
