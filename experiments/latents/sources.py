"""Pictures with captions, as a config says them: scenes, a folder, or a prepared data set."""

import concurrent.futures
from typing import Any, Literal, Protocol

import numpy as np

from experiments.common.command import Refusal
from experiments.images import data as image_data
from experiments.images import sources as image_sources
from jaxdiff import data
from jaxdiff.data import Captioned

SCENES = "scenes"
"""What `data` says where the pictures are made."""
SCENE_SIZE = 32
"""The side of scenes unless told otherwise."""
EVAL_SPLIT = "test"
"""The split that judges unless told otherwise."""
NUM_LEVELS = 256
Part = Literal["train", "test"]

_TEST_SEED = 2**32
"""What the seed of scenes that judge is beyond that of those to train on: no run's is as large."""
_CHUNK = 1024


class DataConfig(Protocol):
    """The fields of a config that say what the pictures are."""

    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def data(self) -> str: ...  # noqa: D102
    @property
    def data_dir(self) -> str | None: ...  # noqa: D102
    @property
    def image_size(self) -> int | None: ...  # noqa: D102
    @property
    def eval_split(self) -> str: ...  # noqa: D102
    @property
    def num_scenes(self) -> int: ...  # noqa: D102
    @property
    def scene_shares(self) -> tuple[float, float, float]: ...  # noqa: D102


class Held:
    """Records with captions whose pictures were read once, into memory."""

    in_memory = True

    def __init__(self, records: Captioned) -> None:
        self._records, self.title = records, str(getattr(records, "title", SCENES))
        starts = range(0, len(records), _CHUNK)

        def read(first: int) -> np.ndarray:
            return records.rows(np.arange(first, min(first + _CHUNK, len(records))))["image"]

        with concurrent.futures.ThreadPoolExecutor() as pool:
            self._images = np.concatenate(list(pool.map(read, starts)))

    def __len__(self) -> int:
        return len(self._records)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return {"image": uint8 (B, H, W, C)} of examples `indices` (B,)."""
        return {"image": self._images[indices]}

    def captions(self, indices: np.ndarray) -> list[str]:
        """Return their captions."""
        return self._records.captions(indices)


def placed(config: Any) -> Any:
    """Return a config as its record holds it: where its pictures lie said outright.

    Raises:
        Refusal: if what is said of them does not fit together.
    """
    if config.data != SCENES:
        return image_sources.placed(config)
    if config.data_dir is not None:
        raise Refusal("--data-dir must be left out for scenes: they are made on the machine.")
    if config.eval_split != EVAL_SPLIT:
        raise Refusal("--eval-split must be left out for scenes: as many are made as are asked.")
    return config


def open_pictures(config: Any, part: Part, *, recorded: bool = False) -> Captioned:
    """Open the pictures of a config, with their captions.

    Args:
        config: a dataclass with the fields of :class:`DataConfig`.
        part: those to train on, or those that judge.
        recorded: whether the config's folder is that of an earlier start.

    Raises:
        Refusal: naming the option, what was got and the remedy.
    """
    if config.data == SCENES:
        return scenes_of(config, part)
    split, option = (config.eval_split, "--eval-split") if part == "test" else ("train", "")
    images = image_sources.open_images(
        config, split, option, recorded=recorded, no_split=" Say by which split to judge."
    )
    try:
        images.captions(np.arange(1))
    except ValueError as error:
        raise Refusal(f"--data: {error}") from error
    return images


def open_held_out(config: Any) -> Captioned:
    """Open the pictures that judge, at a start; say it on stderr if some are trained on."""
    held_out = open_pictures(config, "test", recorded=True)
    if isinstance(held_out, data.Images):
        image_data.warn_if_trained_on(held_out)
    return held_out


def scenes_of(
    config: DataConfig,
    part: Part,
    *,
    num: int | None = None,
    shares: tuple[float, float, float] | None = None,
    combinations: data.scenes.Combinations = "seen",
) -> data.scenes.Scenes:
    """Return the scenes of a config, or others of their size.

    Args:
        config: says which.
        part: "test" is of another seed.
        num: how many; as many as there are to train on unless given.
        shares: of the kinds of scenes; the config's unless given.
        combinations: of shapes and colours.
    """
    return data.scenes.Scenes(
        config.num_scenes if num is None else num,
        seed=config.seed + (_TEST_SEED if part == "test" else 0),
        size=config.image_size or SCENE_SIZE,
        shares=config.scene_shares if shares is None else shares,
        combinations=combinations,
    )


def in_memory(pictures: Captioned) -> Captioned:
    """Return pictures read once where each reading would make them anew, as it does scenes."""
    return Held(pictures) if isinstance(pictures, data.scenes.Scenes) else pictures


def shape_of(pictures: Captioned) -> tuple[int, int, int]:
    """Return (H, W, C) of one picture."""
    height, width, channels = pictures.rows(np.arange(1))["image"].shape[1:]
    return height, width, channels
