"""Images that begin from another one, or keep what a mask leaves of it.

An image is resized until the size asked for just fits in, and its centre cut out. With a mask,
white where to paint, its black part is kept: in the latents at each step, and pixel by pixel at the
end. A network made for inpainting is shown the mask and the rest of the image instead.
"""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common.command import Refusal, refusing
from experiments.pretrained.weights import factor, from_levels, num_beside, num_channels
from jaxdiff.data import UnreadableError
from jaxdiff.data.decoding import read_image
from jaxdiff.pretrained import Denoising

STRENGTH = 0.8
"""How much noise an image is begun with where it is not said; with a mask all of it, 1."""


@dataclasses.dataclass(frozen=True)
class Editing:
    """Which image the others begin from; none unless given."""

    init_image: str | None = None
    """A PNG, JPEG or WebP to begin from, resized and its centre cut out."""
    strength: float | None = None
    """The time of the noise that it is begun with, a share of all: 0 leaves it as the autoencoder
    makes it, 1 leaves little of it. That share of the steps is taken. 0.8 unless given, with a
    mask 1."""
    mask: str | None = None
    """An image of which is white what is to be painted; the rest of --init-image is kept."""

    def check(self, loaded: Denoising) -> None:
        """Refuse options that do not go together, or not with the weights.

        Raises:
            Refusal: naming the option.
        """
        for option, given in (("--strength", self.strength), ("--mask", self.mask)):
            if given is not None and self.init_image is None:
                raise Refusal(f"{option} needs --init-image, the image that it is of.")
        if self.strength is not None and not 0.0 <= self.strength <= 1.0:
            raise Refusal(f"--strength must be in [0, 1]; got {self.strength}.")
        beside = num_beside(loaded)
        if beside and beside != num_channels(loaded) + 1:
            raise Refusal(
                f"--weights: the network takes {beside} channels beside what it denoises, which is "
                "not that of inpainting. Call it from Python."
            )
        if beside and (self.init_image is None or self.mask is None):
            raise Refusal("--init-image and --mask must be given: these weights are of inpainting.")

    @property
    def share(self) -> float:
        """The strength, where it is not given too."""
        if self.init_image is None:
            return 1.0
        if self.strength is None:
            return STRENGTH if self.mask is None else 1.0
        return self.strength


class Edit(NamedTuple):
    """An image to begin from.

    Attributes:
        levels: uint8 (H, W, C).
        x0: what the network would make of it, (1, h, w, c): latents or pixels.
        strength: in [0, 1].
        keep: which pixels are kept, bool (H, W, 1); None without a mask.
        known: where x0 is kept at each step, bool (1, h, w, 1); None where it is not.
        beside: what a network made for inpainting is shown, (1, h, w, 1 + c).
    """

    levels: np.ndarray
    x0: np.ndarray
    strength: float
    keep: np.ndarray | None = None
    known: np.ndarray | None = None
    beside: np.ndarray | None = None

    @property
    def covers(self) -> bool:
        """Whether what is made begins with the image under its noise, all of it."""
        return self.keep is None or self.strength < 1.0

    def rows(self, num: int) -> dict[str, np.ndarray]:
        """Return what sampling needs of it, by row."""
        parts = {"x0": self.x0, "known": self.known}
        return {
            name: np.broadcast_to(part, (num, *part.shape[1:]))
            for name, part in parts.items()
            if part is not None
        }

    def pasted(self, levels: np.ndarray) -> np.ndarray:
        """Return images, uint8 (N, H, W, C), with the pixels that are kept."""
        return levels if self.keep is None else np.where(self.keep, self.levels, levels)

    def record(self) -> dict[str, Any]:
        """Return what images that are made of it are recorded with."""
        arrays = {"init_image": self.levels, "mask": self.keep}
        digests = {
            name: None if array is None else hashlib.sha256(array.tobytes()).hexdigest()
            for name, array in arrays.items()
        }
        return {"strength": self.strength, **digests}


def edit(loaded: Denoising, editing: Editing, size: tuple[int, int]) -> Edit | None:
    """Read and encode what images begin from; None if that is noise alone.

    Args:
        loaded: the weights.
        editing: what is asked.
        size: (H, W) of the images.

    Raises:
        Refusal: if a file cannot be read.
    """
    if editing.init_image is None:
        return None
    grey = loaded.autoencoder is None and num_channels(loaded) == 1
    levels = _read("--init-image", editing.init_image, size, grey=grey)
    x = from_levels(levels)[None]
    x0 = encode(loaded, x)
    if editing.mask is None:
        return Edit(levels, x0, editing.share)
    paint = _read("--mask", editing.mask, size, grey=True) >= 128
    if not num_beside(loaded):
        return Edit(levels, x0, editing.share, ~paint, _known(paint, factor(loaded))[None])
    masked = encode(loaded, np.where(paint, np.float32(0.0), x))
    small = paint[:: factor(loaded), :: factor(loaded)][None].astype(masked.dtype)
    beside = np.concatenate([small, masked], axis=-1)  # the order, and the size, of its training
    return Edit(levels, x0, editing.share, ~paint, None, beside)


def encode(loaded: Denoising, x: np.ndarray) -> np.ndarray:
    """Return what the network makes of images x (B, H, W, C): means of latents, or x itself."""
    if loaded.autoencoder is None:
        return x
    mean, _ = jax.jit(loaded.autoencoder.encode)(loaded.autoencoder.params, x)
    return np.asarray(mean)


def _known(paint: np.ndarray, by: int) -> np.ndarray:
    """Return the latents none of whose pixels are to be painted, (h, w, 1)."""
    height, width, _ = paint.shape
    blocks = paint.reshape(height // by, by, width // by, by, 1)
    return np.logical_not(np.max(blocks, axis=(1, 3)))


def _read(option: str, path: str, size: tuple[int, int], *, grey: bool) -> np.ndarray:
    with refusing(UnreadableError, say=f"{option}: "):
        return read_image(path, size, grey=grey)
