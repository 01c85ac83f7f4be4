"""Slices: devices that share a fast network, and the order of a mesh that keeps to them.

A TPU slice is what its own interconnect joins, a slice of GPUs what NVLink does: a node, or several
that one NVLink switch joins. Between slices goes the data centre's network, slower by far. A mesh
of `data` x `fsdp` devices, slice after slice along `data`, gathers parameters within slices alone,
and only sums gradients between them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from jaxdiff import checks


def numbers(devices: Sequence[Any], slices: int | Sequence[int] | None = None) -> list[int]:
    """Return which slice each device is of.

    Args:
        devices: of `jax.devices`.
        slices: see `placement.make_mesh`.

    Raises:
        TypeError: if a number is no whole number.
        ValueError: if a list has another length, or so many slices do not share the devices.
    """
    if slices is None:
        told = all(each.platform in ("tpu", "gpu") for each in devices)  # a CPU's mean nothing
        return [(getattr(each, "slice_index", None) or 0) if told else 0 for each in devices]
    if not isinstance(slices, Iterable):
        count = checks.count("slices", slices)
        if len(devices) % count:
            raise ValueError(
                f"`slices` must divide the number of devices, {len(devices)}; got {count}."
            )
        return [i * count // len(devices) for i in range(len(devices))]
    given = [checks.count(f"slices[{i}]", number, 0) for i, number in enumerate(slices)]
    if len(given) != len(devices):
        raise ValueError(
            f"`slices` must have the slice of each of the {len(devices)} devices; got {len(given)}."
        )
    return given


def arrange(
    devices: Sequence[Any],
    data: int,
    fsdp: int,
    *,
    slices: int | Sequence[int] | None = None,
    by_network: bool = False,
) -> np.ndarray:
    """Return the devices as a mesh has them, (data, fsdp): slice after slice along `data`.

    Args:
        devices: `data` x `fsdp` of them.
        data: along the first axis.
        fsdp: along the second.
        slices: see `placement.make_mesh`.
        by_network: let JAX order the TPUs of a slice by where they are in it
            (`mesh_utils.create_device_mesh`); else they stay in the order given.

    Raises:
        TypeError: as :func:`numbers`.
        ValueError: likewise; and if the slices are not equal, or `fsdp` does not divide one.
    """
    of_slice: dict[int, list[Any]] = {}
    for device, number in zip(devices, numbers(devices, slices), strict=True):
        of_slice.setdefault(number, []).append(device)
    groups = [of_slice[number] for number in sorted(of_slice)]
    size = len(groups[0])
    if any(len(group) != size for group in groups):
        sizes = ", ".join(str(len(group)) for group in groups)
        raise ValueError(
            f"`devices` must be as many of each slice; got {sizes}. Take as many of each, or "
            "`slices=1`, which takes all as one."
        )
    if size % fsdp:
        raise ValueError(
            f"`fsdp` must divide the {size} devices of a slice; got {fsdp}. With `slices=1`, which "
            "takes all devices as one slice, parameters are gathered across slices."
        )
    shape = (size // fsdp, fsdp)
    if by_network and slices is None and devices[0].platform == "tpu":
        within = [
            mesh_utils.create_device_mesh(shape, group, allow_split_physical_axes=True)
            for group in groups
        ]
    else:
        within = [np.asarray(group, object).reshape(shape) for group in groups]
    return np.concatenate(within)
