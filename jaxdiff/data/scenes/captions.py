"""Scenes in words: several ways to say the same, chosen by the scene's own numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdiff.data.scenes.factors import BACKGROUNDS, COLOURS, SHAPES, SIZES, Factors

_SIZE_WORDS = (("small", "little", "tiny"), ("medium", "middle-sized"), ("large", "big", "huge"))
_SHAPE_WORDS = (
    (("circle", "disc"), ("circles", "discs")),
    (("square",), ("squares",)),
    (("triangle",), ("triangles",)),
    (("star",), ("stars",)),
    (("cross", "plus sign"), ("crosses", "plus signs")),
    (("ring", "hoop"), ("rings", "hoops")),
    (("letter E", "capital E"), ("letters E", "capital Es")),
    (("letter N", "capital N"), ("letters N", "capital Ns")),
)
_PLACES = (
    ("in the top left corner", "at the upper left"),
    ("at the top", "in the upper middle"),
    ("in the top right corner", "at the upper right"),
    ("on the left", "at the left side"),
    ("in the middle", "in the centre"),
    ("on the right", "at the right side"),
    ("in the bottom left corner", "at the lower left"),
    ("at the bottom", "in the lower middle"),
    ("in the bottom right corner", "at the lower right"),
)
_RELATIONS = (
    ("left of", "to the left of"),
    ("right of", "to the right of"),
    ("above", "over"),
    ("below", "under"),
)
_OPPOSITE = (1, 0, 3, 2)
_NUMBERS = (("two", "2"), ("three", "3"), ("four", "4"))
_ONE = (
    "a {size} {colour} {shape} {place}, {background} background",
    "a {colour} {shape} {place}",
    "{place}, a {size} {colour} {shape}",
    "a {size} {shape} {place}, {colour}, on {background}",
    "there is a {colour} {shape} {place} of a {background} picture",
)
_TWO = (
    "a {first} {relation} a {second}",
    "a {first} is {relation} a {second}, {background} background",
    "a {second}, and {relation} it a {first}",
    "on {background}, a {second} {opposite} a {first}",
)
_SEVERAL = (
    "{number} {colour} {shapes}",
    "{number} {shapes}, all {colour}",
    "{number} {colour} {shapes} on {background}",
    "a {background} picture of {number} {colour} {shapes}",
)


def describe(factors: Factors) -> list[str]:
    """Return a caption of each scene; what it leaves out is said by :func:`said`."""
    return [_caption(Factors(*(field[i] for field in factors))) for i in range(len(factors.kind))]


def said(factors: Factors) -> dict[str, np.ndarray]:
    """Return which factors the captions name: "size" and "background", booleans (B,).

    All others of a scene's kind are always named.
    """
    templates = [_template(k, w[0]) for k, w in zip(factors.kind, factors.wording, strict=True)]
    return {
        name: np.array([f"{{{name}}}" in template for template in templates], bool)
        for name in ("size", "background")
    }


def _template(kind: int, u: float) -> str:
    return _one_of((_ONE, _TWO, _SEVERAL)[kind], u)


def _caption(scene: Factors) -> str:
    u = scene.wording
    shape = _SHAPE_WORDS[scene.shape[0]]
    words = {
        "colour": COLOURS[scene.colour[0]],
        "shape": _one_of(shape[0], u[1]),
        "background": BACKGROUNDS[scene.background],
    }
    if scene.kind == 0:
        words["size"] = _one_of(_SIZE_WORDS[scene.size], u[2])
        words["place"] = _one_of(_PLACES[scene.place], u[3])
    elif scene.kind == 1:
        second = _one_of(_SHAPE_WORDS[scene.shape[1]][0], u[2])
        words["first"] = f"{words['colour']} {words['shape']}"
        words["second"] = f"{COLOURS[scene.colour[1]]} {second}"
        words["relation"] = _one_of(_RELATIONS[scene.relation], u[3])
        words["opposite"] = _one_of(_RELATIONS[_OPPOSITE[scene.relation]], u[3])
    else:
        words["shapes"] = _one_of(shape[1], u[1])
        words["number"] = _one_of(_NUMBERS[scene.num_objects - 2], u[2])
    text = _template(int(scene.kind), u[0]).format(**words)
    return text.replace("a orange", "an orange")


def _one_of(words: Sequence[Any], u: float) -> Any:
    return words[min(int(u * len(words)), len(words) - 1)]


assert len(_SHAPE_WORDS) == len(SHAPES)
assert len(_SIZE_WORDS) == len(SIZES)
