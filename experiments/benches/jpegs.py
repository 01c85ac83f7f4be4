"""A prepared TFDS set of JPEG images, written on the spot: what an input pipeline is tried on."""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

NAME = "jpegs"
NUM_CLASSES = 10


def write(
    folder: str | os.PathLike[str], num_examples: int, num_shards: int, *, size: int = 64
) -> None:
    """Write the split "train" of "jpegs", to be opened by `data.load_images("jpegs", "train")`.

    Example i is an image (size, size, 3) of smooth noise, a function of i alone, as a JPEG of
    quality 90, of 1.8 kB at 64 x 64; its label is i modulo 10.

    Args:
        folder: the data directory.
        num_examples: N.
        num_shards: how many files.
        size: the side of the images.
    """
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Jpegs(tfds.core.GeneratorBasedBuilder):
            """Smooth noise."""

            name = NAME
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = None

            def _info(self) -> Any:
                image = tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg")
                label = tfds.features.ClassLabel(num_classes=NUM_CLASSES)
                features = tfds.features.FeaturesDict({"image": image, "label": label})
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
                for i in range(num_examples):
                    yield i, {"image": jpeg(i, size), "label": i % NUM_CLASSES}

    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=num_shards)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        Jpegs(data_dir=os.fspath(folder), file_format="array_record").download_and_prepare(
            download_config=config
        )


def jpeg(number: int, size: int) -> bytes:
    """Return the file of an image."""
    from PIL import Image

    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    image.save(file := io.BytesIO(), "JPEG", quality=90)
    return file.getvalue()
