"""Updates over meshes of two simulated slices; prints what they gave and moved as JSON.

    slices_run.py                 one process of eight devices
    slices_run.py PORT ID         process ID of two, of four devices each

Run by test_slices.py in processes of their own: the number of devices is fixed at the start.
"""

import json
import sys
import tempfile

import jax
import numpy as np
import optax
from flax import nnx
from parallel_run import distance

from experiments.common.devices import parts_for
from jaxdiff import losses, nn, processes, training
from jaxdiff.devices.collectives import collectives
from jaxdiff.training import distributed, parallel

BATCH, STEPS, FEATURES = 32, 12, 4
DEVICES = 8
BY_TURNS = [0, 1] * 4
"""Slices whose devices alternate, as those of processes that are dealt out by turns."""


def main(port=None, process_id=None):
    if port is not None:
        distributed.start(f"localhost:{port}", 2, int(process_id))
    process, optimizer = processes.cosine(), optax.adamw(1e-3)
    params, apply = nn.functional(nn.MLP(FEATURES, width=64, depth=1, rngs=nnx.Rngs(0)))
    apply = nn.on_log_snr(apply, process.log_snr)
    loss_fn = losses.denoising(apply, process, prediction="v")
    update = training.make_update(loss_fn, optimizer, ema_decay=0.9)
    batches = np.random.default_rng(0).normal(size=(STEPS, BATCH, FEATURES)).astype(np.float32)
    key = jax.random.key(0)

    def start():
        return training.init(params, optimizer, ema_decay=0.9)

    def mine(rows):
        share = BATCH // jax.process_count()
        return {"x0": rows[jax.process_index() * share :][:share]}

    def run(mode):
        """Return the end, the first loss, and the text of the program."""
        state, here = start(), parallel.everywhere(key, mode.whole)
        state = jax.device_put(state, mode.shardings(state))
        step, seen = mode.compile(update), []
        placed = mode.place_batch(mine(batches[0]))
        program = jax.jit(step).lower(state, here, placed).compile()
        for rows in batches:
            state, metrics = program(state, here, mode.place_batch(mine(rows)))
            seen.append(float(metrics["loss"]))
        return distributed.gather(state.params), seen[0], program.as_text()

    state, alone, seen = start(), parallel.jit(update), []
    for rows in batches:
        state, metrics = alone(state, key, {"x0": rows})
        seen.append(float(metrics["loss"]))
    wanted, first = jax.device_get(state.params), seen[0]

    found, index = {}, {each: i for i, each in enumerate(jax.devices())}
    for data, fsdp in ((8, 1), (2, 4), (4, 2))[: 3 if port is None else 2][port is not None :]:
        mesh = parallel.make_mesh(data, fsdp, slices=BY_TURNS)
        end, loss, text = run(parallel.mode_of_mesh(mesh, fsdp=fsdp > 1))
        moved, place = collectives(text, DEVICES), [BY_TURNS[index[x]] for x in mesh.devices.flat]
        found[f"{data} x {fsdp}"] = {
            "ids": [[index[each] for each in row] for row in mesh.devices],
            "processes": [each.process_index for each in mesh.devices.flat],
            "distance": distance(end, wanted),
            "first": loss / first,
            "crossing": crossing(moved, place),
            "kinds across": sorted({each.kind for each in moved if each.crosses(place)}),
            "in the order of jax.devices()": crossing(moved, BY_TURNS),
        }
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    said = {"params": size, "meshes": found}
    if port is None:
        said["elastic"] = elastic(start, update, batches, key)
    print(json.dumps(said))


def crossing(moved, slices):
    """The bytes that go out of a device in groups across slices."""
    return sum(each.moved for each in moved if each.crosses(slices))


def elastic(start, update, batches, key):
    """How far a run is from the unharmed one that goes on four of eight devices, then on eight."""

    def fit(folder, count, num_steps):
        mesh = parallel.make_mesh(count // 2, 2, devices=jax.devices()[:count])
        accumulate = parts_for(BATCH // count, BATCH // DEVICES)
        mode = parallel.mode_of_mesh(mesh, fsdp=True)._replace(accumulate=accumulate)
        state = training.fit(
            folder,
            start,
            update,
            lambda step: ({"x0": rows} for rows in batches[step:]),
            key=key,
            num_steps=num_steps,
            mode=mode,
        )
        return jax.device_get((state.params, state.ema)), accumulate

    with tempfile.TemporaryDirectory() as moved, tempfile.TemporaryDirectory() as unharmed:
        wanted, _ = fit(unharmed, DEVICES, STEPS)
        parts = [fit(moved, *each)[1] for each in ((8, STEPS // 3), (4, 2 * STEPS // 3))]
        ended, last = fit(moved, DEVICES, STEPS)
    return {"distance": distance(ended, wanted), "parts": [*parts, last]}


if __name__ == "__main__":
    main(*sys.argv[1:])
