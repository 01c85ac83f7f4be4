"""Where states and batches lie on a mesh of devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxdiff import checks
from jaxdiff.devices.slices import arrange
from jaxdiff.typing import Array, Batch, Key, PyTree

AXIS = "data"
"""The axis of `parallel.pmap`, and of the mesh that a batch alone is split over."""
FSDP = "fsdp"
"""The axis of the mesh that parameters may be split over too."""


def make_mesh(
    data: int,
    fsdp: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
    slices: int | Sequence[int] | None = None,
) -> Mesh:
    """Arrange devices in a mesh of `data` x `fsdp`, slice after slice along `data`.

    So `fsdp` stays within a slice, which is what a fast network joins: by default what JAX says of
    TPUs and GPUs (`slice_index`; of GPUs a node, or what one NVLink switch joins). Other devices
    are of one slice. The order within a slice is that of `devices`; of TPUs that are not given it
    is `mesh_utils.create_device_mesh`'s, which knows where they are.

    Args:
        data: along the axis that only the batch is split over.
        fsdp: along the axis that the state may be split over too.
        devices: by default all of all processes.
        slices: which slice each device is of, or into how many equal ones they are cut in their
            order, whatever JAX says of them: 1 lets `fsdp` go across.

    Raises:
        TypeError: if a number is no whole number.
        ValueError: if there are not `data` x `fsdp` devices, the slices are not equal, or `fsdp`
            does not divide a slice.
    """
    given, devices = devices, jax.devices() if devices is None else devices
    data, fsdp = checks.count("data", data), checks.count("fsdp", fsdp)
    if data * fsdp != len(devices):
        raise ValueError(
            f"`data` x `fsdp` must be the number of devices, {len(devices)}; got {data} x {fsdp}."
        )
    grid = arrange(devices, data, fsdp, slices=slices, by_network=given is None)
    return Mesh(grid, (AXIS, FSDP))


def check_mesh(mesh: Mesh) -> None:
    """Raise ValueError unless a mesh is as `make_mesh` makes them."""
    if mesh.axis_names != (AXIS, FSDP):
        raise ValueError(
            f"`mesh` must have the axes {AXIS!r} and {FSDP!r}, as parallel.make_mesh gives them; "
            f"got {mesh.axis_names}."
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            "`mesh` must have Auto axes, as parallel.make_mesh gives them; jax.make_mesh gives "
            f"Explicit ones unless told otherwise: got {mesh.axis_types}."
        )


def shardings(state: PyTree, mesh: Mesh, *, fsdp: bool = False) -> PyTree:
    """Return where each leaf of a state lies on a mesh.

    With `fsdp` a leaf is split along its longest axis that the mesh's second axis divides, the
    last of several; a leaf without such an axis is whole on every device.

    Args:
        state: arrays, or their shapes as `jax.eval_shape` gives them.
        mesh: of :func:`make_mesh`.
        fsdp: split over the mesh's second axis.
    """
    size = mesh.shape[FSDP]

    def of_leaf(leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * leaf.ndim
        fitting = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % size == 0]
        if fsdp and size > 1 and fitting and leaf.size > 0:
            spec[max(fitting, key=lambda axis: (leaf.shape[axis], axis))] = FSDP
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of_leaf, state)


def place(state: PyTree, mesh: Mesh, *, fsdp: bool = False) -> PyTree:
    """Return a state laid out on a mesh as `parallel.mesh` wants it."""
    return jax.device_put(state, shardings(state, mesh, fsdp=fsdp))


def init(make: Callable[[], PyTree], mesh: Mesh, *, fsdp: bool = False) -> PyTree:
    """Make a state directly where it belongs, so that no device ever holds all of it.

    Args:
        make: a pure function without arguments, traced: ``lambda: training.init(...)``.
        mesh: of :func:`make_mesh`.
        fsdp: as in :func:`shardings`.
    """
    placed = shardings(jax.eval_shape(make), mesh, fsdp=fsdp)
    return jax.jit(make, out_shardings=placed)()


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Return the global batch of which `batch` is this process's rows, split over a mesh.

    Args:
        batch: arrays (B / P, ...) in process p of P, the rows [p B / P, (p + 1) B / P) of the
            global batch; arrays that are global already are left as they are.
        mesh: of :func:`make_mesh`.

    Raises:
        ValueError: if the rows do not split into equal shards.
    """
    return spread(batch, mesh)


def spread(batch: Batch, mesh: Mesh, *, axis: int = 0) -> Batch:
    """Do what `place_batch` says, the rows being along `axis`.

    Where the devices of a process do not follow each other on the mesh, rows move between devices.

    Raises:
        ValueError: if the rows do not split into equal shards.
    """
    check_batch(batch, mesh.size, axis=axis, num_processes=jax.process_count())
    rows = NamedSharding(mesh, PartitionSpec(*[None] * axis, (AXIS, FSDP)))
    devices = sorted(mesh.devices.flat, key=lambda device: device.process_index)  # a stable sort
    own = rows
    if devices != [*mesh.devices.flat]:
        own = NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec(*[None] * axis, AXIS))

    def of_leaf(x: Any) -> Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        if jax.process_count() == 1:
            return jax.device_put(x, rows)
        placed = jax.make_array_from_process_local_data(own, np.asarray(x))
        return placed if own is rows else jax.device_put(placed, rows)

    return jax.tree.map(of_leaf, batch)


def everywhere(key: Key, sharding: Sharding) -> Key:
    """Return a key that every process holds where `sharding` says, on all of its devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(key, sharding)
    data = np.asarray(jax.random.key_data(key))
    spread_out = jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])
    return jax.random.wrap_key_data(spread_out, impl=jax.random.key_impl(key))


def check_batch(batch: Batch, count: int, *, axis: int = 0, num_processes: int = 1) -> None:
    """Raise ValueError unless a batch splits into `count` shards.

    Args:
        batch: rows of one of `num_processes` equal shares, or a global array.
        count: shards of the whole.
        axis: along which the rows are.
        num_processes: shares of the whole.
    """
    for path, leaf in jax.tree.leaves_with_path(batch):
        num_rows = np.shape(leaf)[axis] if np.ndim(leaf) > axis else 0
        of_all = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        factor = 1 if of_all else num_processes
        if num_rows == 0 or (num_rows * factor) % count:
            raise ValueError(
                f"`batch{jax.tree_util.keystr(path)}` must have rows that {count} devices share "
                f"equally; got shape {np.shape(leaf)}."
            )
