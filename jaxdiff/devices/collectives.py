r"""What a compiled program moves between devices, read from its text.

A device that takes part in a collective of M bytes among g devices, in a ring, sends and gets

    all-reduce                                 2 M (g - 1) / g
    all-gather, reduce-scatter, all-to-all       M (g - 1) / g
    collective-permute                           M

M being the whole array, before it is scattered or after it is gathered.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_CALL = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r"\s*\{([^}]*)\}"
)


class Collective(NamedTuple):
    """One instruction of a program.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute" ...
        num_bytes: M.
        groups: the devices that exchange with each other, by their places in ``mesh.devices.flat``;
            of a permutation its pairs.
    """

    kind: str
    num_bytes: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def moved(self) -> float:
        """How many bytes go out of a device, and as many into it."""
        if self.kind == "collective-permute":
            return float(self.num_bytes)
        rounds = 2 if self.kind == "all-reduce" else 1
        size = max(map(len, self.groups))
        return rounds * self.num_bytes * (size - 1) / size

    def crosses(self, slices: Sequence[int]) -> bool:
        """Tell whether a group has devices of several slices.

        Args:
            slices: of each device, in the order of ``mesh.devices.flat``.
        """
        return any(len({slices[i] for i in group}) > 1 for group in self.groups)


def collectives(text: str, num_devices: int) -> list[Collective]:
    """Return the collectives of a compiled program; one in a loop counts once.

    Args:
        text: ``compiled.as_text()``.
        num_devices: of the program.

    Raises:
        ValueError: if a collective's groups are written in a way that is not known here.
    """
    found = []
    for line in text.splitlines():
        call = _CALL.search(line)
        if call is None:
            continue
        shape, kind, start = call.groups()
        groups = _groups(line, num_devices)
        arrays = [array for array in _ARRAY.findall(shape) if not (start and _is_counter(*array))]
        sizes = [_num_bytes(*array) for array in arrays]
        if start and kind == "collective-permute":
            sizes = sizes[:1]  # what is sent, then what is got
        elif start and kind != "all-reduce" and len(sizes) > 1:
            sizes = sizes[len(sizes) // 2 :]  # what goes in, then what comes out
        parts = max(map(len, groups)) if kind == "reduce-scatter" else 1
        if max(map(len, groups)) > 1:
            found.append(Collective(kind, sum(sizes) * parts, groups))
    return found


def _is_counter(kind: str, bits: str, shape: str) -> bool:
    return kind == "u32" and not shape


def _num_bytes(kind: str, bits: str, shape: str) -> int:
    count = math.prod(int(size) for size in shape.split(",") if size)
    return count if kind == "pred" else count * int(bits) // 8


def _groups(line: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Return the groups of an instruction in any of the ways that XLA writes them."""
    if lists := _LISTS.search(line):
        inside = re.findall(r"\{([\d, ]*)\}", lists[1] or "")
        groups = [[int(i) for i in group.split(",") if i.strip()] for group in inside]
        return tuple(map(tuple, groups)) or (tuple(range(num_devices)),)
    if iota := _IOTA.search(line):
        grid = _ordered(_whole(iota[2]), iota[3])
        return _rows(grid.reshape(_whole(iota[1])))
    if axes := _AXES.search(line):
        return _by_axes(*axes.groups())
    raise ValueError(f"the groups of a collective are not known: {line.strip()[:300]}")


def _by_axes(
    mesh: str, shape: str | None, order: str | None, along: str
) -> tuple[tuple[int, ...], ...]:
    """Return the groups of ``mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}``.

    An axis may be taken in part, ``'b':(2)2`` being the part of size 2 that follows one of size 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = [
        (name, int(before or 1), int(before or 1) * int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)
    ]
    factors: list[int] = []  # all axes, cut wherever a part begins or ends
    taken: list[int] = []
    for name, size in sizes.items():
        own = [part for part in parts if part[0] == name]
        edges = sorted({1, size, *(edge for part in own for edge in part[1:])})
        for low, high in zip(edges, edges[1:], strict=False):
            if any(first <= low and high <= last for _, first, last in own):
                taken.append(len(factors))
            factors.append(high // low)
    grid = _ordered(_whole(shape) if shape else [math.prod(sizes.values())], order)
    others = [axis for axis in range(len(factors)) if axis not in taken]
    members = math.prod(factors[axis] for axis in taken)
    return _rows(grid.reshape(factors).transpose(*others, *taken).reshape(-1, members))


def _ordered(shape: Sequence[int], order: str | None) -> np.ndarray:
    grid = np.arange(math.prod(shape)).reshape(shape)
    return grid if order is None else grid.transpose(_whole(order))


def _rows(grid: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in grid.tolist())


def _whole(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]
