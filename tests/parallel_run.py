"""Updates in every parallel mode on eight forced devices; prints what they gave as JSON.

    parallel_run.py DTYPE                 one process of eight devices
    parallel_run.py DTYPE PORT ID         process ID of two, of four devices each

Fifty in float64, twenty in float32. Run by test_parallel.py in processes of their own: the number
of devices is fixed at the start.
"""

import functools
import json
import sys
import tempfile

import autoencoder_cases
import jax
import jax.numpy as jnp
import networks_cases
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType

from jaxdiff import losses, nn, numerics, processes, training
from jaxdiff.training import distributed, parallel
from jaxdiff.training.checkpoint import Checkpoints

STEPS = {"float32": 20, "float64": 50}
BATCH = 32
NETWORK_STEPS = 20


def distance(one, other):
    one, other = (jax.tree.leaves(jax.device_get(each)) for each in (one, other))
    pairs = list(zip(one, other, strict=True))
    gap = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
    return float(np.sqrt(gap / sum(float(np.sum(b**2)) for _, b in pairs)))


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


def run(step, state, batches, key):
    for batch in batches:
        state, _ = step(state, key, {"x0": batch})
    return state


def several_networks(dtype, batches, key):
    """A GAN, a teacher's student and an autoencoder in every mode, and each resumed on a mesh."""
    grid, rows = parallel.make_mesh(4, 2), batches[:NETWORK_STEPS]
    updates = {
        "gan": networks_cases.gan,
        "student": networks_cases.student,
        "autoencoder": functools.partial(autoencoder_cases.update, dtype),
    }
    starts = {
        "gan": lambda update: update.init(networks_cases.gan_params(dtype)),
        "student": lambda update: update.init(
            networks_cases.student_params(dtype),
            networks_cases.teacher(dtype),
            networks_cases.statistics(dtype),
        ),
        "autoencoder": lambda update: update.init(
            autoencoder_cases.params(dtype), autoencoder_cases.frozen(dtype)
        ),
    }
    found = {}
    for name, make in updates.items():
        pictures = name == "autoencoder"
        batches = autoencoder_cases.images(NETWORK_STEPS, BATCH, dtype) if pictures else rows

        def start(make=make, name=name):
            return starts[name](make())

        in_parts = {"accumulate": 2} if pictures else {}
        ends = {"jit": run(parallel.jit(make()), start(), batches, key)}
        ends["pmap"] = run(parallel.pmap(make(**in_parts)), start(), batches, key)
        step = parallel.mesh(make(skip_nonfinite=True), grid, fsdp=True, donate=True)
        state = run(step, parallel.init(start, grid, fsdp=True), batches[: NETWORK_STEPS // 2], key)
        with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
            checkpoints.save(int(state.step), state)
            ends["mesh fsdp"] = run(step, state, batches[NETWORK_STEPS // 2 :], key)
            target = parallel.init(start, grid, fsdp=True)
            state = jax.tree.map(jnp.copy, checkpoints.restore(target).state)
        resumed = run(step, state, batches[NETWORK_STEPS // 2 :], key)
        if name == "student":  # a plain function cannot be told to gather

            def plain(*args, make=make):
                return make()(*args)

            step = parallel.mesh(plain, grid, fsdp=True, donate=True)
            ends["plain on a mesh"] = run(step, start(), batches, key)
        pairs = zip(jax.tree.leaves(resumed), jax.tree.leaves(ends["mesh fsdp"]), strict=True)
        wanted = ends["jit"]
        found[name] = {
            "params": {mode: distance(end.params, wanted.params) for mode, end in ends.items()},
            "rest": {
                mode: distance((end.ema, end.statistics), (wanted.ema, wanted.statistics))
                for mode, end in ends.items()
            },
            "moved": distance(wanted.params, start().params),
            "resumed": all(np.array_equal(a, b) for a, b in pairs),
            "held": held((resumed.params, resumed.ema, resumed.opt_state, resumed.frozen)),
        }
    return found


def wrapped_losses(batch, key):
    """How far one step of a wrapped loss is from the plain one's, of gradients that are noise.

    Each wrap has parameters of its own in one update, whose loss is the sum of theirs.
    """
    optimizer = optax.sgd(1.0)

    def plain(params, key, batch):
        noise = numerics.normal(key, batch["x0"])
        return (batch["x0"] + noise) ** 2 @ params["w"], {}

    def vmapped(params, key, batch):
        many = jax.tree.map(lambda leaf: leaf[None], params)
        found = jax.vmap(plain, (0, None, None))(many, key, batch)
        return jax.tree.map(lambda leaf: leaf[0], found)

    wraps = {"jit": jax.jit(plain), "checkpoint": jax.checkpoint(plain), "vmap": vmapped}

    def wrapped(params, key, batch):
        return sum(loss(params[name], key, batch)[0] for name, loss in wraps.items()), {}

    def start(*names):
        params = {name: {"w": np.ones(4, batch.dtype)} for name in names}
        return training.init(params, optimizer, ema_decay=0.9)

    update = training.make_update(
        lambda params, *args: plain(params["plain"], *args), optimizer, ema_decay=0.9
    )
    wanted, _ = parallel.jit(update)(start("plain"), key, {"x0": batch})
    for loss in wraps.values():  # traced before, at the shape of a part
        jax.eval_shape(loss, {"w": np.ones(4, batch.dtype)}, key, {"x0": batch[:2]})
    update = training.make_update(wrapped, optimizer, ema_decay=0.9, accumulate=2)
    found = {}
    for mode, step in {
        "pmap": parallel.pmap(update),
        "mesh": parallel.mesh(update, parallel.make_mesh(8)),
    }.items():
        end, _ = step(start(*wraps), key, {"x0": batch})
        for name in wraps:
            found[f"{name} {mode}"] = distance(end.params[name], wanted.params["plain"])
    return found


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
    batches = np.random.default_rng(0).normal(size=(STEPS[dtype], BATCH, 4)).astype(dtype)
    share = BATCH // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    key = jax.random.key(0)

    def start():
        return training.init(params, optimizer, ema_decay=0.9)

    def update(loss_fn=loss_fn, **options):
        return training.make_update(loss_fn, optimizer, ema_decay=0.9, **options)

    compiled = jax.jit(jax.checkpoint(loss_fn))
    jax.eval_shape(
        compiled, params, key, {"x0": batches[0][:2]}
    )  # traced before, at the shape of a part

    by_data, by_both = parallel.make_mesh(8), parallel.make_mesh(4, 2)
    by_fsdp = parallel.make_mesh(1, 8)
    names = ["jit", "pmap", "mesh fsdp"]
    if port is None:  # collectives between processes are slow here
        names += ["mesh", "mesh all fsdp"]
    if port is None and dtype == "float64":
        names += ["jit in parts", "pmap of a compiled loss in parts", "mesh of a compiled loss"]

    def mode(name):
        """Return the compiled update and the state that it begins with."""
        if name == "jit":
            return parallel.jit(update()), start()
        if name == "jit in parts":
            return parallel.jit(update(accumulate=4)), start()
        if name == "pmap":
            return parallel.pmap(update()), start()
        if name == "pmap of a compiled loss in parts":
            options = {"axis_name": parallel.AXIS, "accumulate": 2}
            return parallel.pmap(update(compiled, **options)), start()
        if name == "mesh":
            return parallel.mesh(update(), by_data), parallel.init(start, by_data)
        if name == "mesh of a compiled loss":
            step = parallel.mesh(update(compiled, accumulate=2), by_data)
            return step, parallel.init(start, by_data)
        if name == "mesh fsdp":
            step = parallel.mesh(update(), by_both, fsdp=True, donate=True)
            return step, parallel.init(start, by_both, fsdp=True)
        step = parallel.mesh(update(accumulate=2), by_fsdp, fsdp=True)
        return step, parallel.init(start, by_fsdp, fsdp=True)

    modes = {name: mode(name) for name in names}
    ends, losses_seen, placed = {}, {}, {}
    for name, (step, state) in modes.items():
        seen = []
        rows = slice(None) if name.startswith("jit") else mine
        for batch in batches:
            state, metrics = step(state, key, {"x0": batch[rows]})
            seen.append(float(metrics["loss"]))
        ends[name], losses_seen[name] = distributed.gather(state), seen
        placed[name] = state

    if (
        port is None and dtype == "float64"
    ):  # a run handed from mode to mode, and several steps in one call
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
            for five in batches.reshape(-1, 5, BATCH, 4):
                batch = mode.place_batch({"x0": five}, True)
                state, metrics = step(state, parallel.everywhere(key, mode.whole), batch)
            assert metrics["loss"].shape == (5,)
            ends[name] = jax.device_get(state)

    refusals = {}
    for name, attempt in {
        "rows": lambda: modes["pmap"][0](start(), key, {"x0": batches[0][:11]}),
        "mesh rows": lambda: parallel.place_batch({"x0": batches[0][:11]}, by_data),
        "parts": lambda: parallel.jit(update(accumulate=5))(start(), key, {"x0": batches[0]}),
        "unnamed axis": lambda: parallel.pmap(lambda *args: update()(*args))(
            start(), key, {"x0": batches[0]}
        ),
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
                "networks": several_networks(dtype, batches, key)
                if port is None and dtype == "float32"
                else {},
                "wrapped": wrapped_losses(batches[0], key) if port is None else {},
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
