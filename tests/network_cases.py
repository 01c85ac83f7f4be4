"""Tiny networks for the tests, and a few calls of them that need not be compiled anew."""

import functools

import jax
import numpy as np
import pytest
from cases import few
from flax import nnx

from jaxdiff import nn

NUM_CLASSES = 3
# Nearly all the time here is LLVM's; these arrays are too small to need its optimisations.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(name, **options):
    """Build a tiny network: (module, shape of one example)."""
    options = {"num_classes": NUM_CLASSES, "rngs": nnx.Rngs(0), **options}
    if name == "mlp":
        return nn.MLP(2, width=16, depth=2, **options), (2,)
    shape = (8, 8, 1)
    if name == "unet":
        return nn.UNet(shape, channels=4, multipliers=(1, 2), num_heads=2, **options), shape
    return nn.DiT(shape, width=16, depth=1, num_heads=2, **options), shape


@functools.cache
def outline(name, **options):
    """Build a network with shapes for parameters: drawing them is what takes time to compile."""
    module = nnx.eval_shape(lambda: make(name, **options)[0])
    return module, (2,) if name == "mlp" else (8, 8, 1)


@functools.cache
def prepare(name, **options):
    """Return (params, jitted apply, x, t, labels) for a batch of 4; compiled once for all tests.

    No parameter is zero, so that every path is open.
    """
    module, shape = outline(name, **options)
    shapes, apply = nn.functional(module)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: (0.3 * rng.normal(size=a.shape)).astype(a.dtype), shapes)
    x = rng.normal(size=(4, *shape)).astype(np.float32)
    t = np.linspace(-5.0, 5.0, 4, dtype=np.float32)
    params, x, t, labels = jax.device_put((params, x, t, np.arange(4)))  # compiles nothing
    return params, quick_jit(apply), x, t, labels


def check(name, x, t, cond=None, **options):
    """Run the checks of a network, and none of its arithmetic."""
    params, apply = nn.functional(outline(name, **options)[0])
    jax.eval_shape(lambda params, x, t: apply(params, x, t, cond), params, x, t)


each_network = pytest.mark.parametrize("name", ["mlp", "unet", "dit"])
# Where the U-Net's gradient or first values are what takes long, and nothing else is told by them.
quick_networks = pytest.mark.parametrize("name", few(["mlp", "unet", "dit"], ["mlp", "dit"]))
# Where the three share the code under test: the U-Net takes several seconds a compilation.
mlp_and_dit = pytest.mark.parametrize("name", ["mlp", "dit"])
