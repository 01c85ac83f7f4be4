"""What the tests of published models share: a network filled from a golden, or from names alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff import nn
from jaxdiff.pretrained import naming

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
"""Of outputs, in relative L2."""


def abstract(module, config, dtype="float32", method="__call__"):
    """The network of a config without memory: (shapes of its parameters, apply)."""
    made = nnx.eval_shape(lambda: module.make(config, dtype=jnp.dtype(dtype)))
    return nn.functional(made, method)


def loaded(module, golden, dtype):
    """The network of a golden with its weights: (params, apply)."""
    like, apply = abstract(module, golden.config, dtype)
    return naming.fill(module.TABLE, golden.weights(), like, dtype), apply


def error(found, expected):
    """The relative L2 distance."""
    assert found.shape == expected.shape
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def num_mapped(module, config, *files, method="__call__"):
    """Map all names of published files; return the number of the network's parameters."""
    like, _ = abstract(module, config, method=method)
    for shapes in files:
        naming.plan(module.TABLE, shapes, like)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like))
