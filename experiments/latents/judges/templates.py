"""A judge that learns nothing: the drawing that explains most of a picture, by least squares.

The background is the median of the border, d the picture less it. A template m is the mask of a
shape of one radius at one place. Of colour c it leaves |d - m c|^2, the least where
c = <m, d> / <m, m>, which is |d|^2 less the gain |<m, d>|^2 / <m, m>. The template of the largest
gain is what is there; it is taken away, and the next one looked for, until what is left is no
object: it is too like the background, or no template explains most of it where it is.

Each shape is first put at whole pixels, in few radii; then, at the best place of each, at quarters
of a pixel in many. Pictures of more than 32 pixels a side are reduced to that first.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from experiments.latents.judges.reading import Reading, check_pictures, nearest, size_of
from jaxdiff.data.scenes import BACKGROUND_RGB, MAX_OBJECTS, RADII, RGB, SHAPES, covered

SIDE = 32
NEAREST_EDGE = 0.17
"""Between which and 1 less it centres are, as shares of the side."""
LOW, HIGH = 0.97 * RADII[0], 1.02 * RADII[-1]
"""Between which radii are."""
REACH = 1.1
"""How far shapes reach from their centre along rows and columns, in radii."""
LEAST_CONTRAST, LEAST_SHARE = 30.0, 0.5
"""Of an object: |c|, and what of |d|^2 in its neighbourhood it explains."""
ROUNDS = 6
"""How many objects are looked for."""
AT_ONCE = 16


class Templates(NamedTuple):
    """For each of 8 shapes, N masks of K x K pixels about a centre near the middle.

    Attributes:
        masks: over their norms, float32 (8, K * K, N).
        norms: (8, N).
        radius: (N,), as shares of the side.
        offset: of the centre from the middle in pixels, (N, 2), row and column.
    """

    masks: np.ndarray
    norms: np.ndarray
    radius: np.ndarray
    offset: np.ndarray


class Tables(NamedTuple):
    """What pictures of a side are compared with.

    Attributes:
        coarse: templates of few radii in the middle.
        fine: templates of many radii, up to half a pixel off the middle.
        window: K.
        pad: how many pixels before the picture the first window begins.
    """

    coarse: Templates
    fine: Templates
    window: int
    pad: int


@functools.cache
def tables(side: int) -> Tables:
    """Return the templates for pictures of a side in pixels."""
    window = 2 * math.ceil(REACH * HIGH * side + 0.5)

    def templates(num_radii: int, offsets: np.ndarray) -> Templates:
        every = np.arange(len(SHAPES)), np.geomspace(LOW, HIGH, num_radii), offsets, offsets
        shape, radius, *offset = (each.ravel() for each in np.meshgrid(*every, indexing="ij"))
        centre = 0.5 + np.stack(offset, 1) / window
        masks = covered(shape, centre, radius * side / window, window).astype(np.float32)
        masks = masks.reshape(len(SHAPES), -1, window**2)
        norms = np.linalg.norm(masks, axis=2)
        num = norms.shape[1]
        masks = np.ascontiguousarray((masks / norms[..., None]).swapaxes(1, 2))
        return Templates(masks, norms, radius[:num], np.stack(offset, 1)[:num])

    coarse, fine = templates(6, np.zeros(1)), templates(12, np.linspace(-0.5, 0.5, 5))
    return Tables(coarse, fine, window, window // 2 - round(NEAREST_EDGE * side))


class Fit(NamedTuple):
    """The best template in each of B pictures.

    Attributes:
        shape: (B,), in `SHAPES`.
        which: its number among the fine ones, (B,).
        corner: of its window in the padded picture, (B, 2).
        colour: less the background, (B, 3).
        share: how much of what is in its neighbourhood it explains, (B,).
    """

    shape: np.ndarray
    which: np.ndarray
    corner: np.ndarray
    colour: np.ndarray
    share: np.ndarray


def read(images: np.ndarray) -> Reading:
    """Read pictures, 16 at once.

    Args:
        images: uint8 (B, S, S, 3).

    Returns:
        What they show.

    Raises:
        ImportError: as `scenes.render`.
        ValueError: if they are no such pictures.
    """
    check_pictures(images)
    parts = [_read(images[i : i + AT_ONCE]) for i in range(0, len(images), AT_ONCE)]
    return Reading(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def _read(images: np.ndarray) -> Reading:
    x = reduced(images)
    num, side = x.shape[:2]
    made = tables(side)
    border = np.concatenate([x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]], 1)
    background = np.median(border, 1)
    edge = (made.pad, made.pad)
    left = np.moveaxis(x - background[:, None, None], 3, 1)
    left = np.pad(left, ((0, 0), (0, 0), edge, edge))
    count, active = np.zeros(num, int), np.arange(num)
    shape, size, colour = (np.zeros((num, MAX_OBJECTS), int) for _ in range(3))
    centre = np.zeros((num, MAX_OBJECTS, 2))
    for _ in range(ROUNDS):
        fit = best(left[active], made)
        there = np.linalg.norm(fit.colour, axis=1) >= LEAST_CONTRAST
        there &= fit.share >= LEAST_SHARE
        active, fit = active[there], Fit(*(field[there] for field in fit))
        if not active.size:
            break
        middle = (fit.corner - made.pad + made.window / 2 + made.fine.offset[fit.which]) / side
        new = count[active] < MAX_OBJECTS  # others are counted alone
        at = active[new], count[active][new]
        shape[at], centre[at] = fit.shape[new], middle[new]
        size[at] = size_of(made.fine.radius[fit.which])[new]
        colour[at] = nearest(background[active] + fit.colour, RGB)[new]
        count[active] += 1
        left[active] = without(left[active], fit, made)
    return Reading(count, shape, colour, centre, size, nearest(background, BACKGROUND_RGB))


def best(left: np.ndarray, made: Tables) -> Fit:
    """Return what explains most of pictures less their background, padded, (B, 3, H, H)."""
    rows = np.arange(len(left))
    fits = [_best_of_shape(left, places, made, i) for i, places in enumerate(_places(left, made))]
    gains, which, corner, colour = (np.stack(field) for field in zip(*fits, strict=True))
    shape = gains.argmax(0)
    at = shape, rows
    around = windows(left, corner[at], made.window)
    line = np.arange(made.window) + 0.5 - made.window / 2
    offset, radius = made.fine.offset[which[at]], made.fine.radius[which[at]]
    reach = REACH * radius * (left.shape[2] - 2 * made.pad) + 1
    row, column = (abs(line - offset[:, axis, None]) <= reach[:, None] for axis in (0, 1))
    energy = np.einsum("bcij,bi,bj->b", around**2, row, column)
    share = gains[at] / np.maximum(energy, 1e-9)
    return Fit(shape, which[at], corner[at], colour[at], share)


def _places(left: np.ndarray, made: Tables) -> np.ndarray:
    """Return the first corner of the window that suits each shape best, (8, B, 2)."""
    views = np.lib.stride_tricks.sliding_window_view(left, (made.window,) * 2, (2, 3))
    num, _, places = views.shape[:3]  # (B, 3, P, P, K, K)
    masks = np.concatenate(list(made.coarse.masks), 1)
    products = (views.reshape(-1, made.window**2) @ masks).reshape(num, 3, places**2, -1)
    gains = (products**2).sum(1).reshape(num, places**2, len(SHAPES), -1).max(3)
    return np.stack(np.divmod(gains.argmax(1).T, places), 2)


def _best_of_shape(
    left: np.ndarray, corner: np.ndarray, made: Tables, shape: int
) -> tuple[np.ndarray, ...]:
    """Return gain (B,), number (B,), corner (B, 2) and colour (B, 3) of the best of a shape."""
    rows = np.arange(len(left))
    pixels = windows(left, corner, made.window).reshape(-1, made.window**2)
    products = (pixels @ made.fine.masks[shape]).reshape(len(left), 3, -1)
    gains = (products**2).sum(1)
    which = gains.argmax(1)
    colour = products[rows, :, which] / made.fine.norms[shape, which, None]
    return gains[rows, which], which, corner, colour


def without(left: np.ndarray, fit: Fit, made: Tables) -> np.ndarray:
    """Return the pictures, as :func:`best` takes them, less what was found."""
    left, fine = left.copy(), made.fine
    masks = fine.masks[fit.shape, :, fit.which] * fine.norms[fit.shape, fit.which, None]
    masks = masks.reshape(-1, 1, made.window, made.window)
    left[_within(fit.corner, made.window)] -= masks * fit.colour[:, :, None, None]
    return left


def windows(left: np.ndarray, corner: np.ndarray, window: int) -> np.ndarray:
    """Return one window of each picture, (B, 3, K, K)."""
    return left[_within(corner, window)]


def _within(corner: np.ndarray, window: int) -> tuple[np.ndarray, ...]:
    line, picture = np.arange(window), np.arange(len(corner))[:, None, None, None]
    rows, columns = (corner[:, axis, None] + line for axis in (0, 1))
    channel = np.arange(3)[:, None, None]
    return picture, channel, rows[:, None, :, None], columns[:, None, None, :]


def reduced(images: np.ndarray) -> np.ndarray:
    """Return pictures as floats, those of more than 32 pixels a side as means over areas."""
    size = images.shape[1]
    if size <= SIDE:
        return images.astype(np.float32)
    edges, pixels = np.arange(SIDE + 1) * (size / SIDE), np.arange(size)
    low, high = edges[:-1, None], edges[1:, None]
    overlap = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None)
    share = (overlap * (SIDE / size)).astype(np.float32)
    return np.einsum("ri,bijc,sj->brsc", share, images.astype(np.float32), share, optimize=True)
