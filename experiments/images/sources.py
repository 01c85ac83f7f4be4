"""Where the images of a config come from: a data set by its name, or a folder of images.

A folder is recorded as the data `folder`, which lie in their `data_dir`: a run stays the same
wherever its folder is moved, as it does for a data set.
"""

import dataclasses
import os
from typing import Any

from experiments.common import options
from experiments.common.command import Refusal
from jaxdiff import data

FOLDER = "folder"
"""What `data` says where `data_dir` is a folder of images."""
NO_SPLIT = " Say by which split to judge, or train with --no-evaluate."
"""What would do where there is no split that judges."""


def absolute(data_dir: str | None) -> str | None:
    """Return where data lie, so that it can be found from any working folder."""
    if data_dir is None or "://" in data_dir:
        return data_dir
    return os.path.abspath(os.path.expanduser(data_dir))


def placed(config: Any) -> Any:
    """Return a config whose data, if they are a folder of images, are said as records say them.

    A folder is what begins as a path does; or what is there, if an image size is asked for.

    Args:
        config: a dataclass with `data`, `data_dir` and `image_size`.

    Raises:
        Refusal: if what is said of the data does not fit together.
    """
    name, folder = config.data, absolute(config.data)
    if name == FOLDER and config.data_dir is not None:
        return dataclasses.replace(config, data_dir=absolute(config.data_dir))
    is_there = config.image_size is not None and os.path.isdir(name)
    if name.startswith((".", "~", "/")) or os.path.isabs(name) or is_there:
        if config.data_dir is not None:
            raise Refusal(f"--data-dir: --data {name} is a folder itself; leave --data-dir out.")
        return dataclasses.replace(config, data=FOLDER, data_dir=folder)
    return dataclasses.replace(config, data_dir=absolute(config.data_dir))


def open_images(
    config: Any,
    split: str,
    option: str = "",
    *,
    recorded: bool = False,
    no_split: str = NO_SPLIT,
) -> data.Images:
    """Open a split of the config's images, or refuse.

    Args:
        config: what to open: a dataclass with `data`, `data_dir` and `image_size`.
        split: which part.
        option: the one that chose the split, if one did.
        recorded: whether the config's folder is that of an earlier start: where it is gone,
            $JAXDIFF_DATA_DIR says where the data are now.
        no_split: what would do where the split that the option chose is not there.

    Raises:
        Refusal: naming the option, what was got and the remedy.
    """
    config = placed(config)
    folder = config.data_dir
    if recorded and folder is not None and "://" not in folder and not os.path.isdir(folder):
        folder = _moved(config, folder)
    try:
        with options.naming(type(config), name="--data", path="--data", split=option or "--data"):
            if config.data != FOLDER or folder is None:
                size = config.image_size
                return data.load_images(config.data, split, data_dir=folder, image_size=size)
            if config.image_size is None:
                raise Refusal(
                    "--image-size must be given for a folder of images, such as --image-size 32: "
                    f"the side that those of {folder} are resized to."
                )
            return data.load_folder(folder, config.image_size, split=split)
    except Refusal as refusal:
        said = str(refusal).replace("`data_dir`", "--data-dir")
        of_split = option and said.startswith(option)
        remedy = no_split if of_split else _remedy(config, said, recorded=recorded)
        raise Refusal(said + remedy) from refusal.__cause__
    except OSError as error:
        raise Refusal(f"--data-dir {folder}: {error}") from error


def _moved(config: Any, folder: str) -> str | None:
    """Return where data are whose folder is gone; None says $JAXDIFF_DATA_DIR, by default."""
    now = os.environ.get("JAXDIFF_DATA_DIR")
    if now is None:
        return folder
    return None if config.data != FOLDER else os.path.join(now, os.path.basename(folder))


def _remedy(config: Any, said: str, *, recorded: bool) -> str:
    if recorded and config.data == FOLDER and "there is no folder" in said:
        return " If it was moved, say by $JAXDIFF_DATA_DIR which folder holds it now."
    if "load_folder" in said:
        return " On the command line: --data DIR --image-size N."
    if said.startswith("--data:") and os.path.isdir(config.data):
        return f" If the folder {config.data} is meant, give --image-size."
    if said.startswith("--data: `name` must be known"):
        return f" And there is no folder {absolute(config.data)}."
    return ""
