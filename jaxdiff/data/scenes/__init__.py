"""Scenes: pictures of a few shapes and their captions, made on the machine.

    scenes = data.scenes.Scenes(40_000)                     # one object each
    scenes.rows(np.arange(4))["image"]                      # uint8 (4, 32, 32, 3)
    scenes.captions(np.arange(4))                           # "a tiny red star in the centre", ...
    unseen = data.scenes.Scenes(512, seed=1, combinations="held_out")

Eight shapes, two of them letters, in eight colours, alone at one of nine places and in one of three
sizes, two in a relation, or two to four alike; on four backgrounds, nothing quite in its place nor
quite of its colour. What training never sees together tells whether a model puts a picture
together from its words: a colour of each shape, and a second shape to each first. Scene i is a
function of (seed, i) alone, whatever the number of scenes and the size of the pictures.
"""

from jaxdiff.data.scenes.captions import describe, said
from jaxdiff.data.scenes.drawing import BACKGROUND_RGB, RGB, covered, render
from jaxdiff.data.scenes.factors import (
    BACKGROUNDS,
    COLOURS,
    COMBINATIONS,
    HELD_OUT,
    HELD_OUT_ORDER,
    KINDS,
    MAX_OBJECTS,
    PAIRS,
    RADII,
    RELATIONS,
    SHAPES,
    SIZES,
    SPREAD,
    Combinations,
    Factors,
    draw,
)
from jaxdiff.data.scenes.records import Scenes

__all__ = [
    "BACKGROUNDS",
    "BACKGROUND_RGB",
    "COLOURS",
    "COMBINATIONS",
    "HELD_OUT",
    "HELD_OUT_ORDER",
    "KINDS",
    "MAX_OBJECTS",
    "PAIRS",
    "RADII",
    "RELATIONS",
    "RGB",
    "SHAPES",
    "SIZES",
    "SPREAD",
    "Combinations",
    "Factors",
    "Scenes",
    "covered",
    "describe",
    "draw",
    "render",
    "said",
]
