"""Fifty updates in every parallel mode on eight forced devices; prints what they gave as JSON.

Run by test_parallel.py in a process of its own, since the number of devices is fixed at the start.
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
from jaxdiff.training import parallel

STEPS, BATCH = 50, 32


def main(dtype):
    jax.config.update("jax_enable_x64", dtype == "float64")
    process = processes.cosine()
    module = nn.MLP(
        4, width=32, depth=2, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype)
    )
    params, apply = nn.functional(module)
    apply = nn.on_log_snr(apply, process.log_snr)
    optimizer = optax.adamw(1e-3)
    loss_fn = losses.denoising(apply, process, prediction="v")
    batches = np.random.default_rng(0).normal(size=(STEPS, BATCH, 4)).astype(dtype)
    key = jax.random.key(0)

    def start():
        return training.init(params, optimizer, ema_decay=0.9)

    def update(**options):
        return training.make_update(loss_fn, optimizer, ema_decay=0.9, **options)

    by_data, by_both = parallel.make_mesh(8), parallel.make_mesh(4, 2)
    by_fsdp = parallel.make_mesh(1, 8)
    modes = {
        "jit": (parallel.jit(update()), start()),
        "pmap": (parallel.pmap(update(axis_name=parallel.AXIS)), start()),
        "mesh": (parallel.mesh(update(), by_data), start()),
        "mesh fsdp": (
            parallel.mesh(update(), by_both, fsdp=True, donate=True),
            parallel.init(start, by_both, fsdp=True),
        ),
        "mesh all fsdp": (
            parallel.mesh(update(), by_fsdp, fsdp=True),
            parallel.place(start(), by_fsdp, fsdp=True),
        ),
    }
    ends, losses_seen, placed = {}, {}, {}
    for name, (step, state) in modes.items():
        seen = []
        for batch in batches:
            state, metrics = step(state, key, {"x0": batch})
            seen.append(float(metrics["loss"]))
        ends[name], losses_seen[name] = jax.device_get(state), seen
        placed[name] = state

    def distance(one, other):
        pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
        gap = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
        return float(np.sqrt(gap / sum(float(np.sum(b**2)) for _, b in pairs)))

    # a run handed from mode to mode
    state = start()
    for i, batch in enumerate(batches):
        step = modes[("jit", "mesh fsdp", "pmap", "mesh")[i // 13]][0]
        state, _ = step(state, key, {"x0": batch})
    ends["handed on"] = jax.device_get(state)

    def held(state):
        """Bytes on the first device over those of the whole state."""
        leaves = jax.tree.leaves(state)
        first = jax.devices()[0]
        mine = sum(
            shard.data.nbytes
            for leaf in leaves
            for shard in leaf.addressable_shards
            if shard.device == first
        )
        return mine / sum(leaf.nbytes for leaf in leaves)

    refusals = {}
    for name, attempt in {
        "rows": lambda: modes["pmap"][0](start(), key, {"x0": batches[0][:12]}),
        "mesh rows": lambda: modes["mesh"][0](start(), key, {"x0": batches[0][:12]}),
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
    main(sys.argv[1])
