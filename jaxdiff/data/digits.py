"""The TFDS builder of scikit-learn's 1,797 handwritten digits, which need no download.

Importing this module imports tensorflow_datasets and registers the builder under "digits".

8x8 images with 17 levels, 0..16 (each counts the dark pixels of a 4x4 block of a 32x32 bitmap), and
labels 0..9: the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten
Digits", UCI repository 1998, from 13 writers, none of whom wrote for its training part.

**The split** is random by row: hash order picks 297 rows for "test", the other 1,500 are "train";
it is not stratified. The file does not say who wrote which row, but neighbouring rows come from
the same writer, so every writer is in both parts: the test figures are about new digits of known
writers, and are better than they would be for new writers.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxdiff.data.errors import NotPreparedError

NUM_LEVELS = 17
NUM_ROWS = 1797
NUM_TEST = 297


def split_rows() -> dict[str, list[int]]:
    """Return the rows of `sklearn.datasets.load_digits` in each split, rising.

    The test rows are the 297 whose SHA-256 of "jaxdiff digits ROW" comes first: the same on every
    machine and with every version of every library.
    """
    order = sorted(
        range(NUM_ROWS), key=lambda row: hashlib.sha256(f"jaxdiff digits {row}".encode()).digest()
    )
    return {"train": sorted(order[NUM_TEST:]), "test": sorted(order[:NUM_TEST])}


class Digits(tfds.core.GeneratorBasedBuilder):
    """Records of "image" uint8 (8, 8, 1) in 0..16, "label" in 0..9 and "row" in 0..1796."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: Mapping[str, str] = {"1.0.0": "1,500 train and 297 test rows."}
    pkg_dir_path = None

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The 1,797 handwritten digits that scikit-learn carries, as 17 levels.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "row": tfds.features.Scalar(dtype=np.int32),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            metadata=tfds.core.MetadataDict({"num_levels": NUM_LEVELS}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager
        return {split: self._generate_examples(rows) for split, rows in split_rows().items()}

    def _generate_examples(self, rows: list[int]) -> Iterator[tuple[int, Any]]:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        levels = images.astype(np.uint8).reshape(NUM_ROWS, 8, 8, 1)
        for row in rows:
            yield row, {"image": levels[row], "label": int(labels[row]), "row": row}


def prepare(data_dir: pathlib.Path) -> pathlib.Path:
    """Write the set as array_record below `data_dir`, unless it is there.

    It is written beside its place and renamed into it, so what has the final name is complete.
    Where several processes prepare at once, the first to finish wins and the others use its set.
    A process killed half way leaves a folder `.digits-*`, which nothing reads and may be deleted.
    What another program left under the final name is neither used nor deleted.

    Args:
        data_dir: created where missing.

    Returns:
        The folder of the set, `data_dir`/digits/1.0.0.

    Raises:
        NotPreparedError: if that folder holds something else.
        OSError: if it cannot be written.
    """
    final = pathlib.Path(data_dir) / "digits" / str(Digits.VERSION)
    if _is_complete(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=".digits-", dir=data_dir))
    try:
        builder = Digits(data_dir=str(scratch), file_format="array_record")
        config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=1)
        # TFDS prints what it does and draws progress bars: noise in a program's output.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare(download_config=config)
        _rename(scratch / "digits" / final.name, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def _is_complete(folder: pathlib.Path) -> bool:
    return (folder / "dataset_info.json").exists()


def _rename(made: pathlib.Path, final: pathlib.Path) -> None:
    """Rename the finished folder, unless another process was first."""
    try:
        os.rename(made, final)
    except OSError as error:
        if _is_complete(final):
            return
        if not final.exists():
            raise
        raise NotPreparedError(
            f"{final} is in the way: it is not a complete data set. Remove it and try again."
        ) from error
