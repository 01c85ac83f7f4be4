"""How the axes of a tensor lie in the parameter that it becomes."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["LAYOUTS", "side_by_side"]

_ALIGNMENT = 64
"""In bytes; memory of this alignment is taken by JAX as it is, on a CPU."""
_BLOCK = (256, 64)
"""Along the last two axes, what is transposed at once so that it stays in the cache."""


def _transposed(ndim: int, *axes: int) -> Callable[[Any], Any]:
    def layout(x: Any) -> Any:
        if x.ndim != ndim:
            raise ValueError(f"{ndim} axes")
        return x.transpose(axes)

    return layout


def _linear(x: Any) -> Any:
    if x.ndim not in (2, 4) or x.shape[2:] not in ((), (1, 1)):
        raise ValueError("2 axes, or those of a 1 x 1 convolution")
    return x.reshape(x.shape[:2]).transpose(1, 0)


def _conv_as_patches(x: Any) -> Any:
    if x.ndim != 4:
        raise ValueError("4 axes")
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _unbatched(x: Any) -> Any:
    if x.ndim < 2 or x.shape[0] != 1:
        raise ValueError("a first axis of 1")
    return x.reshape(x.shape[1:])


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "same": lambda x: x,
    "linear": _linear,
    "conv": _transposed(4, 2, 3, 1, 0),
    "conv_as_patches": _conv_as_patches,
    "unbatched": _unbatched,
    "flat": lambda x: x.reshape(-1),
}
"""How the axes of a tensor lie in the parameter.

=================  ==================================================================
same               as they are
linear             (O, I) or (O, I, 1, 1) -> (I, O)
conv               (O, I, H, W) -> (H, W, I, O)
conv_as_patches    (O, I, H, W) -> (H W I, O): a patch's pixels row by row, channels last
unbatched          (1, ...) -> (...)
flat               all in one axis
=================  ==================================================================
"""


def side_by_side(parts: Sequence[np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Copy arrays that lie side by side along the last axis into memory of its own, and cast them.

    Args:
        parts: of any strides; their last axes add up to that of `shape`.
        shape: of the result.
        dtype: likewise.
    """
    made = _aligned(shape, np.dtype(dtype))
    if len(parts) == 1:
        _copy(made, parts[0])
        return made
    end = 0
    for part in parts:
        start, end = end, end + part.shape[-1]
        _copy(made[..., start:end], part)
    return made


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _copy(made: np.ndarray, part: np.ndarray) -> None:
    """Copy in blocks where the order of the axes differs: several times faster."""
    if made.ndim < 2 or part.flags.c_contiguous or part.size < math.prod(_BLOCK):
        made[...] = part
        return
    rows, columns = made.shape[-2:]
    high, wide = _BLOCK if made.ndim == 2 else (_BLOCK[1], _BLOCK[1])
    for i, j in itertools.product(range(0, rows, high), range(0, columns, wide)):
        block = (..., slice(i, i + high), slice(j, j + wide))
        made[block] = part[block]
