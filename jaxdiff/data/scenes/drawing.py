"""Scenes as pixels: outlines by their signed distance, so that edges are smooth at any size."""

import functools
import importlib.util
from pathlib import Path

import numpy as np

from jaxdiff.data.extras import require
from jaxdiff.data.scenes.factors import COLOURS, MAX_OBJECTS, SHAPES, Factors

RGB = np.array(
    [
        [214, 39, 40],
        [255, 140, 20],
        [240, 220, 40],
        [50, 160, 50],
        [40, 210, 220],
        [45, 80, 210],
        [130, 60, 170],
        [250, 150, 200],
    ],
    np.float64,
)
"""Of `COLOURS`, before their tint."""
BACKGROUND_RGB = np.array([[16, 16, 16], [128, 128, 128], [222, 205, 170], [245, 245, 245]])
"""Of `BACKGROUNDS`, before their tint."""
_TINT = 12.0
_SIDE, _REACH = 385, 1.5
"""Of the tables of distances: points a side, and how far from the centre they reach, in radii."""


def render(factors: Factors, size: int) -> np.ndarray:
    """Draw scenes as RGB images.

    Args:
        factors: of B scenes.
        size: S, the side in pixels.

    Returns:
        uint8 (B, S, S, 3).

    Raises:
        ImportError: if Pillow, SciPy or Matplotlib, whose font the letters are of, is missing.
    """
    tint = _TINT * factors.tint
    canvas = (BACKGROUND_RGB[factors.background] + tint[:, 0]).astype(np.float32)
    canvas = np.broadcast_to(canvas[:, None, None], (len(canvas), size, size, 3)).copy()
    for i in range(MAX_OBJECTS):
        shown = np.flatnonzero(factors.num_objects > i)
        if not shown.size:
            break
        centre, radius = factors.centre[shown, i], factors.radius[shown, i]
        inside = covered(factors.shape[shown, i], centre, radius, size)[..., None]
        colour = (RGB[factors.colour[shown, i]] + tint[shown, i + 1])[:, None, None]
        canvas[shown] += inside * (colour - canvas[shown])
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def covered(shape: np.ndarray, centre: np.ndarray, radius: np.ndarray, size: int) -> np.ndarray:
    """Return which share of each pixel an object covers.

    Args:
        shape: (B,), in `SHAPES`.
        centre: (B, 2), row and column, as shares of the side.
        radius: (B,), as shares of the side.
        size: S, the side in pixels.

    Returns:
        float64 (B, S, S), in [0, 1].

    Raises:
        ImportError: as :func:`render`.
    """
    pixels, radius = (np.arange(size) + 0.5) / size, radius[:, None]
    row, column = ((pixels - centre[:, axis, None]) / radius for axis in (0, 1))
    distance = _looked_up(shape, row, column)
    return np.clip(0.5 - distance * (radius * size)[:, None], 0.0, 1.0)


def _looked_up(shapes: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Return distances of shapes (B,) at (row, column) in radii: (B, S) each -> (B, S, S).

    Those of the nearest point of the table: 1/256 of a radius off at most.
    """

    def nearest(x: np.ndarray) -> np.ndarray:
        x = (np.clip(x, -_REACH, _REACH) + _REACH) * ((_SIDE - 1) / (2 * _REACH))
        return np.rint(x).astype(np.int64)

    places = shapes[:, None] * _SIDE + nearest(row)
    return _distances().take(places[:, :, None] * _SIDE + nearest(column)[:, None])


@functools.cache
def _distances() -> np.ndarray:
    """Return the signed distance from each shape's outline, negative inside, in radii."""
    ndimage = require("scipy.ndimage")
    tables = []
    for name in SHAPES:
        inside = _inside(name)
        outward, inward = (ndimage.distance_transform_edt(part) for part in (~inside, inside))
        tables.append((outward - inward + np.where(inside, 0.5, -0.5)) * 2 * _REACH / (_SIDE - 1))
    return np.stack(tables).astype(np.float32)


def _inside(name: str) -> np.ndarray:
    """Tell which points of a table a shape of radius 1 covers."""
    line = np.linspace(-_REACH, _REACH, _SIDE)
    x, y = np.meshgrid(line, line)  # y down, as rows are
    if name == "circle":
        return np.hypot(x, y) <= 1
    if name == "ring":
        return np.abs(np.hypot(x, y) - 0.78) <= 0.22
    if name == "square":
        return np.maximum(abs(x), abs(y)) <= 0.84
    if name == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.95)
    if name == "triangle":
        return _filled(_corners(3, 1.1) + np.array([0.0, 0.2]))
    if name == "star":
        outer, inner = _corners(5, 1.1), -0.45 * _corners(5, 1.1)
        return _filled(np.stack([outer, np.roll(inner, 2, 0)], 1).reshape(-1, 2))
    return _letter(name[-1])


def _corners(num: int, radius: float) -> np.ndarray:
    """Return the corners (N, 2), x and y, of a regular polygon that stands on its base."""
    angle = 2 * np.pi * np.arange(num) / num
    return radius * np.stack([np.sin(angle), -np.cos(angle)], 1)


def _filled(corners: np.ndarray) -> np.ndarray:
    canvas = require("PIL.Image").new("L", (_SIDE, _SIDE))
    places = (corners + _REACH) * ((_SIDE - 1) / (2 * _REACH))
    require("PIL.ImageDraw").Draw(canvas).polygon([tuple(place) for place in places], fill=1)
    return np.asarray(canvas) > 0


def _letter(letter: str) -> np.ndarray:
    """Return a capital of DejaVu Sans, which Matplotlib ships, centred, 0.95 high either way.

    Matplotlib itself is not imported.
    """
    package = importlib.util.find_spec("matplotlib")
    if package is None or package.origin is None:
        require("matplotlib")  # which names the extra that brings it
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    fonts = require("PIL.ImageFont")
    high = 1.9 / (2 * _REACH) * (_SIDE - 1)
    _, top, _, bottom = fonts.truetype(file, 1000).getbbox(letter)
    font = fonts.truetype(file, 1000 * high / (bottom - top))
    canvas = require("PIL.Image").new("L", (_SIDE, _SIDE))
    box = font.getbbox(letter)
    corner = [(_SIDE - box[axis] - box[2 + axis]) / 2 for axis in (0, 1)]
    require("PIL.ImageDraw").Draw(canvas).text(tuple(corner), letter, font=font, fill=255)
    return np.asarray(canvas) > 127


assert len(RGB) == len(COLOURS)
