"""How the axes of a tensor lie in the parameter that it becomes."""

from collections.abc import Callable
from typing import Any


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


def _conv_as_linear(x: Any) -> Any:
    if x.ndim != 4 or x.shape[2:] != (1, 1):
        raise ValueError("the axes of a 1 x 1 convolution")
    return _linear(x)


def _linear_as_conv(x: Any) -> Any:
    kernel = _linear(x)
    return kernel.reshape(1, 1, *kernel.shape)


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
    "conv_as_linear": _conv_as_linear,
    "linear_as_conv": _linear_as_conv,
    "conv_as_patches": _conv_as_patches,
    "unbatched": _unbatched,
    "flat": lambda x: x.reshape(-1),
}
"""How the axes of a tensor lie in the parameter.

=================  ==================================================================
same               as they are
linear             (O, I) or (O, I, 1, 1) -> (I, O)
conv               (O, I, H, W) -> (H, W, I, O)
conv_as_linear     (O, I, 1, 1) -> (I, O)
linear_as_conv     (O, I) or (O, I, 1, 1) -> (1, 1, I, O)
conv_as_patches    (O, I, H, W) -> (H W I, O): a patch's pixels row by row, channels last
unbatched          (1, ...) -> (...)
flat               all in one axis
=================  ==================================================================
"""
