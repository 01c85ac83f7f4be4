"""Draw images by published weights: of a prompt, of a class, or of nothing; or edit an image.

    python -m experiments.text_to_image --weights DIR --prompt "a cat in the rain" --out cat.png
    python -m experiments.text_to_image --weights DIR --prompt "a cat" --num 50000 --out cats
    python -m experiments.text_to_image --weights DIR --label 207 --num 16 --out dogs.png
    python -m experiments.text_to_image --weights DIR --prompt "a cat" --init-image dog.png \
        --strength 0.6 --out cat.png
    python -m experiments.text_to_image --weights DIR --prompt "a cat" --init-image room.png \
        --mask sofa.png --out cat.png

The weights are a pipeline in the layout of diffusers, or a single file beside `--autoencoder`; see
`jaxdiff.pretrained`. Image i depends on them, on what is asked, on the seed and i only.
"""

import dataclasses
import sys
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments.common import command, options
from experiments.common.devices import Devices
from experiments.common.methods import MethodName
from experiments.images.sample_folders import Out
from experiments.pretrained.conditioning import Asked, Guidance, Guided, condition
from experiments.pretrained.editing import Editing, edit
from experiments.pretrained.generator import make_draw
from experiments.pretrained.weights import image_size, num_channels, open_weights
from jaxdiff import files, plotting
from jaxdiff.data.stored import fingerprint

FILE_BYTES = 2**26
"""How much of images is kept in one file of a folder."""


def text_to_image(
    weights: str,
    out: str,
    devices: tyro.conf.OmitArgPrefixes[Devices],
    asked: tyro.conf.OmitArgPrefixes[Asked],
    guiding: tyro.conf.OmitArgPrefixes[Guidance],
    editing: tyro.conf.OmitArgPrefixes[Editing],
    sampler: MethodName = "ddim",
    num_steps: int = 50,
    num: int = 1,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    autoencoder: str | None = None,
    batch_size: int = 4,
    quiet: bool = False,
) -> None:
    """Draw images by published weights, into one PNG or, by the thousand, into a folder.

    Args:
        weights: A folder in the layout of diffusers, a file of DiT or SiT, or a hub id.
        out: The PNG to write, or a folder, filled file by file: the same command goes on.
        devices: Which devices share the images; they are the same for any.
        asked: What they are of.
        guiding: How far they lean towards it.
        editing: What they begin from.
        sampler: The method.
        num_steps: Steps from noise to data.
        num: How many images.
        height: Of an image in pixels; by default as the network was trained.
        width: Likewise.
        seed: Of the noise; image i depends on the weights, what is asked, seed and i only.
        dtype: Of parameters and networks; the sampler computes in float32.
        autoencoder: Folder of the autoencoder, for weights without one or in place of theirs.
        batch_size: Images that a device draws at once: for speed and memory; they stay the same.
        quiet: Show no progress bar.
    """
    command.check_seed(seed)
    options.check_counts(num=num, num_steps=num_steps, batch_size=batch_size)
    where = Out.asked(out)
    devices.start()
    loaded = open_weights(weights, autoencoder=autoencoder, dtype=dtype, devices=devices.local())
    guided = Guided(loaded, guiding, guiding.scale(loaded))
    asked.check(loaded, guided.scale)
    editing.check(loaded)
    size = image_size(loaded, height, width)
    edited = edit(loaded, editing, size)
    conditioning = condition(loaded, asked, size)
    labels = conditioning.labels(num)
    draw = make_draw(
        guided,
        conditioning,
        jax.random.key(seed),
        labels,
        size,
        sampler=sampler,
        num_steps=num_steps,
        edit=edited,
        devices=devices.local(),
        at_once=batch_size,
    )

    def record() -> dict[str, Any]:
        networks = loaded.params, loaded.autoencoder, loaded.text
        params = [getattr(each, "params", each) for each in networks if each is not None]
        return {
            "weights": fingerprint(*params),
            "dtype": dtype,
            **dataclasses.asdict(asked),
            "sampler": sampler,
            "num_steps": num_steps,
            "seed": seed,
            "num": num,
            "size": list(size),
            "guidance": None if guided.scale == 1.0 else guiding.record_of(guided.scale),
            "edit": None if edited is None else edited.record(),
        }

    shape = *size, 3 if loaded.autoencoder is not None else num_channels(loaded)
    per_file = max(1, min(1024, FILE_BYTES // int(np.prod(shape))))
    where.write(
        record, draw, labels, shape, progress=not quiet, per_file=per_file, save=save_picture
    )


def save_picture(path: files.Path, images: np.ndarray) -> None:
    """Save one image as it is, and several side by side."""
    if len(images) == 1:
        plotting.save_image(path, images[0])
    else:
        plotting.save_sheet(path, images, num_columns=min(4, len(images)))


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("text_to_image", text_to_image, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
