"""One file of an image: PNG, JPEG or WebP, of any mode and size, to levels of one size.

In this order: the orientation that EXIF says is applied; 16 bits become the upper 8 of them;
transparency is laid on white; palettes, CMYK and the like become RGB or, where grey is wanted,
grey; it is resized, for a square by the short side, until the asked size just fits in, by Lanczos'
filter, which averages over what it makes smaller; the centre is cut out. Of an animation the first
picture counts. Colour profiles are not applied.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdiff.data.errors import UnreadableError
from jaxdiff.extras import needed_by

FORMATS = ("PNG", "JPEG", "WEBP")


def pillow() -> Any:
    """Import Pillow's Image, ready for use in threads.

    Raises:
        ImportError: if it is not installed, naming the extra.
    """
    with needed_by("jaxdiff.data.load_folder"):
        from PIL import Image
    Image.init()  # not by several threads at once, when they meet their first file
    return Image


def is_grey(path: str) -> bool:
    """Tell whether a file says that it is grey; only its head is read.

    A palette counts as colour, whichever colours it holds.

    Raises:
        UnreadableError: if it is no such image, naming it.
    """
    image_module = pillow()
    with _naming(path), image_module.open(path, formats=FORMATS) as image:
        return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")


def read_image(path: str, image_size: int | tuple[int, int], *, grey: bool) -> np.ndarray:
    """Read a file as the module's docstring says.

    Args:
        path: of the file.
        image_size: (H, W) of the result, or S for both.
        grey: whether one channel is wanted, not three.

    Returns:
        uint8 levels (H, W, C), C being 1 or 3.

    Raises:
        UnreadableError: if it is no such image, or damaged, naming it.
    """
    image_module = pillow()
    from PIL import ImageOps

    with _naming(path), image_module.open(path, formats=FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return _fitted(image_module, plain(image, "L" if grey else "RGB"), image_size)


def fitted(levels: np.ndarray, image_size: int) -> np.ndarray:
    """Return levels, uint8 (H, W, 1 or 3), resized to S x S as the module's docstring says."""
    image_module = pillow()
    image = image_module.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
    return _fitted(image_module, image, image_size)


def _fitted(image_module: Any, image: Any, image_size: int | tuple[int, int]) -> np.ndarray:
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    levels = np.asarray(_of_size(image_module, image, *size))
    return levels.reshape(*size, -1)


def plain(image: Any, mode: str) -> Any:
    """Return an opened image of any mode as one of "L" or "RGB"."""
    image_module = pillow()
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips at 255
        levels = np.asarray(image).astype(np.int64) >> 8
        image = image_module.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, "white")
        image = image_module.alpha_composite(white, image)
    return image.convert(mode)


def _of_size(image_module: Any, image: Any, height: int, width: int) -> Any:
    """Resize until a size fits in, and cut out the centre."""
    by_height = height * image.width >= width * image.height
    asked, side = (height, image.height) if by_height else (width, image.width)
    resized_to = tuple(round(each * asked / side) for each in image.size)
    left, top = (resized_to[0] - width) // 2, (resized_to[1] - height) // 2
    resized = image.resize(resized_to, image_module.Resampling.LANCZOS)
    return resized.crop((left, top, left + width, top + height))


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # decoders raise of every kind, and always about the file
        reason = str(error)
        if reason.startswith("cannot identify"):
            reason = "its content is of no such format"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise UnreadableError(
            f"{path} cannot be read as a PNG, JPEG or WebP image: {reason.rstrip('. ')}. Mend it "
            "or take it out of the folder; files whose names begin with a dot are passed over."
        ) from error
