r"""How an update is compiled: for one device, by pmap, or over a mesh.

Every mode takes and returns the same state, without a replica axis, and makes the same update: the
noise of example i of the global batch is that of i wherever it is computed.

A mesh has two axes. The batch is split over both; the state is whole on every device or, with
`fsdp`, split over the second (Rajbhandari et al. 2020, arXiv:1910.02054, stage 3; Zhao et al. 2023,
arXiv:2304.11277), XLA gathering what a layer needs and scattering its gradients.

:func:`jit`, :func:`pmap` and :func:`mesh` compile an update that takes states and batches wherever
they are. A training loop places them itself, once and ahead of time, as a :class:`Mode` says.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxdiff.training.placement import (
    AXIS,
    FSDP,
    check_batch,
    check_mesh,
    everywhere,
    init,
    make_mesh,
    place,
    place_batch,
    shardings,
    spread,
)
from jaxdiff.training.update import Update, gathering, scan_steps
from jaxdiff.typing import Batch, PyTree

__all__ = [
    "AXIS",
    "FSDP",
    "Mode",
    "everywhere",
    "init",
    "jit",
    "make_mesh",
    "map_rows",
    "mesh",
    "mode_of_mesh",
    "mode_of_one_device",
    "mode_of_pmap",
    "place",
    "place_batch",
    "pmap",
    "shardings",
]


class Mode(NamedTuple):
    """Where states and batches lie, and how an update of them is compiled.

    Attributes:
        axis_name: what `make_update` must be given.
        num_shards: into how many equal parts a global batch is split.
        whole: where what every device holds lies: the key, and states that are not split.
        shardings: state, or its shapes -> where each leaf lies.
        place_batch: this process's rows of a batch -> the batch where `compile` wants it; of
            several batches, their axis leading, where `scanned` is true.
        compile: (update, donate=, scanned=) -> the compiled update of what was placed so; a
            scanned one makes an update of each of several batches in one call.
    """

    axis_name: str | None
    num_shards: int
    whole: Sharding
    shardings: Callable[[PyTree], PyTree]
    place_batch: Callable[..., Batch]
    compile: Callable[..., Update]


def mode_of_one_device() -> Mode:
    """Run on the first device of this process, however many there are."""
    whole = SingleDeviceSharding(jax.local_devices()[0])

    def compiled(update: Update, *, donate: bool = False, scanned: bool = False) -> Update:
        update = scan_steps(update) if scanned else update
        return jax.jit(update, donate_argnums=_donated(donate))

    return Mode(
        axis_name=None,
        num_shards=1,
        whole=whole,
        shardings=lambda state: jax.tree.map(lambda _: whole, state),
        place_batch=lambda batch, scanned=False: jax.device_put(batch, whole),
        compile=compiled,
    )


def mode_of_pmap(devices: Sequence[jax.Device] | None = None) -> Mode:
    """Run by `jax.pmap`, each device with a shard of the batch.

    Args:
        devices: by default all of all processes; every process must have as many.
    """
    local = jax.local_devices() if devices is None else devices
    count = len(local)
    num_shards = count * (jax.process_count() if devices is None else 1)
    mesh = Mesh(np.asarray(local), (AXIS,))
    whole = NamedSharding(mesh, PartitionSpec())

    def placed_batch(batch: Batch, scanned: bool = False) -> Batch:
        check_batch(batch, count, axis=int(scanned))
        rows = NamedSharding(mesh, PartitionSpec(*[None] * scanned, AXIS))

        def split(x: Any) -> Any:
            lead, (num, *rest) = np.shape(x)[:scanned], np.shape(x)[scanned:]
            return jax.device_put(x.reshape(*lead, count, num // count, *rest), rows)

        return jax.tree.map(split, batch)

    def compiled(update: Update, *, donate: bool = False, scanned: bool = False) -> Update:
        return jax.pmap(
            scan_steps(update) if scanned else update,
            axis_name=AXIS,
            in_axes=(None, None, int(scanned)),
            out_axes=None,  # all replicas are alike
            devices=devices,
            donate_argnums=_donated(donate),
        )

    return Mode(
        axis_name=AXIS,
        num_shards=num_shards,
        whole=whole,
        shardings=lambda state: jax.tree.map(lambda _: whole, state),
        place_batch=placed_batch,
        compile=compiled,
    )


def mode_of_mesh(mesh: Mesh, *, fsdp: bool = False) -> Mode:
    """Run over a mesh, the batch split over all its devices.

    Args:
        mesh: of :func:`make_mesh`.
        fsdp: split the state over the mesh's second axis; else every device holds it whole.

    Raises:
        ValueError: if the mesh has other axes, or axes of another type than Auto.
    """
    check_mesh(mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(state: PyTree) -> PyTree:
        return shardings(state, mesh, fsdp=fsdp)

    @jax.custom_vjp
    def gather(params: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(params, whole)

    # Left alone XLA would split the layers' work by the parameters' axes, not by the batch's.
    gather.defvjp(
        lambda params: (gather(params), None),
        lambda _, grads: (jax.lax.with_sharding_constraint(grads, placed(grads)),),
    )

    def compiled(update: Update, *, donate: bool = False, scanned: bool = False) -> Update:
        many = scan_steps(update) if scanned else update

        def kept_in_place(state: PyTree, key: Any, batch: Batch) -> Any:
            with gathering(gather if fsdp else lambda params: params):
                state, metrics = many(state, key, batch)
            return (
                jax.lax.with_sharding_constraint(state, placed(state)),
                jax.lax.with_sharding_constraint(metrics, whole),
            )

        return jax.jit(kept_in_place, donate_argnums=_donated(donate))

    return Mode(
        axis_name=None,
        num_shards=mesh.size,
        whole=whole,
        shardings=placed,
        place_batch=lambda batch, scanned=False: spread(batch, mesh, axis=int(scanned)),
        compile=compiled,
    )


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
        devices: by default all.
        donate: as in :func:`jit`.

    Returns:
        The update of this process's rows of the batch, their number divisible by that of its
        devices; it raises ValueError for others.
    """
    return _placing(mode_of_pmap(devices), update, donate)


def mesh(update: Update, mesh: Mesh, *, fsdp: bool = False, donate: bool = False) -> Update:
    """Compile an update over a mesh, the batch split over all its devices.

    Args:
        update: from `make_update` without an `axis_name`.
        mesh: of :func:`make_mesh`.
        fsdp: split the state over the mesh's second axis; else every device holds it whole.
        donate: as in :func:`jit`.

    Returns:
        The update of states in any placement and of batches (B, ...), B divisible by the number of
        devices; it raises ValueError for others. The new state is placed as :func:`place` does.

    Raises:
        ValueError: if the mesh has other axes, or axes of another type than Auto.
    """
    return _placing(mode_of_mesh(mesh, fsdp=fsdp), update, donate)


def map_rows(
    fn: Callable[..., PyTree], *, devices: Sequence[jax.Device] | None = None
) -> Callable[..., PyTree]:
    """Compile a function whose rows do not depend on each other, split over this process's devices.

    The devices do not wait for each other: a loop ends on each when its own rows are done.

    Args:
        fn: ``(shared, *rows) -> rows``: `shared` is a pytree that every device holds, the others
            and the result are pytrees of arrays (N, ...).
        devices: by default all of this process.

    Returns:
        The function of any N, padded with copies of the last row where the devices do not divide
        it; the result is of NumPy arrays. What was shared is not sent again if the next call has
        the same arrays.
    """
    devices = jax.local_devices() if devices is None else devices
    grid, rows = Mesh(np.asarray(devices), (AXIS,)), PartitionSpec(AXIS)

    def local(shared: PyTree, args: tuple[PyTree, ...]) -> PyTree:
        return fn(shared, *args)

    mapped = local
    if len(devices) > 1:
        mapped = jax.shard_map(
            local, mesh=grid, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
        )
    compiled = jax.jit(mapped)
    whole = NamedSharding(grid, PartitionSpec())
    by_row = NamedSharding(grid, rows)
    last: list[Any] = [None, None]  # what was shared in the last call, and its place

    def placed(shared: PyTree) -> PyTree:
        leaves = jax.tree.leaves(shared)
        if last[0] is None or [*map(id, last[0])] != [*map(id, leaves)]:
            last[:] = leaves, jax.device_put(shared, whole)
        return last[1]

    def call(shared: PyTree, *args: PyTree) -> PyTree:
        num_rows = len(jax.tree.leaves(args)[0])
        padded = -(-num_rows // len(devices)) * len(devices)
        taken = np.minimum(np.arange(padded), num_rows - 1)

        def pad(x: Any) -> Any:
            return jax.device_put(x if padded == num_rows else x[taken], by_row)

        out = compiled(placed(shared), jax.tree.map(pad, args))
        return jax.tree.map(lambda x: np.asarray(x)[:num_rows], out)

    return call


def _placing(mode: Mode, update: Update, donate: bool) -> Update:
    compiled = mode.compile(update, donate=donate)

    def step(state: PyTree, key: Any, batch: Batch) -> Any:
        batch = mode.place_batch(batch)
        # a state that another mode left elsewhere is fetched; one of this mode is where it was
        state = jax.device_put(state, mode.shardings(state))
        return compiled(state, everywhere(key, mode.whole), batch)

    return step


def _donated(donate: bool) -> tuple[int, ...]:
    return (0,) if donate else ()
