"""What the scripts of this folder share with the tests: how a golden is made, kept and read.

A golden is a small `.npz`: the config of a model, the names and shapes of its weights, inputs and
what the source made of them in float64. The weights are not in it: each follows from its name,
its shape and a seed by SHAKE-256, the same for all time, and is exact in float32.

A script of this folder has one function a case and hands them to :func:`main`:

    def tiny(seed, larger):
        config = {...}
        model = filled(Source(**config), seed)          # torch, in float64
        x = drawn("x", (2, 3, 8, 8 + 4 * larger), seed)
        return golden(config, model, seed, {"x": last(x)}, {"y": last(model(torch.tensor(x)))})

    def published():
        return {"model_large": shapes_of(lambda: Source(**what_its_config_json_says))}

    if __name__ == "__main__":
        main({"model_tiny": tiny}, published)

and is run from the folder `tests`, in the environment that `make .venv-peers/made` makes:

    ../.venv-peers/bin/python -m peers.model [--out FOLDER] [--seed N] [--larger]
    ../.venv-peers/bin/python -m peers.model --keys [--out FOLDER]

The first writes goldens, the second the lists of the weights of published files, `name sizes` a
line. `tests/test_pretrained_model.py`, of the name of the script, holds jaxdiff to both, by
:func:`read` and :func:`read_keys`. `tests/test_peers.py` writes all goldens afresh, larger and of
another seed, and lets those tests run on them, by the environment variable JAXDIFF_GOLDENS.
"""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent / "goldens"
KEYS = Path(__file__).parent / "keys"


class Golden(NamedTuple):
    """What a source made of its inputs.

    Attributes:
        config: as in the model's config.json.
        shapes: of the weights, by name, as the source has them.
        seed: of the weights.
        arrays: inputs and outputs, by name; images have their channels last.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    seed: int
    arrays: dict[str, np.ndarray]

    def weights(self) -> dict[str, np.ndarray]:
        """Make the weights, in float32 and the source's layout."""
        return {name: weight(name, shape, self.seed) for name, shape in self.shapes.items()}


def uniform(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw multiples of 2^-15 in [-1, 1) that follow from the arguments alone; float32."""
    size = math.prod(shape)
    data = hashlib.shake_256(f"{seed}/{name}".encode()).digest(2 * size)
    return (np.frombuffer(data, "<i2").astype(np.float32) / 2**15).reshape(shape)


def weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw a weight: a bias about 0, other vectors about 1, arrays by what they sum over."""
    values = uniform(name, shape, seed)
    if len(shape) < 2:
        return values / 4 if name.endswith("bias") else 1 + values / 4
    fan_in = math.prod(shape[1:])
    return values * np.float32(2.0 ** round(math.log2(math.sqrt(3 / fan_in))))


def drawn(name: str, shape: tuple[int, ...], seed: int, scale: float = 2.0) -> np.ndarray:
    """Draw an input in [-scale, scale), float64."""
    return uniform(f"input {name}", shape, seed).astype(np.float64) * scale


def integers(name: str, shape: tuple[int, ...], seed: int, high: int) -> np.ndarray:
    """Draw whole numbers in [0, high), int64."""
    return np.floor((drawn(name, shape, seed, 0.5) + 0.5) * high).astype(np.int64)


def filled(model: Any, seed: int) -> Any:
    """Give a torch module the weights of the seed, in float64, ready to be evaluated."""
    import torch

    model = model.double().eval().requires_grad_(False)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(weight(name, tuple(value.shape), seed)))
    return model


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a torch module's weights by name."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def shapes_of(make: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a torch module's weights without making them."""
    import torch

    with torch.device("meta"):
        return shapes(make())


def last(x: Any) -> np.ndarray:
    """Return images (B, C, H, W), torch's or NumPy's, as (B, H, W, C)."""
    return np.moveaxis(np.asarray(x), 1, -1)


def golden(
    config: Mapping[str, Any],
    model: Any,
    seed: int,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
) -> Golden:
    """Put together what a filled module made of its inputs."""
    arrays = {name: np.asarray(value) for name, value in {**inputs, **outputs}.items()}
    return Golden(dict(config), shapes(model), seed, arrays)


def write(path: Path, case: Golden) -> None:
    """Write a golden, the same bytes for the same arrays."""
    text = json.dumps([case.config, case.shapes, case.seed])
    np.savez_compressed(path, golden=np.asarray(text), **case.arrays)


def read(name: str | Path) -> Golden:
    """Read a golden by its name without `.npz`, or by its path.

    Those that JAXDIFF_GOLDENS does not have are the stored ones, of which pipelines are made.
    """
    fresh = Path(os.environ.get("JAXDIFF_GOLDENS", FOLDER)) / f"{name}.npz"
    known = fresh if fresh.is_file() else FOLDER / f"{name}.npz"
    with np.load(name if isinstance(name, Path) else known) as file:
        arrays = {key: file[key] for key in file.files}
    config, found, seed = json.loads(str(arrays.pop("golden")))
    return Golden(config, {key: tuple(shape) for key, shape in found.items()}, seed, arrays)


def read_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Read a list of weights: their shapes by name."""
    lines = (KEYS / f"{name}.txt").read_text().splitlines()
    return {key: tuple(map(int, sizes)) for key, *sizes in map(str.split, lines)}


def write_keys(path: Path, found: Mapping[str, tuple[int, ...]]) -> None:
    """Write a list of weights."""
    path.write_text(
        "".join(" ".join([key, *map(str, shape)]) + "\n" for key, shape in found.items())
    )


def main(
    cases: Mapping[str, Callable[[int, int], Golden]],
    published: Callable[[], Mapping[str, Mapping[str, tuple[int, ...]]]] = dict,
) -> None:
    """Write what the command line asks for.

    Args:
        cases: by name, each made from a seed and from whether it is to be larger (1) or not (0).
        published: the shapes of the weights of published files, by the name of the list.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--larger", action="store_true")
    parser.add_argument("--keys", action="store_true", help="write the lists of weights instead")
    options = parser.parse_args()
    folder = options.out or (KEYS if options.keys else FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    if options.keys:
        for name, found in published().items():
            write_keys(folder / f"{name}.txt", found)
        return
    for name, make in cases.items():
        write(folder / f"{name}.npz", make(options.seed, int(options.larger)))
