r"""How near a picture is to another, pair by pair: peak signal-to-noise ratio, and SSIM.

    psnr = 10 log10(L^2 / mean (x - y)^2)
    ssim = mean of (2 mu_x mu_y + c_1) / (mu_x^2 + mu_y^2 + c_1)
                   (2 s_xy + c_2) / (s_x^2 + s_y^2 + c_2)

with L the range of the data, mu, s^2 and s_xy mean, variance and covariance of a window of 11 x 11
pixels that is weighted by a Gaussian of standard deviation 1.5, c_1 = (0.01 L)^2 and
c_2 = (0.03 L)^2; the mean is over all windows that lie within the picture, and over channels.

Source: Wang et al. 2004 (IEEE Transactions on Image Processing 13(4)), their mean of an index by
window; there of one channel.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxdiff import checks
from jaxdiff.typing import Array

WINDOW, WIDTH = 11, 1.5
"""Pixels of a window's side, and the standard deviation of its weights."""
STABILISERS = 0.01, 0.03
"""K_1 and K_2: roots of c_1 and c_2 over the range of the data."""


def psnr(x: ArrayLike, y: ArrayLike, *, data_range: Any = 2.0) -> Array:
    """Return the peak signal-to-noise ratio of each pair, in decibels.

    Args:
        x: shape (B, ...).
        y: of the same shape.
        data_range: L, the greatest value that may be less the least: 2 for data in [-1, 1].

    Returns:
        Shape (B,), in float32 at least; infinite where x equals y.

    Raises:
        TypeError: if they do not hold real numbers.
        ValueError: if the shapes differ, or `data_range` is not positive.
    """
    x, y = _pair(x, y)
    checks.number("data_range", data_range, 0.0, above=True)
    squared_error = jnp.mean(((x - y) ** 2).reshape(x.shape[0], -1), axis=1)
    return 10.0 * jnp.log10(jnp.asarray(data_range, x.dtype) ** 2 / squared_error)


def ssim(x: ArrayLike, y: ArrayLike, *, data_range: Any = 2.0) -> Array:
    """Return the structural similarity of each pair, 1 where they are equal.

    Args:
        x: shape (B, H, W, C), H and W at least 11.
        y: of the same shape.
        data_range: as of :func:`psnr`.

    Returns:
        Shape (B,), in float32 at least.

    Raises:
        TypeError: if they do not hold real numbers.
        ValueError: if the shapes differ or are others, or `data_range` is not positive.
    """
    x, y = _pair(x, y)
    data_range = checks.number("data_range", data_range, 0.0, above=True)
    if x.ndim != 4 or min(x.shape[1:3]) < WINDOW:
        raise ValueError(
            f"`x` must have shape (B, H, W, C), H and W at least {WINDOW}; got {x.shape}."
        )
    luminance, contrast = ((k * jnp.asarray(data_range, x.dtype)) ** 2 for k in STABILISERS)
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = _windowed(x * x) - mean_x**2
    variance_y = _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    alike = (2.0 * mean_x * mean_y + luminance) * (2.0 * covariance + contrast)
    whole = (mean_x**2 + mean_y**2 + luminance) * (variance_x + variance_y + contrast)
    return jnp.mean((alike / whole).reshape(x.shape[0], -1), axis=1)


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    """Return both (B, ...) in one dtype of at least float32.

    Raises:
        TypeError: if they do not hold real numbers.
        ValueError: if the shapes differ, or there are no rows or nothing in them.
    """
    for name, value in {"x": x, "y": y}.items():
        checks.real(name, value)
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.shape != y.shape:
        raise ValueError(f"`x` and `y` must have the same shape; got {x.shape} and {y.shape}.")
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"`x` must have shape (B, ...), with something in it; got {x.shape}.")
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    return x.astype(dtype), y.astype(dtype)


def _windowed(x: Array) -> Array:
    """Return the weighted mean of every window of x (B, H, W, C), (B, H - 10, W - 10, C)."""
    rows, columns = (jnp.asarray(_windows(size), x.dtype) for size in x.shape[1:3])
    x = jnp.einsum("ih,bhwc->biwc", rows, x, precision="highest")
    return jnp.einsum("jw,biwc->bijc", columns, x, precision="highest")


def _windows(size: int) -> np.ndarray:
    """Return the weights of each window along one axis, (size - 10, size)."""
    offsets = np.arange(size)[np.newaxis] - np.arange(size - WINDOW + 1)[:, np.newaxis]
    weights = np.exp(-0.5 * ((offsets - WINDOW // 2) / WIDTH) ** 2)
    weights = np.where((offsets >= 0) & (offsets < WINDOW), weights, 0.0)
    return weights / weights.sum(1, keepdims=True)
