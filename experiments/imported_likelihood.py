r"""The likelihood of images under published weights, image by image.

    python -m experiments.imported_likelihood --weights DIR --images FOLDER --prompt "a photo" \
        --out FILE.json

A latent model is judged in its latents, in nats per latent dimension, which say nothing of bits of
pixels; a model of pixels in bits per dimension. Both are of the probability flow, whose density is
the network's own, without a bound in between: what other libraries do not give of these weights.
"""

import dataclasses
import json
import math
import sys
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments.common import command, flows, options
from experiments.common.command import Refusal, refusing
from experiments.common.devices import Devices
from experiments.common.evaluations import finite
from experiments.pretrained import likelihoods
from experiments.pretrained.conditioning import taken
from experiments.pretrained.likelihoods import Found, Protocol
from experiments.pretrained.weights import check_alone, open_weights
from experiments.pretrained.weights import image_size as own_size
from jaxdiff import data, files
from jaxdiff.pretrained import Denoising
from jaxdiff.training import distributed

IMAGES, PLAIN = "images", "arr_0"
"""Names under which an .npz holds images."""
DAMAGE = (zipfile.BadZipFile, zlib.error)


def likelihood(
    weights: str,
    images: str,
    out: str,
    devices: tyro.conf.OmitArgPrefixes[Devices],
    protocol: tyro.conf.OmitArgPrefixes[Protocol],
    prompt: str | None = None,
    label: int | None = None,
    num: int | None = None,
    image_size: int | None = None,
    dtype: Literal["float32", "float64"] = "float32",
    autoencoder: str | None = None,
) -> None:
    """Take the likelihood of images under published weights, into a JSON file.

    Args:
        weights: A folder in the layout of diffusers, a file of DiT or SiT, or a hub id.
        images: A folder of images, or an .npz with `images` uint8 (N, H, W, C) and, if they have
            them, `labels` or `prompts` (N,).
        out: The JSON to write: mean, standard error, each image, and how they were found.
        devices: Which devices share the images; the numbers are the same for any.
        protocol: How.
        prompt: Given to the network with every image; "" is that of no prompt.
        label: The class of every image, as the network counts them; the number of classes is that
            of none. By default the labels of the images.
        num: How many images, from the first; all unless given.
        image_size: Side that a folder's images are resized to; by default as the network was
            trained.
        dtype: Of parameters and networks. There is no bfloat16: its rounding would be measured.
        autoencoder: Folder of the autoencoder, for weights without one or in place of theirs.
    """
    options.judge(protocol)
    options.check_counts(num=num, image_size=image_size)
    path = command.path_of(out, "--out")
    if path.suffix != ".json":
        raise Refusal(f"--out must end in .json; got {out}.")
    devices.start()
    with jax.enable_x64(dtype == "float64"):
        loaded = open_weights(
            weights, autoencoder=autoencoder, dtype=dtype, devices=devices.local()
        )
        check_alone(loaded)
        opened, prompts = open_images(images, image_size, loaded, num)
        rows = given(loaded, opened, prompts, prompt, label)
        try:
            found = likelihoods.measure(loaded, opened, rows, protocol, devices.local())
        except flows.Unsolved as reason:
            raise Refusal(f"The likelihood is not known: {reason}.") from reason
    record = {
        **summary(found),
        "protocol": {"weights": weights, "images": images, "dtype": dtype, **found.said},
        "per_image": per_image(found, opened, rows),
    }
    if distributed.is_main():
        with refusing(OSError, say=f"--out {out} cannot be written: "):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, json.dumps(record, indent=2) + "\n")
        print(said(found, record))


def open_images(
    name: str, image_size: int | None, loaded: Denoising, num: int | None
) -> tuple[data.Images, list[str] | None]:
    """Open the images, and the prompts that an .npz has of them.

    Args:
        name: of a folder, or of an .npz.
        image_size: that a folder's images are resized to.
        loaded: says that size by default.
        num: how many; all unless given.

    Raises:
        Refusal: naming the option.
    """
    if command.path_of(name, "--images").suffix == ".npz":
        if image_size is not None:
            raise Refusal("--image-size is for a folder; the images of an .npz have their size.")
        return _of_arrays(command.path_of(name, "--images"), num)
    try:
        side = min(own_size(loaded, image_size, image_size))
    except Refusal as refusal:
        said = str(refusal).replace("--height and --width", "--height")
        raise Refusal(said.replace("--height", "--image-size")) from refusal
    with refusing(ValueError, FileNotFoundError, say="--images: "):
        found = data.load_folder(name, side, split="all")
    count = min(len(found), num or len(found))
    paths = (found.paths or ())[:count]
    return dataclasses.replace(found, num_examples=count, paths=paths), None


def _of_arrays(path: files.Path, num: int | None) -> tuple[data.Images, list[str] | None]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            named = next((each for each in (IMAGES, PLAIN) if each in file.files), None)
            if named is None:
                raise ValueError(f"it has no `{IMAGES}`")
            found = {each: file[each][:num] for each in file.files}
        labels, prompts = found.get("labels"), found.get("prompts")
        opened = data.Images.from_arrays(found[named], labels, name=path.stem)
        if prompts is not None and (prompts.shape != (len(opened),) or prompts.dtype.kind != "U"):
            raise ValueError(f"`prompts` must be {len(opened)} texts")
    except (OSError, TypeError, ValueError, LookupError, EOFError, *DAMAGE) as error:
        raise Refusal(f"--images {path} cannot be read: {str(error).rstrip('.')}.") from error
    return opened, None if prompts is None else [str(each) for each in prompts]


def given(
    loaded: Denoising,
    images: data.Images,
    prompts: Sequence[str] | None,
    prompt: str | None,
    label: int | None,
) -> list[Any]:
    """Return what the network is given for each image: the option's for all, or the image's own.

    Raises:
        Refusal: naming the option, if there is neither, or it is not the network's.
    """
    takes, num, count = taken(loaded), len(images), loaded.num_classes or 0
    for option, value, wanted in (("--prompt", prompt, "text"), ("--label", label, "classes")):
        if value is not None and takes != wanted:
            raise Refusal(f"{option} must be left out: these weights take {takes}.")
    if takes == "nothing":
        return [None] * num
    if takes == "text":
        if prompt is None and prompts is None:
            raise Refusal(
                '--prompt must be given, with "" for none: these weights are of images of text, '
                "and --images have no `prompts`."
            )
        return [prompt] * num if prompt is not None else list(prompts or ())
    if label is None and images.labels is None:
        raise Refusal(
            f"--label must be given, with {count} for none: these weights are of images of classes "
            "and --images have no `labels`."
        )
    if label is None and images.class_names is not None and len(images.class_names) != count:
        raise Refusal(
            f"--label must be given: --images have {len(images.class_names)} classes and the "
            f"weights {count}. Or give an .npz with `labels` as the network counts them."
        )
    labels = images.labels if label is None else np.full(num, label)
    if labels is None or not 0 <= labels.min() <= labels.max() <= count:
        raise Refusal(
            f"--label and the labels of --images must be in 0..{count}, {count} for none."
        )
    return labels.tolist()


def summary(found: Found) -> dict[str, Any]:
    """Return mean and standard error; null where they are not known or not finite."""
    num = len(found.values)
    numbers = {found.unit: float(found.values.mean())}
    if num > 1:
        numbers[f"{found.unit}_stderr"] = float(found.values.std(ddof=1) / math.sqrt(num))
    return {
        **dict.fromkeys((found.unit, f"{found.unit}_stderr")),
        **finite(numbers),
        "num_images": num,
        "num_dims": found.num_dims,
        "not_finite": int((~np.isfinite(found.values)).sum()),
    }


def per_image(found: Found, images: data.Images, rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Return each image's name, number and what the network was given."""
    names = images.paths or range(len(images))
    return [
        {
            "image": name,
            found.unit: float(value) if math.isfinite(value) else None,
            **({} if each is None else {"given": each}),
        }
        for name, value, each in zip(names, found.values, rows, strict=True)
    ]


def said(found: Found, record: dict[str, Any]) -> str:
    """Say the result in a line."""
    mean, error = record[found.unit], record[f"{found.unit}_stderr"]
    if mean is None:
        return f"{record['not_finite']} of {record['num_images']} images have no finite likelihood."
    spread = "" if error is None else f" +- {error:.4f}"
    return (
        f"{mean:.4f}{spread} {found.unit.replace('_', ' ')}, {record['num_images']} images of "
        f"{found.num_dims} numbers"
    )


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("imported_likelihood", likelihood, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
