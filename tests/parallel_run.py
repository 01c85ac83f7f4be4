"""Fifty updates in every parallel mode on eight forced devices; prints what they gave as JSON.

    parallel_run.py DTYPE                 one process of eight devices
    parallel_run.py DTYPE PORT ID         process ID of two, of four devices each

Run by test_parallel.py in processes of their own: the number of devices is fixed at the start.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType

from jaxdiff import losses, nn, processes, training
from jaxdiff.training import distributed, parallel

STEPS, BATCH = 50, 32


def main(dtype, port=None, process_id=None):
    jax.config.update("jax_enable_x64", dtype == "float64")
    if port is not None:
        distributed.start(f"localhost:{port}", 2, int(process_id))
    process = processes.cosine()
    module = nn.MLP(
        4, width=32, depth=2, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype)
    )
    params, apply = nn.functional(module)
    apply = nn.on_log_snr(apply, process.log_snr)
    optimizer = optax.adamw(1e-3)
    loss_fn = losses.denoising(apply, process, prediction="v")
    batches = np.random.default_rng(0).normal(size=(STEPS, BATCH, 4)).astype(dtype)
    share = BATCH // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    key = jax.random.key(0)

    def start():
        return training.init(params, optimizer, ema_decay=0.9)

    def update(loss_fn=loss_fn, **options):
        return training.make_update(loss_fn, optimizer, ema_decay=0.9, **options)

    compiled = jax.jit(jax.checkpoint(loss_fn))
    compiled(params, key, {"x0": batches[0][:2]})  # traced before, at the shape of a part

    by_data, by_both = parallel.make_mesh(8), parallel.make_mesh(4, 2)
    by_fsdp = parallel.make_mesh(1, 8)
    modes = {
        "jit": (parallel.jit(update()), start()),
        "jit in parts": (parallel.jit(update(accumulate=4)), start()),
        "pmap": (parallel.pmap(update(axis_name=parallel.AXIS)), start()),
        "mesh": (parallel.mesh(update(), by_data), parallel.init(start, by_data)),
        "mesh fsdp": (
            parallel.mesh(update(), by_both, fsdp=True, donate=True),
            parallel.init(start, by_both, fsdp=True),
        ),
        "mesh all fsdp": (
            parallel.mesh(update(accumulate=2), by_fsdp, fsdp=True),
            parallel.init(start, by_fsdp, fsdp=True),
        ),
        "pmap of a compiled loss in parts": (
            parallel.pmap(update(compiled, axis_name=parallel.AXIS, accumulate=2)),
            start(),
        ),
        "mesh of a compiled loss": (
            parallel.mesh(update(compiled, accumulate=2), by_data),
            parallel.init(start, by_data),
        ),
    }
    if port is not None:  # collectives between processes are slow here
        modes = {name: modes[name] for name in ("jit", "pmap", "mesh fsdp")}
    ends, losses_seen, placed = {}, {}, {}
    for name, (step, state) in modes.items():
        seen = []
        rows = slice(None) if name.startswith("jit") else mine
        for batch in batches:
            state, metrics = step(state, key, {"x0": batch[rows]})
            seen.append(float(metrics["loss"]))
        ends[name], losses_seen[name] = distributed.gather(state), seen
        placed[name] = state

    def distance(one, other):
        pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
        gap = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
        return float(np.sqrt(gap / sum(float(np.sum(b**2)) for _, b in pairs)))

    if port is None:  # a run handed from mode to mode, and several steps in one call
        state = start()
        for i, batch in enumerate(batches):
            step = modes[("jit", "mesh fsdp", "pmap", "mesh")[i // 13]][0]
            state, _ = step(state, key, {"x0": batch})
        ends["handed on"] = jax.device_get(state)
        for name, mode in {
            "scanned jit": parallel.mode_of_one_device(),
            "scanned pmap": parallel.mode_of_pmap(),
            "scanned mesh": parallel.mode_of_mesh(by_both, fsdp=True),
        }.items():
            step = mode.compile(update(axis_name=mode.axis_name), donate=True, scanned=True)
            state = jax.device_put(start(), mode.shardings(start()))
            for five in batches.reshape(STEPS // 5, 5, BATCH, 4):
                batch = mode.place_batch({"x0": five}, True)
                state, metrics = step(state, parallel.everywhere(key, mode.whole), batch)
            assert metrics["loss"].shape == (5,)
            ends[name] = jax.device_get(state)

    def held(state):
        """Bytes on the first device over those of the whole state."""
        leaves = jax.tree.leaves(state)
        first = jax.local_devices()[0]
        mine = sum(
            shard.data.nbytes
            for leaf in leaves
            for shard in leaf.addressable_shards
            if shard.device == first
        )
        return mine / sum(leaf.nbytes for leaf in leaves)

    refusals = {}
    for name, attempt in {
        "rows": lambda: modes["pmap"][0](start(), key, {"x0": batches[0][:11]}),
        "mesh rows": lambda: parallel.place_batch({"x0": batches[0][:11]}, by_data),
        "parts": lambda: parallel.jit(update(accumulate=5))(start(), key, {"x0": batches[0]}),
        "unnamed axis": lambda: parallel.pmap(update())(start(), key, {"x0": batches[0]}),
        "devices": lambda: parallel.make_mesh(3, 2),
        "axes": lambda: parallel.mesh(update(), jax.make_mesh((8,), ("rows",))),
        "explicit": lambda: parallel.mesh(
            update(),
            jax.make_mesh((8, 1), (parallel.AXIS, parallel.FSDP), (AxisType.Explicit,) * 2),
        ),
    }.items():
        try:
            attempt()
        except ValueError as error:
            refusals[name] = str(error)
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "distances": {
                    name: distance(end.params, ends["jit"].params) for name, end in ends.items()
                },
                "ema": {name: distance(end.ema, ends["jit"].ema) for name, end in ends.items()},
                "moved": distance(ends["jit"].params, params),
                "first losses": {name: seen[0] for name, seen in losses_seen.items()},
                "shapes": [
                    [np.shape(leaf) for leaf in jax.tree.leaves(end)]
                    == [np.shape(leaf) for leaf in jax.tree.leaves(ends["jit"])]
                    for end in ends.values()
                ],
                "held": {name: held(state) for name, state in placed.items() if "mesh" in name},
                "refusals": refusals,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
