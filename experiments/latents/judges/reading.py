"""What a judge sees in pictures."""

from typing import NamedTuple

import numpy as np

from jaxdiff.data.scenes import RADII, Factors


class Reading(NamedTuple):
    """What B pictures show, the surest object first. Objects past the number mean nothing.

    Attributes:
        num_objects: (B,), from 0 on; of more than 4 only the surest 4 are described.
        shape: (B, 4), in `SHAPES`.
        colour: (B, 4), in `COLOURS`.
        centre: (B, 4, 2), row and column, as shares of the side.
        size: (B, 4), in `SIZES`.
        background: (B,), in `BACKGROUNDS`.
    """

    num_objects: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    centre: np.ndarray
    size: np.ndarray
    background: np.ndarray


def of_factors(factors: Factors) -> Reading:
    """Return what a judge that is never wrong sees in scenes."""
    return Reading(
        factors.num_objects,
        factors.shape,
        factors.colour,
        factors.centre,
        size_of(factors.radius),
        factors.background,
    )


def size_of(radius: np.ndarray) -> np.ndarray:
    """Return the size, in `SIZES`, whose radius is nearest, of any shape (...)."""
    return nearest(radius[..., None], RADII[:, None])


def nearest(x: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return which of points (N, D) is nearest to each of x (..., D)."""
    return np.argmin(((x[..., None, :] - points) ** 2).sum(-1), -1)


def check_pictures(images: np.ndarray) -> None:
    """Refuse what are no pictures for a judge.

    Raises:
        ValueError: if they are not uint8 (B, S, S, 3), B at least 1.
    """
    shape = np.shape(images)
    square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
    if not square or not shape[0] or images.dtype != np.uint8:
        dtype = getattr(images, "dtype", type(images).__name__)
        raise ValueError(f"`images` must be uint8 (B, S, S, 3); got {dtype} {shape}.")
