"""Open a data set by its name, without TensorFlow and without a network."""

import difflib
import os
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdiff import checks
from jaxdiff.data import examples, texts
from jaxdiff.data.errors import NotPreparedError
from jaxdiff.data.extras import require
from jaxdiff.data.images import Images
from jaxdiff.data.mirror import local
from jaxdiff.data.shards import Shards, shards_of

DIGITS = "digits"


def default_data_dir() -> str:
    """Return $JAXDIFF_DATA_DIR, else $XDG_CACHE_HOME/jaxdiff, else ~/.cache/jaxdiff."""
    if chosen := os.environ.get("JAXDIFF_DATA_DIR"):
        return os.path.expanduser(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.expanduser(os.path.join(cache, "jaxdiff"))


def load_images(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    text: str | None = None,
    image_size: int | None = None,
) -> Images:
    """Open a split of "digits", or of any TFDS image set prepared as array_record.

    "digits" is prepared at its first use (see `digits`); every other set must have been prepared.
    Nothing is ever downloaded. "image" and, if there is one, "label" are read from each record.
    Images must be uint8, and of one size unless `image_size` says which. Metadata "num_levels",
    which a builder of one's own can give, says how many levels there are, by default 256. A feature
    of texts gives captions, read when they are asked for, each UTF-8 and not empty: one of an
    image, or a sequence of them, of which the first counts, as in "coco_captions".

    Args:
        name: as in TFDS: "mnist", "cifar10", "mnist_corrupted/spatter", "mnist:3.0.1".
        split: "train", "test", or a part such as "train[:90%]".
        data_dir: where the sets lie, a local directory; by default `default_data_dir()`. What lies
            in a bucket is copied to one by `mirror`, or mounted.
        text: the feature of the captions, such as "caption" or, within another, "captions/text". By
            default the only one of such a name, else the only one of texts but for names of files;
            where there is none or several, the images have no captions.
        image_size: S, the side of the images: the short side is resized, the centre cut out, as
            `load_folder` does. By default they are taken as they are.

    Raises:
        ImportError: if tensorflow-datasets or array_record is not installed.
        NotPreparedError: a FileNotFoundError and ValueError, if the set is not there, in a bucket
            or not in a format that can be read, naming the directory and the command that helps.
        TypeError: if the name is no text or `image_size` no whole number.
        ValueError: if the name, the split or `text` is unknown, or the records are not such images.
    """
    _check_name(name)
    if image_size is not None:
        image_size = checks.count("image_size", image_size)
    tfds = require("tensorflow_datasets")
    require("array_record")
    given = default_data_dir() if data_dir is None else data_dir
    folder = local("data_dir", given, name.partition(":")[0])
    try:
        if name == DIGITS:
            _prepare_digits(folder)
        return _open(tfds, name, split, folder, text, image_size)
    except OSError as error:
        if isinstance(error, NotPreparedError) or error.errno is None:
            raise
        raise NotPreparedError(
            f"`data_dir` {folder} cannot be used: {error.strerror} ({error.filename}). Say by "
            "`data_dir` or $JAXDIFF_DATA_DIR where data sets lie."
        ) from error


def _check_name(name: Any) -> None:
    """Refuse what cannot be the name of a data set: another type, or a folder of images."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"`name` must be the name of a data set, such as {DIGITS}; got {name!r}.")
    is_path = name.startswith(("/", "./", "../", "~", ".\\")) or (
        os.sep in name and os.path.isdir(name)
    )
    if is_path or name.lower().replace("_", "") in ("imagefolder", "folder"):
        raise ValueError(
            f"`name` must be the name of a TFDS data set, such as {DIGITS} or mnist; got {name!r}. "
            "A folder of images is opened by data.load_folder(path, image_size); one that holds "
            "prepared data sets is `data_dir`."
        )


def _open(
    tfds: Any, name: str, split: str, folder: str, text: str | None, image_size: int | None
) -> Images:
    builder = _builder(tfds, name, folder)
    place = str(builder.data_path)
    if not (builder.data_path / "dataset_info.json").exists():
        raise NotPreparedError(
            f"{name} is not prepared in {folder} (there is no {place}). Prepare it once, where "
            f"there is a network:\n{_command(builder, folder)}\n"
            "or say by `data_dir` or $JAXDIFF_DATA_DIR where it lies."
        )
    formats = {str(found.value) for found in builder.info.available_file_formats()}
    if not formats & {"array_record", "parquet"}:
        other = os.path.join(folder, "array_record")
        raise NotPreparedError(
            f"{name} in {place} is stored as {' and '.join(sorted(formats))}, which cannot be read "
            f"without TensorFlow. Prepare it as array_record in another directory:\n"
            f"{_command(builder, other)}\n"
            f"and give that directory as `data_dir` or $JAXDIFF_DATA_DIR."
        )
    num_levels = int((builder.info.metadata or {}).get("num_levels", 256))
    if image_size is not None and num_levels != 256:
        raise ValueError(
            f"`image_size` must be left out for {name}: between its {num_levels} levels lie none."
        )
    shape, class_names = _features(tfds, name, builder.info.features, image_size)
    fields = ["image"] if class_names is None else ["image", "label"]
    path = texts.find(tfds, name, builder.info.features, text)
    return Images(
        name=name,
        split=split,
        source=(source := _source(tfds, builder, name, split, fields, image_size)),
        num_examples=len(source),
        shape=shape,
        num_levels=num_levels,
        num_classes=None if class_names is None else len(class_names),
        location=place,
        class_names=class_names,
        texts=None if path is None else _texts(tfds, builder, name, split, path),
    )


def _prepare_digits(folder: str) -> None:
    # Imports TFDS, hence not before `require` has looked for it.
    from jaxdiff.data.digits import prepare

    prepare(pathlib.Path(folder))


def _builder(tfds: Any, name: str, folder: str) -> Any:
    """Return the TFDS builder of a known name; it may not be prepared."""
    try:
        return tfds.builder(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        reason = f"`name` must be known: there is no data set {name!r} in {folder} or in TFDS."
    except (AssertionError, ImportError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        reason = f"`name` must be known: TFDS cannot open {name!r}: {first.split(' Here are ')[0]}"
    known = [DIGITS, *tfds.list_builders(with_community_datasets=False)]
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=3)
    raise ValueError(reason + (f" Did you mean {' or '.join(near)}?" if near else ""))


def _command(builder: Any, folder: str) -> str:
    """Return the lines that say how to prepare a set that TFDS knows.

    Not `tfds build`: in TFDS 4.9.10 that also needs apache_beam and mlcroissant.
    """
    config = builder.builder_config
    name = builder.name if config is None else f"{builder.name}/{config.name}"
    code = (
        f"import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={folder!r}, "
        "file_format='array_record').download_and_prepare()"
    )
    quoted = shlex.quote(code) if set('"$`\\!') & set(code) else f'"{code}"'
    return f"    pip install tensorflow    # only to prepare it\n    python -c {quoted}"


def _features(
    tfds: Any, name: str, features: Any, image_size: int | None
) -> tuple[tuple[int, int, int], tuple[str, ...] | None]:
    """Return the shape (H, W, C) and the names of the classes, None without labels."""
    found = sorted(features) if hasattr(features, "keys") else [str(features)]
    if "image" not in found:
        raise ValueError(f'{name} has no feature "image"; it has {", ".join(found)}.')
    shape, dtype = tuple(features["image"].shape), np.dtype(features["image"].np_dtype)
    if image_size is not None and len(shape) == 3:
        shape = (image_size, image_size, examples.shape_of(features["image"])[2])
    if dtype != np.uint8 or len(shape) != 3:
        raise ValueError(
            f"The images of {name} must be uint8 of shape (H, W, C); they are {dtype} of shape "
            f"{shape}. Make them such and wrap them by Images.from_arrays."
        )
    if None in shape:
        raise ValueError(
            f"`image_size` must be given for {name}, whose images are of many sizes: the side that "
            "they are resized to."
        )
    if image_size is not None and shape[2] not in (1, 3):
        raise ValueError(
            f"`image_size` must be left out for {name}: its images have {shape[2]} channels, and "
            "those of 1 or 3 can be resized."
        )
    label: Any = features["label"] if "label" in found else None
    if isinstance(label, tfds.features.ClassLabel):
        names = label.names if len(label.names) == label.num_classes else range(label.num_classes)
        return (shape[0], shape[1], shape[2]), tuple(map(str, names))
    return (shape[0], shape[1], shape[2]), None


def _texts(tfds: Any, builder: Any, name: str, split: str, path: texts.Path) -> texts.Texts:
    """Return the captions of a split, of whose records no image is decoded."""
    source = _source(tfds, builder, name, split, path[:1])
    return texts.Texts(source, path, f"{name}/{split}", str(builder.data_path))


def _source(
    tfds: Any,
    builder: Any,
    name: str,
    split: str,
    fields: Sequence[str],
    image_size: int | None = None,
) -> Any:
    """Return random access to some fields of the records of a split."""
    place, splits = str(builder.data_path), builder.info.splits
    for whole in (part.split("[")[0].strip() for part in split.split("+")):
        if whole not in splits and whole != "all":
            near = difflib.get_close_matches(whole, list(splits), n=1)
            raise ValueError(
                f"`split` must be one of {', '.join(splits)} of {name}, or a part like "
                f"train[:90%]; got {split!r}." + (f" Did you mean {near[0]}?" if near else "")
            )
    try:
        source = builder.as_data_source(split=split)
    except ValueError as error:  # of no examples, or in the brackets
        reason = (str(error).splitlines() or [""])[-1]
        raise ValueError(f"`split` {split!r} of {name} in {place} is refused: {reason}") from error
    if not isinstance(source, tfds.core.data_sources.array_record.ArrayRecordDataSource):
        if image_size is not None:
            raise ValueError(
                f"`image_size` must be left out for {name}, which is not stored as array_record."
            )
        return source
    decode = examples.decoder(tfds, builder.info.features, fields, image_size)
    return Shards(list(shards_of(tfds, source)), decode, f"{name}/{split}", place)
