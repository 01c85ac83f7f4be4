"""Functions of rows that do not depend on each other, over this process's devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff.devices.placement import AXIS
from jaxdiff.typing import PyTree


def shared_place(devices: Sequence[jax.Device]) -> NamedSharding:
    """Return where what rows share lies: whole on every device. What lies there is not moved."""
    return NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec())


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
    whole, rows = shared_place(devices), PartitionSpec(AXIS)
    grid = whole.mesh

    def local(shared: PyTree, args: tuple[PyTree, ...]) -> PyTree:
        return fn(shared, *args)

    mapped = local
    if len(devices) > 1:
        mapped = jax.shard_map(
            local, mesh=grid, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
        )
    compiled = jax.jit(mapped)
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
