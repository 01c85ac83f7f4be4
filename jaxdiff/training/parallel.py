r"""How an update is compiled: for one device, by pmap, or over a mesh.

Every mode takes and returns the same state, without a replica axis, and makes the same update: the
noise of example i of the global batch is that of i wherever it is computed.

A mesh has two axes. The batch is split over both; the state is whole on every device or, with
`fsdp`, split over the second (Rajbhandari et al. 2020, arXiv:1910.02054, stage 3; Zhao et al. 2023,
arXiv:2304.11277), XLA gathering what a layer needs and scattering its gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.training.update import TrainState, Update
from jaxdiff.typing import Array, Batch, Key, PyTree

AXIS = "data"
"""The axis of :func:`pmap`, and of the mesh that a batch alone is split over."""
FSDP = "fsdp"
"""The axis of the mesh that parameters may be split over too."""


def jit(update: Update, *, donate: bool = False) -> Update:
    """Compile an update for one device.

    Args:
        update: from `make_update` without an `axis_name`.
        donate: let the new state take the buffers of the old one, which is then gone.
    """
    return jax.jit(update, donate_argnums=_donated(donate))


def pmap(
    update: Update, *, devices: Sequence[jax.Device] | None = None, donate: bool = False
) -> Update:
    """Compile an update for several devices by `jax.pmap`, each with a shard of the batch.

    Args:
        update: from ``make_update(..., axis_name=parallel.AXIS)``.
        devices: by default all of this process.
        donate: as in :func:`jit`.

    Returns:
        The update of whole batches (B, ...), B divisible by the number of devices; it raises
        ValueError for others.
    """
    devices = jax.local_devices() if devices is None else devices
    count = len(devices)
    whole = NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec())
    mapped = jax.pmap(
        update,
        axis_name=AXIS,
        in_axes=(None, None, 0),
        out_axes=None,  # all replicas are alike
        devices=devices,
        donate_argnums=_donated(donate),
    )

    def step(state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        check_batch(batch, count)

        def split(x: Array) -> Array:
            return x.reshape(count, x.shape[0] // count, *x.shape[1:])

        # a state that another mode left elsewhere is fetched; one of this mode is where it was
        return mapped(jax.device_put(state, whole), key, jax.tree.map(split, batch))

    return step


def mesh(update: Update, mesh: Mesh, *, fsdp: bool = False, donate: bool = False) -> Update:
    """Compile an update over a mesh, the batch split over all its devices.

    Args:
        update: from `make_update` without an `axis_name`.
        mesh: of :func:`make_mesh`.
        fsdp: split the state over the mesh's second axis; else every device holds it whole.
        donate: as in :func:`jit`.

    Returns:
        The update of states in any placement and batches (B, ...), B divisible by the number of
        devices; it raises ValueError for others. The new state is placed as :func:`place` does.

    Raises:
        ValueError: if the mesh has other axes, or axes of another type than Auto.
    """
    _check_mesh(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    compiled: dict[Any, Update] = {}

    def step(state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        check_batch(batch, mesh.size)
        placed = shardings(state, mesh, fsdp=fsdp)
        form = jax.tree.structure((state, batch))
        if form not in compiled:
            compiled[form] = jax.jit(
                update,
                in_shardings=(placed, whole, _rows(mesh)),
                out_shardings=(placed, whole),
                donate_argnums=_donated(donate),
            )
        return compiled[form](
            jax.device_put(state, placed), jax.device_put(key, whole), place_batch(batch, mesh)
        )

    return step


def make_mesh(data: int, fsdp: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices in a mesh of `data` x `fsdp`.

    Args:
        data: along the axis that only the batch is split over.
        fsdp: along the axis that the state may be split over too.
        devices: by default all of all processes.

    Raises:
        ValueError: if there are not `data` x `fsdp` devices.
    """
    devices = jax.devices() if devices is None else devices
    if data < 1 or fsdp < 1 or data * fsdp != len(devices):
        raise ValueError(
            f"`data` x `fsdp` must be the number of devices, {len(devices)}; got {data} x {fsdp}."
        )
    return Mesh(np.asarray(devices).reshape(data, fsdp), (AXIS, FSDP))


def shardings(state: PyTree, mesh: Mesh, *, fsdp: bool = False) -> PyTree:
    """Return where each leaf of a state lies on a mesh.

    With `fsdp` a leaf is split along its longest axis that the mesh's second axis divides, the
    last of several; a leaf without such an axis is whole on every device.

    Args:
        state: arrays, or their shapes as `jax.eval_shape` gives them.
        mesh: of :func:`make_mesh`.
        fsdp: as in :func:`mesh`.
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
    """Return a state laid out on a mesh as :func:`mesh` wants it."""
    return jax.device_put(state, shardings(state, mesh, fsdp=fsdp))


def init(make: Callable[[], PyTree], mesh: Mesh, *, fsdp: bool = False) -> PyTree:
    """Make a state directly where it belongs, so that no device ever holds all of it.

    Args:
        make: a pure function without arguments, traced: ``lambda: training.init(...)``.
        mesh: of :func:`make_mesh`.
        fsdp: as in :func:`mesh`.
    """
    placed = shardings(jax.eval_shape(make), mesh, fsdp=fsdp)
    return jax.jit(make, out_shardings=placed)()


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Return the global batch of which `batch` is this process's rows, split over a mesh.

    Args:
        batch: arrays (B / P, ...) in process p of P, the rows [p B / P, (p + 1) B / P) of the
            global batch; arrays that are global already are left as they are.
        mesh: of :func:`make_mesh`.
    """
    rows = _rows(mesh)

    def spread(x: Any) -> Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        if jax.process_count() == 1:
            return jax.device_put(x, rows)
        return jax.make_array_from_process_local_data(rows, np.asarray(x))

    return jax.tree.map(spread, batch)


def check_batch(batch: Batch, count: int) -> None:
    """Raise ValueError unless a batch splits into `count` equal shards."""
    for path, leaf in jax.tree.leaves_with_path(batch):
        num_rows = np.shape(leaf)[0] if np.ndim(leaf) else 0
        if num_rows == 0 or (num_rows * jax.process_count()) % count:
            raise ValueError(
                f"`batch{jax.tree_util.keystr(path)}` must have rows that {count} devices share "
                f"equally; got shape {np.shape(leaf)}."
            )


def _rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec((AXIS, FSDP)))


def _donated(donate: bool) -> tuple[int, ...]:
    return (0,) if donate else ()


def _check_mesh(mesh: Mesh) -> None:
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
