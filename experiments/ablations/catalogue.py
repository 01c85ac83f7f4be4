"""The ablations that are ready to run, each with a full and a smoke preset."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from experiments.ablations import images, plane, told
from experiments.ablations.definition import Ablation
from experiments.ablations.fields import near
from experiments.ablations.learned import LEARNED
from experiments.common.command import Refusal
from experiments.latents import autoencoder, denoiser

Presets = Mapping[str, Ablation]
"""By name: full, and smoke, which runs every part in seconds."""

FULL = "full"
"""The preset that an ablation without presets is."""

_PLANE_SMOKE: dict[str, Any] = {
    "width": 8,
    "depth": 1,
    "batch_size": 32,
    "num_steps": 10,
    "warmup_steps": 2,
    "eval_points": 64,
    "eval_tolerance": 1e-2,
}


_IMAGES_SMOKE: dict[str, Any] = {
    "width": 16,
    "depth": 1,
    "patch_size": 4,
    "batch_size": 16,
    "num_steps": 6,
    "warmup_steps": 2,
    "eval_examples": 4,
    "eval_tolerance": 0.3,
    "num_samples": 20,
    "sample_steps": 4,
}
_DIGITS = images.Config(
    width=48,
    depth=2,
    batch_size=32,
    num_steps=400,
    warmup_steps=50,
    times="stratified",
    eval_examples=64,
    eval_tolerance=5e-2,
    sampler="ddim",
    sample_steps=50,
)


def _prediction() -> Presets:
    base = dataclasses.replace(_DIGITS, prediction="eps", process="vp", sample_steps=25)
    full = Ablation(
        question="Prediction, weighting and process on digits: what matters after 400 steps?",
        world=images.WORLD,
        base=base,
        axes={
            "prediction": ("eps", "v", "x0"),
            "weighting": ("simple", "min_snr", "edm"),
            "process": ("vp", "cosine", "flow"),
        },
        measures=("bits_per_dim", "frechet"),
        seeds=3,
        learned=LEARNED["prediction"],
    )
    return {"full": full, "smoke": _images_smoke(full, {"prediction": ("eps", "v")}, ("frechet",))}


def _prediction_wide() -> Presets:
    base = dataclasses.replace(
        _DIGITS,
        width=128,
        depth=4,
        batch_size=128,
        num_steps=20_000,
        warmup_steps=500,
        prediction="v",
        process="cosine",
        eval_examples=297,
        eval_tolerance=1e-2,
        num_samples=1500,
    )
    full = Ablation(
        question="All predictions, weightings, processes and scales of guidance: for accelerators.",
        world=images.WORLD,
        base=base,
        axes={
            "prediction": ("eps", "v", "x0", "score", "velocity"),
            "weighting": ("simple", "min_snr", "edm", "likelihood"),
            "process": ("vp", "sub_vp", "cosine", "flow", "edm", "ve"),
            "guidance_scale": (1.0, 1.5, 2.0, 4.0),
        },
        measures=("bits_per_dim", "frechet"),
        seeds=3,
    )
    return {
        "full": full,
        "smoke": _images_smoke(full, {"guidance_scale": (1.0, 2.0)}, ("frechet",)),
    }


def _samplers() -> Presets:
    base = dataclasses.replace(
        _DIGITS,
        width=64,
        depth=3,
        batch_size=64,
        num_steps=2000,
        times="log_snr",
        num_samples=500,
        sample_steps=20,
    )
    full = Ablation(
        question="Which sampler, and how many network calls, on a trained digits model?",
        world=images.WORLD,
        base=base,
        axes={
            "sampler": ("ddim", "ancestral", "heun", "dpm_solver_pp_2", "unipc_2"),
            "sample_steps": (5, 10, 20, 40),
        },
        measures=("frechet", "readable"),
        seeds=3,
        learned=LEARNED["samplers"],
    )
    axes = {"sampler": ("ddim", "heun")}
    return {"full": full, "smoke": _images_smoke(full, axes, ("frechet", "readable"))}


def _ends() -> Presets:
    base = dataclasses.replace(_DIGITS, process="vp", num_samples=500)
    full = Ablation(
        question="Does it matter that alpha(T)^2 goes to 0?",
        world=images.WORLD,
        base=base,
        axes={"beta_max": (1.0, 2.0, 4.0, 8.0, 20.0)},
        measures=("frechet", "prior_nats", "bits_per_dim", "brightness_gap"),
        seeds=4,
        learned=LEARNED["ends"],
    )
    axes = {"beta_max": (1.0, 20.0)}
    measures = ("frechet", "prior_nats", "brightness_gap")
    return {"full": full, "smoke": _images_smoke(full, axes, measures)}


def _ema() -> Presets:
    decays = (0.0, 0.9, 0.97, 0.99, 0.997, 0.999)
    base = dataclasses.replace(
        _DIGITS, num_steps=800, more_ema_decays=decays, average=0.99, num_samples=500
    )
    full = Ablation(
        question="How slowly should the parameters be averaged, as the learning rate falls or not?",
        world=images.WORLD,
        base=base,
        axes={"schedule": ("cosine", "constant"), "average": decays},
        measures=("bits_per_dim", "frechet"),
        seeds=4,
        learned=LEARNED["ema"],
    )
    smoke = _images_smoke(full, {"average": (0.0, 0.99)}, ("bits_per_dim",))
    return {"full": full, "smoke": smoke}


def _images_smoke(full: Ablation, axes: Mapping[str, Any], measures: tuple[str, ...]) -> Ablation:
    base = dataclasses.replace(full.base, **_IMAGES_SMOKE)
    if "sample_steps" in axes:
        base = dataclasses.replace(base, sample_steps=axes["sample_steps"][0])
    return dataclasses.replace(full, base=base, axes=axes, measures=measures, seeds=2, learned="")


def _losses() -> Presets:
    base = plane.Config(
        width=64,
        depth=3,
        batch_size=256,
        num_steps=2000,
        ema_decay=0.998,
        eval_points=1000,
        eval_tolerance=1e-2,
    )
    full = Ablation(
        question="Which loss finds the score of a mixture, at what cost?",
        world=plane.WORLD,
        base=base,
        axes={"num_steps": (800, 2000), "loss": ("denoising", "explicit", "implicit", "sliced")},
        measures=("score_error", "nll_gap"),
        seeds=4,
        learned=LEARNED["losses"],
    )
    smoke = dataclasses.replace(
        full,
        base=dataclasses.replace(base, **_PLANE_SMOKE),
        axes={"loss": ("denoising", "implicit", "sliced")},
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
        times="stratified",
        width=64,
        depth=3,
        batch_size=256,
        num_steps=1500,
        ema_decay=0.998,
        eval_points=2000,
        eval_tolerance=1e-2,
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
        seeds=4,
        learned=LEARNED["coupling"],
    )
    smoke = dataclasses.replace(
        full,
        base=dataclasses.replace(base, **_PLANE_SMOKE),
        axes={"loss": ("flow_matching", "flow_matching_ot"), "sample_steps": (2, 4)},
        measures=("wasserstein",),
        seeds=2,
        learned="",
    )
    return {"full": full, "smoke": smoke}


_TOLD: dict[str, Any] = {
    **vars(denoiser.PRESETS["relations"]),
    "text_attention": "cross",  # the preset as it was before `binding` asked
    "pooled_text": True,
    "guidance_scale": 3.0,
}
_TOLD_SMOKE: dict[str, Any] = {
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "text_width": 16,
    "text_depth": 1,
    "optimizer": "adamw",  # Muon takes long to compile
    "batch_size": 8,
    "num_steps": 4,
    "warmup_steps": 1,
    "num_scenes": 32,
    "autoencoder_steps": 2,
    "sample_steps": 2,
    "num_prompts": 4,
}
_OBEYED = ("obeyed_two", "obeyed_two_held_out", "obeyed_two_order")


def _binding() -> Presets:
    full = Ablation(
        question="What lets a model bind a colour and a relation to each of two shapes? "
        "For accelerators.",
        world=told.WORLD,
        base=told.Config(**_TOLD),
        axes={
            "text_attention": ("cross", "joint"),
            "pooled_text": (True, False),
            "patch_size": (2, 1),
        },
        measures=(*_OBEYED, "bound_relation", "bound_colours", "bound_shapes", "obeyed_one"),
        seeds=3,
        learned=LEARNED["binding"],
    )
    return {"full": full, "smoke": _told_smoke(full, {"text_attention": ("cross", "joint")})}


def _binding_data() -> Presets:
    mixtures = {"scene_shares": (autoencoder.MIXED, (0.0, 1.0, 0.0))}
    full = Ablation(
        question="Do scenes of one object teach how to draw two? For accelerators.",
        world=told.WORLD,
        base=told.Config(**_TOLD),
        axes={**mixtures, "num_steps": (1250, 5000)},
        measures=(*_OBEYED, "bound_relation", "bound_colours", "bound_shapes"),
        seeds=3,
        learned=LEARNED["binding_data"],
    )
    return {"full": full, "smoke": _told_smoke(full, mixtures)}


def _told_smoke(full: Ablation, axes: Mapping[str, Any]) -> Ablation:
    base = dataclasses.replace(full.base, **_TOLD_SMOKE)
    return dataclasses.replace(full, base=base, axes=axes, seeds=2, learned="")


MAKERS = {
    "prediction": _prediction,
    "prediction_wide": _prediction_wide,
    "samplers": _samplers,
    "ends": _ends,
    "losses": _losses,
    "ema": _ema,
    "coupling": _coupling,
    "binding": _binding,
    "binding_data": _binding_data,
}
"""What makes the presets, by name of the ablation."""


def find(name: str, preset: str) -> Ablation:
    """Return an ablation of the catalogue, or one of the form `module:attribute`.

    The attribute is an `Ablation`, or a mapping of presets to them. The module is imported, so its
    name must come from who asks, never from a file.

    Raises:
        Refusal: if there is none of the name, or it cannot be meant.
    """
    if name in MAKERS:
        presets = MAKERS[name]()
        if preset not in presets:
            raise Refusal(f"{name} has no preset {preset}; it has {', '.join(presets)}.")
        return presets[preset]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise Refusal(
            f"there is no ablation {name}; {near(name, MAKERS)} One of your own is module:NAME."
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise Refusal(f"{name} gives no ablation: {error}") from error
    if isinstance(found, Mapping):
        if preset not in found:
            raise Refusal(f"{name} has no preset {preset}; it has {', '.join(found)}.")
        found = found[preset]
    elif preset != FULL and isinstance(found, Ablation):
        raise Refusal(
            f"{name} is one Ablation, so it has no preset {preset}. To have one, let {attribute} "
            f'be {{"{FULL}": ..., "{preset}": ...}}, the other with a smaller base, as '
            "dataclasses.replace gives it."
        )
    if not isinstance(found, Ablation):
        raise Refusal(f"{name} is no Ablation but {type(found).__name__}.")
    return found
