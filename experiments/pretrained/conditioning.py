"""What images are asked to be of: a prompt, a class, or neither; by what the weights take."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.command import Refusal, refusing
from experiments.common.guiding import RULES, Form, GuidedDenoiser
from jaxdiff import denoisers, guidance
from jaxdiff.pretrained import Denoising, TextEncoder, WeightsError
from jaxdiff.typing import Array, Denoiser, PyTree

SCALES = {"text": 7.5, "classes": 4.0, "nothing": 1.0}
"""The guidance scale, where it is not given, by what the weights take."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the images are to be of."""

    prompt: str | None = None
    """What they show, for weights that take text."""
    negative_prompt: str | None = None
    """What guidance leans away from; nothing in particular unless given."""
    label: int | None = None
    """Their class, for weights that take classes; all classes in turn unless given."""

    def check(self, loaded: Denoising, scale: float) -> None:
        """Refuse what the weights do not take, and a lack of what they need.

        Args:
            loaded: the weights.
            scale: of guidance.

        Raises:
            Refusal: naming the option.
        """
        takes, num_classes = taken(loaded), loaded.num_classes or 0
        remedies = {
            "text": "Say it by --prompt.",
            "classes": f"Give --label, 0..{num_classes - 1}.",
            "nothing": "Leave out --prompt and --label.",
        }
        allowed = {"text": ("prompt", "negative_prompt"), "classes": ("label",), "nothing": ()}
        for name, value in dataclasses.asdict(self).items():
            if value is not None and name not in allowed[takes]:
                option = f"--{name.replace('_', '-')}"
                raise Refusal(
                    f"{option} must be left out: these weights take {takes}. {remedies[takes]}"
                )
        if takes == "text" and self.prompt is None:
            raise Refusal(
                '--prompt must be given, with "" for none: these weights make images of text.'
            )
        if self.label is not None and not 0 <= self.label < num_classes:
            raise Refusal(f"--label must be in 0..{num_classes - 1}; got {self.label}.")
        if scale == 1.0 and self.negative_prompt is not None:
            raise Refusal(
                "--negative-prompt acts by guidance alone: --guidance-scale must not be 1 with it."
            )
        if scale != 1.0 and takes == "nothing":
            raise Refusal(
                f"--guidance-scale must be 1 for weights without conditioning; got {scale:g}."
            )


def taken(loaded: Denoising) -> str:
    """Return what weights take: "text", "classes" or "nothing"."""
    if loaded.text is not None:
        return "text"
    return "nothing" if loaded.num_classes is None else "classes"


class Conditioning(NamedTuple):
    """What the network is given, for any number of images.

    Attributes:
        takes: as :func:`taken` says it.
        given: the tokens of the prompt (L, D), or a mapping of them and what else describes an
            image; the label or None for all in turn; or nothing.
        null: what stands for nothing: likewise, or a label.
        num_classes: of the labels.
    """

    takes: str
    given: Any = None
    null: Any = None
    num_classes: int | None = None

    def labels(self, num: int) -> np.ndarray:
        """Return the labels of images 0..num - 1; 0 where there are none."""
        if self.takes != "classes" or self.num_classes is None:
            return np.zeros(num, np.int64)
        return np.arange(num) % self.num_classes if self.given is None else np.full(num, self.given)

    def rows(self, labels: np.ndarray, beside: np.ndarray | None = None) -> PyTree:
        """Return the conditioning of images of these labels, by row.

        Args:
            labels: (N,).
            beside: what stands beside x, (1, h, w, c).
        """
        if self.takes == "classes":
            return labels.astype(np.int32)
        if self.takes == "nothing":
            return None

        def spread(leaf: np.ndarray) -> np.ndarray:
            return np.broadcast_to(leaf, (len(labels), *leaf.shape))

        given = jax.tree.map(spread, self.given)
        if beside is None:
            return given
        named = given if isinstance(given, dict) else {"tokens": given}
        return {**named, "beside": spread(beside[0])}


def condition(loaded: Denoising, asked: Asked, size: tuple[int, int]) -> Conditioning:
    """Encode what images of a size (H, W) are to be of, once for all of them; see :func:`encoded`.

    Where zeros stand for no prompt, they do unless there is a negative one.
    """
    takes = taken(loaded)
    if takes == "classes":
        return Conditioning(takes, asked.label, loaded.num_classes, loaded.num_classes)
    if loaded.text is None:
        return Conditioning(takes)
    given = {"--prompt": asked.prompt or "", "--negative-prompt": asked.negative_prompt or ""}
    found = encoded(loaded.text, given, size)
    to, away = (jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in (0, 1))
    if loaded.text.null_is_zero and asked.negative_prompt is None:
        away = nothing(away)
    return Conditioning(takes, to, away)


def nothing(encoding: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what stands for no prompt where zeros do: an encoding of zeros, its sizes as they are.

    Args:
        encoding: of any prompts, as :func:`encoded` gives it of two encoders.
    """
    return {
        name: leaf if name == "sizes" else np.zeros_like(leaf) for name, leaf in encoding.items()
    }


def encoded(text: TextEncoder, given: Mapping[str, str], size: tuple[int, int]) -> PyTree:
    """Return the encodings (N, L, D) of prompts, by what each is called.

    What of a prompt does not fit is said on stderr. Encoders of SDXL give a mapping of them, of
    the vectors `pooled` (N, P), and of `sizes` (N, 6): height and width of an image before it was
    cropped, where the crop begins, and its height and width, all of it here.

    Raises:
        Refusal: if the weights have no tokenizer.
    """
    prompts = list(given.values())
    with refusing(WeightsError, say="--weights: "):
        tokens = text.tokenize(prompts)
    for name, left in zip(given, text.tokenize.cut(prompts), strict=True):
        if left:
            print(
                f"{name} has more than the {text.tokenize.length} tokens that its encoder takes; "
                f"left out: {left.strip()!r}",
                file=sys.stderr,
            )
    found = jax.tree.map(np.asarray, jax.jit(text.encode)(text.params, tokens))
    if not text.pools:
        return found
    sizes = np.asarray([*size, 0, 0, *size], jnp.result_type(float))
    return {**found, "sizes": np.broadcast_to(sizes, (len(prompts), len(sizes)))}


@dataclasses.dataclass(frozen=True)
class Guidance(Form):
    """How far images lean towards what they are to be of."""

    guidance_scale: float | None = None
    """Weight of the difference between the network with its prompt or label and without; 1 is none.
    Unless given 7.5 for a prompt, 4 for a label."""

    def scale(self, loaded: Denoising) -> float:
        """Return the scale; refuse numbers that cannot be meant.

        Raises:
            Refusal: naming the option.
        """
        scale = SCALES[taken(loaded)] if self.guidance_scale is None else self.guidance_scale
        self.check_numbers(scale)
        return scale


class Guided(NamedTuple):
    """The denoiser that a command asks for, with the parameters of :meth:`shared`.

    Attributes:
        loaded: the weights.
        guidance: how they are guided.
        scale: how far.
    """

    loaded: Denoising
    guidance: Form
    scale: float

    def shared(self, null: Any) -> PyTree:
        """Return the parameters: the network's and, of guidance, what is leant away from.

        Args:
            null: see :class:`Conditioning`.
        """
        if self.scale == 1.0:
            return {"network": self.loaded.params}
        numbers = self.guidance.numbers(self.scale)
        null = jax.tree.map(np.asarray, null)
        return {"network": self.loaded.params, "null": null, **numbers}

    def denoiser(self, shared: PyTree, cond: PyTree = None) -> Any:
        """Return the denoiser, (x_t, t, cond) -> x0_hat, or of known conditioning (x_t, t)."""
        model, limit = self.loaded.model, self.loaded.clip
        if self.scale == 1.0:
            return denoisers.conditioned(model.denoiser(shared["network"], clip=limit), cond)
        plain = model.denoiser(shared["network"])
        rule = RULES[self.guidance.rule]

        def of(cond: PyTree) -> Denoiser:
            null = shared["null"]
            if isinstance(cond, dict):
                null = {**cond, **(null if isinstance(null, dict) else {"tokens": null})}
            guided = guidance.classifier_free_batched(plain, cond, null, shared["scale"], rule=rule)
            alone = denoisers.conditioned(plain, cond)
            guided = self.guidance.within(model.process, guided, alone, shared)
            return guided if limit is None else _clipped(guided, limit)

        has_v = limit is None and self.guidance.rule == "linear"
        return denoisers.conditioned(GuidedDenoiser(of, plain.needs_signal, has_v), cond)


def _clipped(denoise: Denoiser, limit: float) -> Denoiser:
    def clipped(x_t: Array, t: Array) -> Array:
        return jnp.clip(denoise(x_t, t), -limit, limit)

    return clipped
