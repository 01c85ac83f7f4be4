r"""How an update is compiled: for one device, by pmap, or over a mesh.

Every mode takes and returns the same state, without a replica axis, and makes the same update: the
noise of example i of the global batch is that of i wherever it is computed.

A mesh has two axes. The batch is split over both; the state is whole on every device or, with
`fsdp`, split over the second (Rajbhandari et al. 2020, arXiv:1910.02054, stage 3; Zhao et al. 2023,
arXiv:2304.11277), XLA gathering what a layer needs and scattering its gradients.

:func:`jit`, :func:`pmap` and :func:`mesh` compile an update that takes states and batches wherever
they are; each call makes a program of its own, so call them once. A training loop places states and
batches itself, once and ahead of time, as a :class:`Mode` says.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxdiff import checks
from jaxdiff.devices.map_rows import map_rows
from jaxdiff.devices.placement import (
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
from jaxdiff.training.program import Program, Steps
from jaxdiff.training.update import Transferable, Update
from jaxdiff.typing import Batch, Key, PyTree

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
        axis_name: of the axis that `compile` maps, None where it maps none; a plain function that
            `compile` is given must average over it, an update of `make_update` is told.
        num_shards: into how many equal parts a global batch is split.
        whole: where what every device holds lies: the key, and states that are not split.
        shardings: state, or its shapes -> where each leaf lies.
        place_batch: this process's rows of a batch -> the batch where `compile` wants it; of
            several batches, their axis leading, where `scanned` is true.
        compile: (update, donate=, scanned=) -> the compiled update of what was placed so; a
            scanned one makes an update of each of several batches in one call. What is frozen
            in a state goes in and does not come out: it is neither copied nor donated.
        accumulate: in how many parts :meth:`steps` takes the gradient of a batch; None as the
            update was made. ``mode_of_pmap()._replace(accumulate=4)``.
        steps_per_call: updates in one dispatch; for small models on accelerators. On a CPU the
            gradient of a convolution inside the loop is 5 to 10 times slower.
    """

    axis_name: str | None
    num_shards: int
    whole: Sharding
    shardings: Callable[[PyTree], PyTree]
    place_batch: Callable[..., Batch]
    compile: Callable[..., Update]
    accumulate: int | None = None
    steps_per_call: int = 1

    def steps(self, update: Update) -> Steps:
        """Return how the steps of a run are carried out; each donates the state before it.

        Args:
            update: from `make_update` or `networks.alternate`, which are told of the axis and the
                parts; or a plain function.

        Raises:
            TypeError: if `accumulate` or `steps_per_call` is no whole number, or `accumulate` is
                given and the update cannot be told of it.
            ValueError: if one is below 1.
        """
        per_call = checks.count("steps_per_call", self.steps_per_call)
        if self.accumulate is not None:
            if not isinstance(update, Transferable):
                raise TypeError(
                    "`update` must be of make_update or networks.alternate to be made in parts "
                    f"(`accumulate`); got {checks.shown(update)}."
                )
            update = update.in_parts(self.accumulate)
        several = self.compile(update, donate=True, scanned=True) if per_call > 1 else None
        return Steps(
            self.compile(update, donate=True),
            several,
            per_call,
            self.place_batch,
            getattr(update, "skip_nonfinite", False),
        )


def mode_of_one_device() -> Mode:
    """Run on the first device of this process, however many there are."""
    whole = SingleDeviceSharding(jax.local_devices()[0])

    def compiled(update: Update, *, donate: bool = False, scanned: bool = False) -> Update:
        program = Program(update, scanned=scanned)
        return program.compiled(jax.jit(program, donate_argnums=_donated(donate)))

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
        program = Program(update, axis_name=AXIS, scanned=scanned)
        mapped = jax.pmap(
            program,
            axis_name=AXIS,
            in_axes=(None, None, None, int(scanned)),
            out_axes=None,  # all replicas are alike
            devices=devices,
            donate_argnums=_donated(donate),
        )
        return program.compiled(mapped)

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
        program = Program(update, scanned=scanned, gather=gather if fsdp else None)

        def kept_in_place(state: PyTree, frozen: PyTree, key: Key, batch: Batch) -> Any:
            state, metrics = program(state, frozen, key, batch)
            return (
                jax.lax.with_sharding_constraint(state, placed(state)),
                jax.lax.with_sharding_constraint(metrics, whole),
            )

        return program.compiled(jax.jit(kept_in_place, donate_argnums=_donated(donate)))

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
        update: from `make_update`, or `networks.alternate`.
        donate: let the new state take the buffers of the old one, which is then gone; all but
            what is frozen in it.
    """
    program = Program(update)
    return program.compiled(jax.jit(program, donate_argnums=_donated(donate)))


def pmap(
    update: Update, *, devices: Sequence[jax.Device] | None = None, donate: bool = False
) -> Update:
    """Compile an update for several devices by `jax.pmap`, each with a shard of the batch.

    Args:
        update: from `make_update`, or `networks.alternate`. It is told the axis; a plain function
            must average over `AXIS` itself.
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
        update: from `make_update`, or `networks.alternate`; or a plain function, of which XLA
            alone decides how a split state is computed with.
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
