"""One file of an image: PNG, JPEG or WebP, of any mode and size, to levels of one size.

In this order: the orientation that EXIF says is applied; 16 bits become the upper 8 of them;
transparency is laid on white; palettes, CMYK and the like become RGB or, where grey is wanted,
grey; the short side is resized to the asked size by Lanczos' filter, which averages over what it
makes smaller; the centre is cut out. Of an animation the first picture counts. Colour profiles are
not applied.
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


def read_image(path: str, image_size: int, *, grey: bool) -> np.ndarray:
    """Read a file as the module's docstring says.

    Args:
        path: of the file.
        image_size: S, the side of the result.
        grey: whether one channel is wanted, not three.

    Returns:
        uint8 levels (S, S, C), C being 1 or 3.

    Raises:
        UnreadableError: if it is no such image, or damaged, naming it.
    """
    image_module = pillow()
    from PIL import ImageOps

    with _naming(path), image_module.open(path, formats=FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        plain = _plain(image_module, image, "L" if grey else "RGB")
        levels = np.asarray(_square(image_module, plain, image_size))
        return levels.reshape(image_size, image_size, 1 if grey else 3)


def _plain(image_module: Any, image: Any, mode: str) -> Any:
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips at 255
        levels = np.asarray(image).astype(np.int64) >> 8
        image = image_module.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, "white")
        image = image_module.alpha_composite(white, image)
    return image.convert(mode)


def _square(image_module: Any, image: Any, image_size: int) -> Any:
    """Resize by the short side and cut out the centre."""
    short = min(image.size)
    width, height = (round(side * image_size / short) for side in image.size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    resized = image.resize((width, height), image_module.Resampling.LANCZOS)
    return resized.crop((left, top, left + image_size, top + image_size))


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
