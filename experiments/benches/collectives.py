"""What a step moves between devices, and between slices, read from the compiled program."""

from collections import Counter

import jax
import numpy as np

from experiments.benches.scaling import devices_of
from experiments.benches.training import Preset, digits
from experiments.common import options
from experiments.common.devices import Running
from jaxdiff.devices import slices as of_slices
from jaxdiff.devices.collectives import collectives as read
from jaxdiff.training import parallel


def collectives(
    preset: Preset = "smoke",
    seed: int = 0,
    fsdp: int = 1,
    slices: int | None = None,
    force_devices: int | None = None,
) -> None:
    """Count the bytes that a step moves out of a device, and as many into it.

    Beside them stands what docs/pods.md says; the ratio is of what crosses slices or, where there
    is one, of all.

    Args:
        preset: Of the digits experiment.
        seed: Of parameters and noise.
        fsdp: Devices that the state is split over.
        slices: Equal slices that the devices are of; by default those that JAX finds.
        force_devices: Make so many devices of this machine's CPU, where JAX would see one.
    """
    options.check_counts(fsdp=fsdp, slices=slices, force_devices=force_devices)
    count = len(devices_of(force_devices))
    mesh = Running(fsdp=fsdp, slices=slices).mesh()
    number = dict(zip(jax.devices(), of_slices.numbers(jax.devices(), slices), strict=True))
    place = [number[device] for device in mesh.devices.flat]
    ours, mode = digits(preset, seed), parallel.mode_of_mesh(mesh, fsdp=fsdp > 1)
    state = parallel.init(ours.start, mesh, fsdp=fsdp > 1)
    batch = jax.tree.map(lambda x: np.concatenate([x] * count), next(ours.batches()))
    key = parallel.everywhere(jax.random.key(seed), mode.whole)
    step = jax.jit(mode.compile(ours.update))
    compiled = step.lower(state, key, mode.place_batch(batch)).compile()
    found = read(compiled.as_text() or "", count)

    moved, across = Counter[str](), Counter[str]()
    for each in found:
        moved[each.kind] += round(each.moved)
        across[each.kind] += round(each.moved) * each.crosses(place)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{size} parameters, a mesh of {count // fsdp} x {fsdp}, {len({*place})} slices")
    print(f"{'bytes a device':<20} {'in all':>12} {'across slices':>14}")
    for kind in sorted(moved):
        print(f"{kind:<20} {moved[kind]:12d} {across[kind]:14d}")
    between = 8 * size / fsdp * (1 - fsdp / count)
    within = 8 * size * (1 - 1 / fsdp)
    several = len({*place}) > 1
    said = (within + between, between if several else 0.0)
    print(f"{'by the arithmetic':<20} {said[0]:12.0f} {said[1]:14.0f}")
    counted = across.total() if several else moved.total()
    print(f"ratio {counted / (said[several] or 1.0):.3f}")
