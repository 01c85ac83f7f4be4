"""One record of a TFDS set, bytes, to its fields, without TensorFlow.

TFDS decodes any feature. Images of bytes and their labels, which training reads by the million, are
decoded here, to the same levels in half of the time, and always by Pillow, whether or not there is
another decoder: JPEG files do not say their levels to the bit.
"""

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.data import decoding
from jaxdiff.data.extras import require

Decode = Callable[[bytes], dict[str, Any]]
Shape = tuple[int | None, int | None, int]
_MODES = {1: "L", 3: "RGB"}
"""Pillow's, by number of channels."""


def decoder(
    tfds: Any, features: Any, names: Sequence[str], image_size: int | None = None
) -> Decode:
    """Return what makes of a record some of its fields, as TFDS gives them.

    Args:
        tfds: the module.
        features: of the records, by name.
        names: of the fields wanted.
        image_size: the side that "image" is resized to, if it is.

    Returns:
        A function of a record. It raises errors of many kinds where that is no such example.
    """
    chosen = {name: features[name] for name in names}
    if all(_is_image(tfds, each) or _is_label(tfds, each) for each in chosen.values()):
        shapes = {n: shape_of(each) for n, each in chosen.items() if _is_image(tfds, each)}
        decode: Decode = _Plain(names, shapes)
    else:
        decode = tfds.features.FeaturesDict(chosen).deserialize_example_np
    return decode if image_size is None else _Fitted(decode, image_size)


def shape_of(feature: Any) -> Shape:
    """Return the shape (H, W, C) of a feature's images; sides may be None, channels are 3 then."""
    height, width, channels = feature.shape
    return height, width, 3 if channels is None else channels


class _Fitted:
    """Decode, and resize the image: an object, for processes to be given."""

    def __init__(self, decode: Decode, image_size: int) -> None:
        self._decode, self._image_size = decode, image_size
        decoding.pillow()

    def __call__(self, record: bytes) -> dict[str, Any]:
        found = self._decode(record)
        return {**found, "image": decoding.fitted(found["image"], self._image_size)}


class _Plain:
    """Decode images and labels: an object, for processes to be given."""

    def __init__(self, names: Sequence[str], shapes: dict[str, Shape]) -> None:
        self._names, self._shapes = tuple(names), shapes
        _modules()  # not by several threads at once, at their first record

    def __call__(self, record: bytes) -> dict[str, Any]:
        given = _modules().example.FromString(record).features.feature
        found: dict[str, Any] = {}
        for name in self._names:
            if name not in given:
                raise ValueError(f'it has no "{name}"')
            shape = self._shapes.get(name)
            value = given[name].int64_list.value if shape is None else given[name].bytes_list.value
            if len(value) != 1:
                raise ValueError(f'it has {len(value)} values of "{name}", not one')
            found[name] = value[0] if shape is None else image(value[0], shape)
        return found


def image(data: bytes, shape: Shape) -> np.ndarray:
    """Decode an image, not changing its size; one of a single channel is all of those asked for.

    Where one channel or three are asked for, palettes, CMYK and the like become grey or RGB.

    Args:
        data: a PNG, a JPEG or another file that Pillow reads.
        shape: (H, W, C) that it must have; H and W are None where they may be any.

    Returns:
        uint8 levels (H, W, C).

    Raises:
        ValueError: if it has another shape or is of no format that is known; where its content is
            damaged, whatever Pillow raises.
    """
    try:
        opened = _opened(io.BytesIO(data))
    except _modules().unidentified:  # which shows where the bytes lie in memory
        raise ValueError("its image is of no format that is known") from None
    with opened as file:
        sides = file.height, file.width
        if any(asked not in (None, side) for side, asked in zip(sides, shape[:2], strict=True)):
            raise ValueError(f"its image has {file.height} x {file.width} pixels, not {shape[:2]}")
        file.load()
        mode = _MODES.get(shape[2])
        if mode is not None and file.mode not in ("L", mode):
            levels = np.asarray(decoding.plain(file, mode))
        else:
            levels = np.asarray(file, np.uint8)
    if levels.ndim == 2:
        levels = levels[..., None]
    if levels.shape[2] == 1:
        levels = np.repeat(levels, shape[2], axis=-1)
    if levels.shape != (*sides, shape[2]):
        raise ValueError(f"its image has shape {levels.shape}, not {shape}")
    return levels


def _opened(file: io.BytesIO) -> Any:
    if file.getbuffer()[:3] == b"\xff\xd8\xff":
        # What Image.open finds out too, which for a small image takes a quarter of the time.
        return _modules().jpeg(file)
    return _modules().open(file)


class _Modules(NamedTuple):
    example: Any
    open: Any
    jpeg: Any
    unidentified: type[Exception]


@functools.cache
def _modules() -> _Modules:
    pillow = require("PIL.Image")
    pillow.init()
    return _Modules(
        require("tensorflow_datasets.proto").tf_example_pb2.Example,
        pillow.open,
        require("PIL.JpegImagePlugin").JpegImageFile,
        require("PIL").UnidentifiedImageError,
    )


def _is_image(tfds: Any, feature: Any) -> bool:
    return type(feature) is tfds.features.Image and np.dtype(feature.np_dtype) == np.uint8


def _is_label(tfds: Any, feature: Any) -> bool:
    return type(feature) is tfds.features.ClassLabel
