"""Guidance of a trained model of images, as a command line asks for it.

The guided model stands where the model stood: whoever samples it takes its `denoiser`. Scale and
interval are parts of its parameters, so one compiled program takes any.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.common.command import Refusal
from experiments.common.guiding import RULES, Form, GuidedDenoiser
from experiments.images.model import Config, Recipe, build_model
from jaxdiff import Model, data, denoisers, guidance
from jaxdiff.processes import Process
from jaxdiff.typing import Denoiser, PyTree


@dataclasses.dataclass(frozen=True)
class Guidance(Form):
    """How far samples lean towards their class; not at all unless told."""

    guidance_scale: float = 1.0
    """Weight of the difference between the model with its label and without; 1 is none."""
    weaker_run: str | None = None
    """Folder of a weaker run on the same data and process, to lean away from in place of the
    model without its label."""

    @property
    def acts(self) -> bool:
        """Whether samples differ from those without guidance."""
        return self.guidance_scale != 1.0

    def check(self) -> None:
        """Refuse numbers that cannot be meant.

        Raises:
            Refusal: naming the option.
        """
        self.check_numbers(self.guidance_scale)

    def check_label(self, config: Config, images: data.Description) -> None:
        """Refuse guidance by a model without its label where training never dropped one.

        Raises:
            Refusal: saying what would do.
        """
        if not self.acts or self.weaker_run is not None:
            return
        got = f"got --guidance-scale {self.guidance_scale:g}"
        if images.num_classes is None:
            raise Refusal(
                f"--guidance-scale must be 1 for a run without classes, or guide away from a "
                f"--weaker-run; {got}."
            )
        if config.drop_cond == 0.0:
            raise Refusal(
                "--guidance-scale must be 1 for a run trained with --drop-cond 0: its network "
                f"never saw an image without its label; {got}. Train with --drop-cond 0.1, or give "
                "a --weaker-run."
            )

    def record(self, weaker: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what images that it acts on are recorded with.

        Args:
            weaker: what names the weaker run and its step; None where there is none.
        """
        return self.record_of(self.guidance_scale) | {"weaker_run": weaker}


class Weaker(NamedTuple):
    """A run to lean away from.

    Attributes:
        config: of the run.
        params: its parameters.
        record: of the run.
        identity: what names it and its step.
    """

    config: Config
    params: PyTree
    record: Mapping[str, Any]
    identity: Mapping[str, Any]


def guided_by(
    guiding: Guidance,
    weaker: Weaker | None,
    config: Config,
    params: PyTree,
    images: data.Description,
    record: Mapping[str, Any],
) -> tuple[Any, PyTree, dict[str, Any] | None]:
    """Return the model to sample, its parameters, and what a record of its samples says of both.

    Where guidance does not act that is the model itself, and None.

    Args:
        guiding: how.
        weaker: the run that it leans away from, if it is not the model without its label.
        config: of the run.
        params: its parameters.
        images: what it is of.
        record: of the run.

    Raises:
        Refusal: if the weaker run is of other data or another process.
    """
    model = build_model(config, images)
    if weaker is not None:
        check_weaker(config, record, weaker, guiding.weaker_run)
    if not guiding.acts:
        return model, params, None
    if weaker is None:
        guided = GuidedRecipe(model, guiding)
        return guided, guided.share(params), guiding.record(None)
    guided = GuidedRecipe(model, guiding, build_model(weaker.config, images))
    return guided, guided.share(params, weaker.params), guiding.record(weaker.identity)


def check_weaker(
    config: Config, record: Mapping[str, Any], weaker: Weaker, weaker_run: str | None
) -> None:
    """Refuse a weaker run of other data or another process.

    Args:
        config: of the run that is sampled.
        record: of that run.
        weaker: the other.
        weaker_run: its folder.

    Raises:
        Refusal: saying what differs.
    """
    asked, got = dataclasses.asdict(config), dataclasses.asdict(weaker.config)
    pairs = {f"--{name}": (asked[name], got[name]) for name in ("data", "process")}
    here, there = (found.get("data") or {} for found in (record, weaker.record))
    for name in ("shape", "num_levels", "num_classes", "contents"):
        if name in here and name in there:
            pairs[f"the {name} of its data"] = here[name], there[name]
    for name, (one, other) in pairs.items():
        if one != other:
            raise Refusal(
                f"--weaker-run must be of the same data and process as --run-dir; of {weaker_run} "
                f"{name} is {other}, of the run {one}. Train one with the options of the run, but "
                "fewer --num-steps or a smaller --width."
            )


class GuidedRecipe(NamedTuple):
    """A guided model of images; it is sampled as a `Recipe` is, with the parameters of `share`.

    Attributes:
        recipe: the model that is guided.
        guiding: how.
        weaker: the model that it leans away from, None being itself without its label.
    """

    recipe: Recipe
    guiding: Guidance
    weaker: Recipe | None = None

    @property
    def process(self) -> Process:
        """The forward process."""
        return self.recipe.process

    @property
    def model(self) -> Model:
        """The model by which samples start: of two, the one that needs signal."""
        away = self.recipe if self.weaker is None else self.weaker
        return away.model if away.model.needs_signal else self.recipe.model

    def share(self, params: PyTree, weaker: PyTree = None) -> PyTree:
        """Return what `denoiser` takes as its parameters.

        Args:
            params: of the model.
            weaker: those of the weaker one.
        """
        numbers = self.guiding.numbers(self.guiding.guidance_scale)
        return {"params": params, "weaker": weaker, **numbers}

    def cond(self, labels: Any) -> Any:
        """Return what the network is given for labels (B,): None where it sees none."""
        return self.recipe.cond(labels)

    def denoiser(self, shared: PyTree, labels: Any = None) -> Any:
        """Return the guided denoiser of images of these labels, (B,), or of no label yet."""
        towards = self.recipe.model.denoiser(shared["params"])
        away = towards if self.weaker is None else self.weaker.model.denoiser(shared["weaker"])
        rule = RULES[self.guiding.rule]

        def of(cond: PyTree) -> Denoiser:
            label, null = self.recipe.null_label, cond
            if self.weaker is None and label is not None:
                null = jax.tree.map(partial(jnp.full_like, fill_value=label), cond)
            model, other = denoisers.conditioned(towards, cond), denoisers.conditioned(away, null)
            guided = guidance.classifier_free(model, other, shared["scale"], rule=rule)
            return self.guiding.within(self.process, guided, model, shared)

        if labels is None:
            has_v = getattr(of(None), "v", None) is not None
            return GuidedDenoiser(of, towards.needs_signal or away.needs_signal, has_v)
        return of(self.cond(labels))
