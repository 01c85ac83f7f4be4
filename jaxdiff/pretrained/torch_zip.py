"""The zip form of PyTorch's files: the state dicts that `torch.save` writes since version 1.6.

An archive holds `data.pkl`, the instructions that make a state dict, and `data/N`, the numbers of
its storages, uncompressed. The instructions are followed by
:mod:`jaxdiff.pretrained.plain_pickle`, which can make tensors and plain containers alone; torch is
not needed, and nothing is written to the disk. Numbers are held against their checksums when they
are read.
"""

import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.pretrained import plain_pickle
from jaxdiff.pretrained.errors import WeightsError
from jaxdiff.pretrained.files import Spec, Tensors
from jaxdiff.pretrained.plain_pickle import RefusedError, Storage, View

__all__ = ["TorchZip"]

_REMEDY = (
    "Only tensors and plain containers are read, and no code is run. Where the file can be "
    "trusted and torch is at hand, save its weights alone as safetensors: "
    'safetensors.torch.save_file(state_dict, "model.safetensors").'
)
_DAMAGE = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, NotImplementedError),
    *(RuntimeError, ValueError, OverflowError, EOFError, LookupError, OSError, MemoryError),
)
"""What zipfile raises of archives that are none."""
_DEPTH = 16
_ENTRIES = 2 * 10**5


class TorchZip(Tensors):
    """The tensors of one file, nested containers' by their keys with dots between.

    Numbers, text and None beside the tensors are left out.

    Args:
        path: of the file.

    Raises:
        WeightsError: if it is no such file, is damaged, or holds anything but tensors and plain
            containers, which is named.
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb"):  # a missing file is no damage
            pass
        try:
            self._archive = zipfile.ZipFile(path)
            self._prefix, self._order = self._judged_entries()
            pickle = self._read("data.pkl", plain_pickle.LIMIT)
        except _DAMAGE as error:
            raise self._damaged(error) from error
        try:
            self._views = dict(_flattened(plain_pickle.read(pickle)))
        except RefusedError as error:
            raise WeightsError(f"{path} holds {error}. {_REMEDY}") from None
        self._judge_storages({view.storage for view in self._views.values()})
        uses = Counter(view.storage for view in self._views.values())
        self._shared = {storage for storage, count in uses.items() if count > 1}
        self._kept: tuple[Storage, np.ndarray] | None = None

    def __getitem__(self, key: str) -> np.ndarray:
        storage, offset, shape, strides = self._views[key]
        numbers = self._numbers(storage)[offset:]
        size = storage.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            numbers, shape, [stride * size for stride in strides], writeable=False
        )
        if storage.dtype == np.bool_:
            return view.view(np.uint8) != 0
        return view if view.dtype.isnative else view.astype(storage.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def spec(self, key: str) -> Spec:
        """See :class:`Tensors`."""
        view = self._views[key]
        return Spec(view.shape, view.storage.dtype)

    def _damaged(self, error: BaseException) -> WeightsError:
        return WeightsError(f"{self.path} is no whole file of PyTorch: {error}.")

    def _judged_entries(self) -> tuple[str, str]:
        """Judge the names of the entries; return what they begin with, and the byte order."""
        entries = self._archive.infolist()
        names = [entry.filename for entry in entries]
        (twice, count), *_ = Counter(names).most_common(1) or [("", 0)]
        if count > 1:
            raise ValueError(f"it has {twice!r} twice")
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise ValueError("it does not hold one data.pkl")
        known = re.compile(
            rf"{re.escape(roots[0])}(data\.pkl|byteorder|version|data/\w+|\.\w[\w/]*)"
        )
        for entry in entries:
            if not known.fullmatch(entry.filename):
                raise ValueError(f"it holds {entry.filename!r}, which no state dict has")
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise ValueError(f"{entry.filename!r} is compressed, which torch.save does not do")
        if sum(entry.file_size for entry in entries) > self.path.stat().st_size:
            raise ValueError("its entries lie upon each other")
        self._sizes = {
            name.removeprefix(roots[0]): e.file_size for name, e in zip(names, entries, strict=True)
        }
        self._prefix = roots[0]
        order = self._read("byteorder", 16) if "byteorder" in self._sizes else b"little"
        if order not in (b"little", b"big"):
            raise ValueError(f"its byte order is {order!r}")
        return roots[0], order.decode()

    def _read(self, name: str, limit: int | None = None) -> bytes:
        if limit is not None and self._sizes[name] > limit:
            raise ValueError(f"{name!r} has more than {limit} bytes")
        return self._archive.read(self._prefix + name)

    def _judge_storages(self, storages: set[Storage]) -> None:
        kinds: dict[str, Storage] = {}
        for storage in storages:
            held = self._sizes.get(f"data/{storage.key}")
            wanted = storage.size * storage.dtype.itemsize
            if held != wanted:
                raise WeightsError(
                    f"{self.path} is no whole file of PyTorch: storage {storage.key!r} must have "
                    f"{wanted} bytes; got {'none' if held is None else held}."
                )
            if kinds.setdefault(storage.key, storage) != storage:
                raise WeightsError(
                    f"{self.path} is no whole file of PyTorch: storage {storage.key!r} is of two "
                    "kinds."
                )

    def _numbers(self, storage: Storage) -> np.ndarray:
        """Read a storage; one that several tensors share is kept until another is."""
        if self._kept is not None and self._kept[0] == storage:
            return self._kept[1]
        try:
            content = self._read(f"data/{storage.key}")
        except _DAMAGE as error:
            raise self._damaged(error) from error
        numbers = np.frombuffer(
            content, storage.dtype.newbyteorder(">" if self._order == "big" else "<")
        )
        if storage in self._shared:
            self._kept = (storage, numbers)
        return numbers


def _flattened(tree: Any) -> Iterator[tuple[str, View]]:
    """Yield the tensors of nested containers, named by their keys.

    Raises:
        RefusedError: if there are none, two have the same name, or it is nested too deep.
    """
    found: set[str] = set()
    rest: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    seen = 0
    while rest:
        path, value = rest.pop()
        if isinstance(value, View):
            name = ".".join(path)
            if name in found:
                raise RefusedError(f"two tensors of the name {name!r}")
            found.add(name)
            yield name, value
            continue
        if isinstance(value, dict):
            inner = list(value.items())
        elif isinstance(value, list | tuple) and not isinstance(value, Storage):
            inner = list(enumerate(value))
        else:
            continue
        seen += len(inner)
        if len(path) >= _DEPTH or seen > _ENTRIES:
            raise RefusedError("containers in containers without end")
        rest += [((*path, str(key)), each) for key, each in reversed(inner)]
    if not found:
        raise RefusedError("no tensors")
