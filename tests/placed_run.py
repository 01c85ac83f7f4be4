"""A U-Net's weights split over a mesh of eight forced devices, beside the same ones on one device.

    placed_run.py FOLDER

Run by test_pretrained_loading.py in a process of its own; prints what they gave as JSON.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from parallel_run import distance, held

from jaxdiff import pretrained, training
from jaxdiff.training import parallel


def nbytes(tree):
    """Bytes of all leaves together."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def follow(loaded):
    """An update that learns one number, by which noise is nearest to what frozen weights make."""

    def loss_of(state):
        def loss(params, key, batch):
            target = loaded.model.apply(state.frozen, batch["x_t"], batch["t"], batch["tokens"])
            error = params["scale"] * batch["x_t"] - target
            return jnp.mean(error**2, axis=(1, 2, 3)), {}

        return loss

    return training.make_update(loss_of=loss_of, optimizer=optax.sgd(0.1), ema_decay=0.9)


def main(folder):
    mesh = parallel.make_mesh(1, 8)
    mode = parallel.mode_of_mesh(mesh, fsdp=True)
    one, split = (pretrained.load(folder, place=place) for place in (None, mode.shardings))
    draw = np.random.default_rng(0).standard_normal
    x_t, tokens = (draw(shape).astype(np.float32) for shape in ((8, 4, 4, 4), (8, 5, 12)))
    batch = {"x_t": x_t, "t": np.full(8, 0.5, np.float32), "tokens": tokens}

    given = jax.device_put(tuple(batch.values()), mode.whole)
    compiled = jax.jit(split.model.apply).lower(split.params, *given).compile()
    output = compiled(split.params, *given)
    wanted = jax.jit(one.model.apply)(one.params, *batch.values())

    update, start = follow(one), {"scale": jnp.zeros(())}
    key = jax.random.key(0)
    alone, _ = parallel.jit(update)(update.init(start, frozen=one.params), key, batch)
    step = parallel.mesh(update, mesh, fsdp=True)
    shared, _ = step(update.init(start, frozen=split.params), key, batch)
    said = {
        "devices": jax.device_count(),
        "held": held(split.params),
        "held_after": held(shared.frozen),
        "distance": distance(output, wanted),
        "argument_bytes": compiled.memory_analysis().argument_size_in_bytes,
        "given_bytes": held(split.params) * nbytes(split.params) + nbytes(given),
        "learnt": [float(state.params["scale"]) for state in (alone, shared)],
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
