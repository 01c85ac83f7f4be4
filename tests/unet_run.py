"""One denoising step of Stable Diffusion 1.5's sizes: python -m unet_run float32|bfloat16."""

import json
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from unet_cases import PUBLISHED

from jaxdiff import Model, nn, sample, samplers
from jaxdiff.pretrained import schedulers, unet

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def made_up(like, rng):
    """Parameters that keep signals at about their size."""
    drawn = rng.normal(size=2**20 + 1).astype(np.float32)

    def leaf(path, spec):
        if path[-1].key == "scale":
            return jnp.ones(spec.shape, spec.dtype)
        if path[-1].key == "bias":
            return jnp.zeros(spec.shape, spec.dtype)
        scale = np.prod(spec.shape[:-1]) ** -0.5
        return jnp.asarray(np.resize(drawn, spec.shape) * np.float32(scale), spec.dtype)

    return jax.tree_util.tree_map_with_path(leaf, like)


def main(dtype):
    schedule = schedulers.read(SCHEDULER)
    make = lambda: unet.make(PUBLISHED["unet_sd15"], dtype=jnp.dtype(dtype))  # noqa: E731
    like, apply = nn.functional(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    params = made_up(like, rng)

    def at_time(params, x_t, t, cond, *, key=None):
        return apply(params, x_t, schedule.step(t), cond)

    model = Model(at_time, schedule.process, schedule.prediction)

    def step(params, x_t, tokens):
        sampler = samplers.ddim(model.process, model.denoiser(params, tokens))
        return sample(jax.random.key(0), sampler, x_t, jnp.array([0.982, 0.882]))

    x_t = jnp.asarray(rng.normal(size=(1, 64, 64, 4)), jnp.float32)
    tokens = jnp.asarray(rng.normal(size=(1, 77, 768)), jnp.float32)
    start = time.perf_counter()
    compiled = jax.jit(step).lower(params, x_t, tokens).compile()
    middle = time.perf_counter()
    x_s = np.asarray(compiled(params, x_t, tokens))
    memory = compiled.memory_analysis()
    said = {
        "finite": bool(np.isfinite(x_s).all()),
        "shape": x_s.shape,
        "arguments": memory.argument_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "compile_s": round(middle - start, 1),
        "run_s": round(time.perf_counter() - middle, 1),
        "spread": float(x_s.std()),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
