"""The same work a device on more and more devices."""

import os
import statistics
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np

from experiments.benches.timing import time_in_turn
from experiments.benches.training import Preset, digits
from experiments.common import options
from experiments.common.command import Refusal
from jaxdiff import training
from jaxdiff.training import parallel


def devices_of(forced: int | None) -> list[jax.Device]:
    """Return the devices, so many of this machine's CPU if asked; before anything else of JAX."""
    if forced is not None:
        flag = f"--xla_force_host_platform_device_count={forced}"
        os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}"
    devices = jax.devices()
    if forced is not None and len(devices) != forced:
        raise Refusal(f"--force-devices needs the CPU alone; JAX sees {devices[0].device_kind}.")
    return devices


def scaling(
    preset: Preset = "smoke",
    seed: int = 0,
    rounds: int = 9,
    steps: int = 5,
    force_devices: int | None = None,
    mode: Literal["mesh", "pmap"] = "mesh",
    fsdp: bool = False,
) -> None:
    """Time updates on 1, 2, 4, ... devices, each with a batch of its own of the preset's size.

    Forced devices share the cores of one machine: n of them take n times as long at best, which
    the ratio allows for; real ones should take as long as one.

    Args:
        preset: Of the digits experiment.
        seed: Of parameters and noise.
        rounds: How many timings of each.
        steps: How many updates one timing holds.
        force_devices: Make so many devices of this machine's CPU, where JAX would see one.
        mode: A mesh, or `jax.pmap`.
        fsdp: Split the state over all the devices of a mesh too.
    """
    options.check_counts(rounds=rounds, steps=steps, force_devices=force_devices)
    if fsdp and mode != "mesh":
        raise Refusal(f"--fsdp needs --mode mesh; got {mode}.")
    devices = devices_of(force_devices)
    ours, key = digits(preset, seed), jax.random.key(seed)
    batch = next(ours.batches())
    counts = [count for count in (2**i for i in range(20)) if count <= len(devices)]

    def side(count: int) -> Callable[[], None]:
        few = devices[:count]
        if mode == "pmap":
            placing = parallel.mode_of_pmap(few)
        else:
            shape = (1, count) if fsdp else (count, 1)
            grid = parallel.make_mesh(*shape, devices=few, slices=1)
            placing = parallel.mode_of_mesh(grid, fsdp=fsdp)
        update = training.make_update(
            ours.loss_fn,
            ours.optimizer,
            ema_decay=ours.config.ema_decay,
        )
        step = placing.compile(update, donate=True)
        state = jax.device_put(ours.start(), placing.shardings(ours.start()))
        here = parallel.everywhere(key, placing.whole)
        placed = placing.place_batch(jax.tree.map(lambda x: np.concatenate([x] * count), batch))

        def run() -> None:
            nonlocal state
            for _ in range(steps):
                state, _ = step(state, here, placed)
            jax.block_until_ready(state)

        return run

    sides = {str(count): side(count) for count in counts}
    times = time_in_turn(sides, rounds)
    medians = {int(name): statistics.median(t) / steps for name, t in times.items()}
    print(f"{'devices':>7} {'batch':>7} {'ms a step':>10} {'examples/s':>11} {'ratio':>7}")
    ratio = 1.0
    for count, seconds in medians.items():
        alone = medians[1] * (count if force_devices is not None else 1)
        ratio = seconds / alone
        size = count * ours.config.batch_size
        print(f"{count:7d} {size:7d} {1e3 * seconds:10.2f} {size / seconds:11.0f} {ratio:7.3f}")
    print(f"ratio {ratio:.3f}")
