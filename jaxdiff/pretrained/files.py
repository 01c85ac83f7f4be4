"""Files of weights as lazy mappings: each tensor is read when it is asked for, and not kept.

    tensors = files.open_weights("unet/diffusion_pytorch_model.safetensors")
    tensors.spec("conv_in.weight")      # its shape and dtype, from the header
    tensors["conv_in.weight"]           # its numbers, a NumPy array

Safetensors files are judged by their library, and their numbers read by their places: one file, or
shards under an index. The zip form of PyTorch's files is read by
:mod:`jaxdiff.pretrained.torch_zip`. What a file is, is told by its first bytes, never by its name.
"""

import abc
import json
import math
import os
import re
import struct
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxdiff import extras
from jaxdiff.pretrained.errors import WeightsError

__all__ = [
    "Safetensors",
    "Sharded",
    "Spec",
    "Tensors",
    "find",
    "open_weights",
    "preferred",
    "read_json",
]


class Spec(NamedTuple):
    """What a tensor is, without its numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Tensors(Mapping[str, np.ndarray]):
    """Arrays by their keys, in the order of the file, read when asked for."""

    @abc.abstractmethod
    def spec(self, key: str) -> Spec:
        """Return the shape and dtype of a tensor without reading it.

        Raises:
            KeyError: if there is none of that key.
        """


_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F6_E2M3": ml_dtypes.float6_e2m3fn,
    "F6_E3M2": ml_dtypes.float6_e3m2fn,
    "F4": ml_dtypes.float4_e2m1fn,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


class Safetensors(Tensors):
    """The tensors of one safetensors file.

    Args:
        path: of the file.

    Raises:
        WeightsError: if it is no such file, or is cut short.
        OSError: if it cannot be opened.
        ImportError: if safetensors is not installed.
    """

    def __init__(self, path: Path) -> None:
        with extras.needed_by("jaxdiff.pretrained", "pretrained"):
            from safetensors import SafetensorError, safe_open
        self.path = path
        try:
            with safe_open(path, "numpy", backend="pread") as file:
                parts = {key: file.get_slice(key) for key in file.offset_keys()}
                self._specs = {key: self._seen(key, part) for key, part in parts.items()}
        except SafetensorError as error:
            raise WeightsError(f"{path} is no whole safetensors file: {error}.") from error
        # The numbers are read here, which is twice as fast as by the library, without holding up
        # other threads. Not by mapping: mapped pages would count as memory of this process.
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)
        (length,) = struct.unpack("<Q", os.pread(self._file, 8, 0))
        header = json.loads(os.pread(self._file, length, 8))
        self._places = {
            key: [8 + length + offset for offset in header[key]["data_offsets"]]
            for key in self._specs
        }

    def _seen(self, key: str, part: Any) -> Spec:
        name = part.get_dtype()
        if name not in _DTYPES:
            raise WeightsError(f"{self.path}: {key} has the dtype {name}, which is not known.")
        return Spec(tuple(part.get_shape()), np.dtype(_DTYPES[name]))

    def __getitem__(self, key: str) -> np.ndarray:
        shape, dtype = self._specs[key]
        start, end = self._places[key]
        content = np.empty(end - start, np.uint8)
        read = 0
        while read < len(content):
            count = os.preadv(self._file, [content[read:].data], start + read)
            if not count:
                raise WeightsError(f"{self.path}: {key} ({dtype}) cannot be read: cut short.")
            read += count
        if len(content) != math.prod(shape) * dtype.itemsize:  # several numbers in a byte
            raise WeightsError(f"{self.path}: {key} ({dtype}) cannot be read.")
        return content.view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def spec(self, key: str) -> Spec:
        """See :class:`Tensors`."""
        return self._specs[key]


class Sharded(Tensors):
    """The tensors of the shards that an index names.

    Args:
        path: of the index, ``*.safetensors.index.json``.

    Raises:
        WeightsError: if the index is none, a shard is missing or damaged, or the two disagree.
        OSError: if a file cannot be opened.
        ImportError: if safetensors is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        where = _weight_map(path)
        names = sorted(set(where.values()))
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing:
            raise WeightsError(
                f"{path} names {len(names)} shards; missing beside it: {', '.join(missing)}."
            )
        shards = {name: Safetensors(path.parent / name) for name in names}
        wrong = [
            f"{key}: the index has it in {name}, which does not hold it"
            for key, name in where.items()
            if key not in shards[name]
        ]
        for name, shard in shards.items():
            wrong += [
                f"{key}: {name} holds it, the index has it "
                + (f"in {where[key]}" if key in where else "nowhere")
                for key in shard
                if where.get(key) != name
            ]
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise WeightsError(
                f"{path} is not the index of its shards: {'; '.join(wrong[:5])}{more}."
            )
        self._shards = {key: shard for shard in shards.values() for key in shard}

    def __getitem__(self, key: str) -> np.ndarray:
        return self._shards[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def spec(self, key: str) -> Spec:
        """See :class:`Tensors`."""
        return self._shards[key].spec(key)


def open_weights(path: str | Path) -> Tensors:
    """Open a file of weights: safetensors, an index of shards, or the zip form of PyTorch.

    Raises:
        WeightsError: if it is none of them, damaged, or holds more than tensors.
        OSError: if it cannot be opened.
        ImportError: if safetensors is needed and not installed.
    """
    path = Path(path)
    if path.suffix == ".json":
        return Sharded(path)
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise WeightsError(f"{path} is empty.")
    if start[5:9] == b"\0\0\0{":  # a header of safetensors, its length before it
        return Safetensors(path)
    if start.startswith(b"PK\x03\x04"):
        from jaxdiff.pretrained import torch_zip

        return torch_zip.TorchZip(path)
    for beginning, what in _OTHERS.items():
        if start.startswith(beginning):
            raise WeightsError(f"{path} is {what}")
    return Safetensors(path)


_OTHERS = {
    b"\x80": "a pickle, the form of PyTorch's files before version 1.6 or of another program. It "
    "could run code, and is not read. Save it as safetensors where it comes from.",
    b"version https://git-lfs": "a pointer of Git LFS, not the weights themselves. Fetch them with "
    "git lfs pull.",
    b"<": "a web page, not weights. Was the download refused?",
    **dict.fromkeys(
        (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF"),
        "a picture, not weights. Give the folder or the file of weights.",
    ),
    b"\x1f\x8b": "gzip-compressed. Unpack it first.",
}
"""What else a file of that name often is, by its first bytes."""

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_NAMES = tuple(
    f"{stem}{variant}.{ending}"
    for ending in ("safetensors", "safetensors.index.json", "bin")
    for variant in ("", ".fp32", ".fp16", ".bf16", ".non_ema")
    for stem in _STEMS
)


def preferred(names: Iterable[str]) -> str | None:
    """Return the name of the file of weights among those of a folder, the widest and safest."""
    held = set(names)
    return next((name for name in _NAMES if name in held), None)


def find(folder: Path) -> Path:
    """Return the file of weights of a component's folder: the widest and safest there is.

    Raises:
        WeightsError: if there is none, naming what would be one.
        OSError: if it is no folder.
    """
    held = sorted(each.name for each in folder.iterdir())
    name = preferred(held)
    if name is None:
        wanted = " or ".join(f"{stem}.safetensors" for stem in _STEMS[:2])
        raise WeightsError(
            f"{folder} holds no weights: {wanted} (or its index). "
            f"It holds {', '.join(held[:8]) or 'nothing'}."
        )
    return folder / name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object whose keys differ.

    Raises:
        WeightsError: if it is none.
        OSError: if it cannot be opened.
    """

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise WeightsError(f"{path} has {key!r} twice.")
            found[key] = value
        return found

    try:
        read = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{path} is no JSON: {error}.") from error
    if not isinstance(read, dict):
        raise WeightsError(f"{path} must hold a JSON object; got a {type(read).__name__}.")
    return read


def _weight_map(path: Path) -> dict[str, str]:
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise WeightsError(
            f"{path} has no `weight_map` from tensors to shards, as the index of weights has. Of a "
            "config give the folder that it lies in."
        )
    for name in set(where.values()):
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise WeightsError(f"{path} names {name!r}: a shard must lie beside its index.")
    return where
