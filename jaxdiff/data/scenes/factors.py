"""What is in a scene: drawn by (seed, index), of combinations that training sees or does not."""

from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "letter E", "letter N")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "medium", "large")
BACKGROUNDS = ("black", "grey", "beige", "white")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("one", "two", "several")
MAX_OBJECTS = 4

Combinations: TypeAlias = Literal["seen", "held_out", "held_out_order", "all"]
COMBINATIONS = get_args(Combinations)

PAIRS = np.stack(np.divmod(np.arange(len(SHAPES) * len(COLOURS)), len(COLOURS)), 1)
"""(shape, colour) of each of 64 pairs."""
HELD_OUT = PAIRS[:, 1] == (3 * PAIRS[:, 0] + 1) % len(COLOURS)
"""Whether training sees none of the pair: one colour of each shape, each colour once."""
HELD_OUT_ORDER = np.arange(8) == (5 * np.arange(8)[:, None] + 2) % 8
"""Whether training sees the first shape in no relation to the second: one of each, never alike."""

_NUMBERS = 48
SPREAD = np.array([0.24, 0.5, 0.76])
"""Where rows and columns of places are, as shares of the side."""
RADII = np.array([0.13, 0.165, 0.2])
"""Of `SIZES`, as shares of the side."""
_STEPS = np.array([[0, -1], [0, 1], [-1, 0], [1, 0]])
_QUARTERS = np.array([[0.27, 0.27], [0.27, 0.73], [0.73, 0.27], [0.73, 0.73]])


class Factors(NamedTuple):
    """B scenes. Objects past their number mean nothing; so does a factor of another kind, -1.

    Attributes:
        kind: (B,), in `KINDS`: one object, two in a relation, or several alike.
        num_objects: (B,), 1 to 4.
        shape: (B, 4), in `SHAPES`.
        colour: (B, 4), in `COLOURS`.
        background: (B,), in `BACKGROUNDS`.
        size: (B,), of one object, in `SIZES`.
        place: (B,), of one object: 3 * row + column of a grid of 3 x 3.
        relation: (B,), of two: the first is so to the second, in `RELATIONS`.
        centre: (B, 4, 2), row and column, as shares of the side.
        radius: (B, 4), as shares of the side.
        tint: (B, 5, 3), in [-1, 1): how far the background's and the objects' colours are off.
        wording: (B, 6), in [0, 1): what chooses the words of a caption.
    """

    kind: np.ndarray
    num_objects: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    background: np.ndarray
    size: np.ndarray
    place: np.ndarray
    relation: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    tint: np.ndarray
    wording: np.ndarray


def draw(
    seed: int, indices: np.ndarray, shares: tuple[float, float, float], combinations: Combinations
) -> Factors:
    """Draw scenes: each a function of its seed and index alone.

    Args:
        seed: in 0..2^64 - 1.
        indices: (B,), at least 0.
        shares: of the three kinds; they sum to 1.
        combinations: "seen" in training; "held_out": an object is of a shape and colour that
            training never sees together (of two objects one is); "held_out_order": each object is
            seen, but never in a relation in this order (two objects only); or "all", evenly.
    """
    u = _numbers(seed, indices)
    kind = np.minimum((u[:, 0, None] >= np.cumsum(shares)).sum(1), len(KINDS) - 1)
    two, several = kind == 1, kind == 2
    first, second = _objects(u[:, 1:4], two, combinations)
    alike = np.repeat(PAIRS[first][:, None], MAX_OBJECTS, 1)
    alike[two, 1] = PAIRS[second][two]
    size, place, relation = (_choice(u[:, 4 + i], n) for i, n in enumerate((3, 9, 4)))
    jitter = 2.0 * u[:, 10:18].reshape(-1, MAX_OBJECTS, 2) - 1.0
    one_centre = np.stack([SPREAD[place // 3], SPREAD[place % 3]], 1)[:, None]
    apart = np.array([1.0, -1.0, 0.0, 0.0])[:, None] * _STEPS[relation][:, None]
    across = _STEPS[relation][:, None] == 0
    two_centre = 0.5 + 0.22 * apart + np.where(across, 0.14, 0.04) * jitter
    quarters = _QUARTERS[np.argsort(u[:, 18:22], 1)]
    chosen = [two[:, None, None], several[:, None, None]]
    centre = np.select(chosen, [two_centre, quarters + 0.04 * jitter], one_centre + 0.03 * jitter)
    vary = u[:, 22:26]
    one_radius = RADII[size][:, None] * (0.95 + 0.1 * vary)
    radius = np.select(
        [two[:, None], several[:, None]],
        [0.13 + 0.04 * vary, np.repeat(0.12 + 0.05 * vary[:, :1], MAX_OBJECTS, 1)],
        one_radius,
    )
    return Factors(
        kind=kind,
        num_objects=np.select([two, several], [2, 2 + _choice(u[:, 7], 3)], 1),
        shape=alike[..., 0],
        colour=alike[..., 1],
        background=_choice(u[:, 8], len(BACKGROUNDS)),
        size=np.where(kind == 0, size, -1),
        place=np.where(kind == 0, place, -1),
        relation=np.where(two, relation, -1),
        centre=centre,
        radius=radius,
        tint=2.0 * u[:, 26:41].reshape(-1, MAX_OBJECTS + 1, 3) - 1.0,
        wording=u[:, 42:48],
    )


def _numbers(seed: int, indices: np.ndarray) -> np.ndarray:
    """Return numbers in [0, 1), (B, _NUMBERS), of Philox with both for its key.

    NumPy promises its raw numbers for all versions, but not those of `Generator.random`.
    """
    made = np.empty((len(indices), _NUMBERS), np.uint64)
    for row, index in zip(made, indices, strict=True):
        row[:] = np.random.Philox(key=np.array([index, seed], np.uint64)).random_raw(_NUMBERS)
    return (made >> np.uint64(11)) * 2.0**-53


def _objects(
    u: np.ndarray, two: np.ndarray, combinations: Combinations
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pair of the first object, and that of a second of another colour, (B,) each."""
    if combinations == "all":
        wanted = others = np.ones_like(HELD_OUT)
        order = np.ones_like(HELD_OUT_ORDER)
    else:
        wanted = HELD_OUT if combinations == "held_out" else ~HELD_OUT
        others = ~HELD_OUT
        order = HELD_OUT_ORDER if combinations == "held_out_order" else ~HELD_OUT_ORDER
    # of two objects, either is the one that is held out
    swapped = (two & (u[:, 2] < 0.5))[:, None]
    first = _pick(np.where(swapped, others, wanted), u[:, 0])
    shape, colour = PAIRS[first].T
    fits = (PAIRS[:, 1] != colour[:, None]) & order[shape][:, PAIRS[:, 0]]
    return first, _pick(np.where(swapped, wanted, others) & fits, u[:, 1])


def _pick(allowed: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Return one of the allowed of each row, evenly: (B, N) and (B,) -> (B,)."""
    rank = _choice(u, allowed.sum(1))
    return np.argmax(np.cumsum(allowed, 1) > rank[:, None], 1)


def _choice(u: np.ndarray, num: int | np.ndarray) -> np.ndarray:
    return np.minimum((u * num).astype(np.int64), np.asarray(num) - 1)
