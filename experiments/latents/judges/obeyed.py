"""Whether pictures obey their captions, by what a judge read in them.

What a caption says of objects holds of those that are there whichever comes first: of two, each is
looked for among all that were found.
"""

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np

from experiments.latents.judges.reading import Reading, nearest
from jaxdiff.data import scenes
from jaxdiff.data.scenes import MAX_OBJECTS, SPREAD, Factors, Scenes

Obeyed = dict[str, np.ndarray]
"""By name (B,): booleans; where captions may leave it unsaid floats, NaN where they do."""
PLACES = np.stack(np.meshgrid(SPREAD, SPREAD, indexing="ij"), -1).reshape(9, 2)
"""Row and column of each place."""


def obeyed(reading: Reading, factors: Factors) -> Obeyed:
    """Tell what of its caption each picture obeys.

    Names, by the kind of the scenes:

    - one: "shape", "colour" and "place" of the surest object; "all": these, and no other is there.
    - two: "objects": two are there; "shapes" and "colours": two objects have them; "relation":
      between the objects that are most like the two asked for, none where that is a tie of both
      orders; "all": two are there, each shape with its colour, and in the relation.
    - several: "number"; "shapes" and "colours" of all that are there; "all": these three.

    And "background", of one object also "size", which are no part of "all".

    Args:
        reading: of B pictures.
        factors: of the B scenes that their captions describe, all of one kind.

    Returns:
        Booleans (B,) by name; "size" and "background" are floats, 1 or 0, NaN where the caption
        does not say them.

    Raises:
        ValueError: if the scenes are of different kinds, or not as many as the pictures.
    """
    if len(reading.num_objects) != len(factors.kind):
        raise ValueError(
            "`reading` and `factors` must be of as many pictures; got "
            f"{len(reading.num_objects)} and {len(factors.kind)}."
        )
    kinds = np.unique(factors.kind)
    if len(kinds) != 1:
        named = ", ".join(scenes.KINDS[kind] for kind in kinds) or "none"
        raise ValueError(f"`factors` must be of scenes of one kind; got {named}.")
    found = (_one, _two, _several)[kinds[0]](reading, factors)
    said = scenes.said(factors)
    found["background"] = _where(said["background"], reading.background == factors.background)
    if kinds[0] == 0:
        there = reading.num_objects > 0
        right = there & (reading.size[:, 0] == factors.size)
        found["size"] = _where(said["size"], right)
    return found


def shares(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the share of pictures that obey, by name, of those whose captions say it.

    Args:
        found: as :func:`obeyed` returns it, or joined from several of one kind.

    Returns:
        ``{"all": p, "all_stderr": sqrt(p (1 - p) / n), ...}``, without what no caption says.
    """
    made = {}
    for name, values in found.items():
        said = values[~np.isnan(values)]
        if said.size:
            share = float(said.mean())
            made[name] = share
            made[f"{name}_stderr"] = math.sqrt(share * (1.0 - share) / said.size)
    return made


def ceiling(read: Callable[[np.ndarray], Reading], records: Scenes) -> dict[str, float]:
    """Return the shares of a judge on real scenes: what a perfect model would be said to reach.

        ceiling(templates.read, Scenes(512, seed=9, combinations="all"))

    Args:
        read: images uint8 (N, S, S, 3) -> their reading.
        records: N scenes of one kind, which no judge was trained on.

    Returns:
        As :func:`shares`.

    Raises:
        ValueError: if the scenes are of different kinds.
    """
    indices = np.arange(len(records))
    return shares(obeyed(read(records.rows(indices)["image"]), records.factors(indices)))


def _where(said: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.where(said, right.astype(float), np.nan)


def _one(reading: Reading, factors: Factors) -> Obeyed:
    there = reading.num_objects > 0
    found = {
        "shape": there & (reading.shape[:, 0] == factors.shape[:, 0]),
        "colour": there & (reading.colour[:, 0] == factors.colour[:, 0]),
        "place": there & (nearest(reading.centre[:, 0], PLACES) == factors.place),
    }
    alone = reading.num_objects == 1
    return found | {"all": alone & found["shape"] & found["colour"] & found["place"]}


def _two(reading: Reading, factors: Factors) -> Obeyed:
    pairs = np.array(list(itertools.permutations(range(MAX_OBJECTS), 2)))
    there = pairs.max(1) < reading.num_objects[:, None]  # (B, 12): who is taken for whom
    shape = reading.shape[:, pairs] == factors.shape[:, None, :2]  # (B, 12, 2)
    colour = reading.colour[:, pairs] == factors.colour[:, None, :2]
    first, second = np.moveaxis(reading.centre[:, pairs], 2, 0)
    related = relation(first, second) == factors.relation[:, None]
    # Of equally good ones, that whose shapes are right: colours are what objects have.
    likeness = 5 * (shape.sum(2) + colour.sum(2)) + shape.sum(2)
    likeness = np.where(there, likeness, -1)
    best = there & (likeness == likeness.max(1, keepdims=True))
    whole = there & shape.all(2) & colour.all(2) & related
    two = reading.num_objects == 2
    return {
        "objects": two,
        "shapes": (there & shape.all(2)).any(1),
        "colours": (there & colour.all(2)).any(1),
        "relation": best.any(1) & (related | ~best).all(1),
        "all": two & whole.any(1),
    }


def relation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the relation of first to second, in `RELATIONS`, by the larger of their offsets.

    Args:
        first: centres (..., 2), row and column.
        second: likewise.

    Returns:
        int (...).
    """
    down, right = np.moveaxis(first - second, -1, 0)
    return np.where(abs(right) > abs(down), np.where(right < 0, 0, 1), np.where(down < 0, 2, 3))


def _several(reading: Reading, factors: Factors) -> Obeyed:
    there = np.arange(MAX_OBJECTS) < reading.num_objects[:, None]
    some = there.any(1)
    found = {
        "number": reading.num_objects == factors.num_objects,
        "shapes": some & ((reading.shape == factors.shape[:, :1]) | ~there).all(1),
        "colours": some & ((reading.colour == factors.colour[:, :1]) | ~there).all(1),
    }
    return found | {"all": found["number"] & found["shapes"] & found["colours"]}
