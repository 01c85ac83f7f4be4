"""The interpolant transformer against its source, whose time runs the other way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from network_cases import quick_jit
from peers.common import read, read_keys
from test_pretrained_dit import error, weights

from jaxdiff import nn, predictions, samplers
from jaxdiff.pretrained import naming, sit


def loaded(name):
    golden = read(name)
    module = nnx.eval_shape(lambda: sit.make(golden.config, dtype=jnp.float64))
    like, apply = nn.functional(module)
    return naming.fill(sit.TABLE, weights(golden), like, "float64"), sit.model(apply), golden.arrays


@pytest.mark.parametrize("name", ["sit_sigma", "sit_plain"])
def test_velocity_score_and_samples_are_those_of_its_source(name):
    params, model, arrays = loaded(name)
    x, t, y = arrays["x"], 1.0 - arrays["u"], arrays["y"]
    velocity = quick_jit(model.apply)(params, x, t, y)
    assert error(velocity, -arrays["velocity"]) < 1e-10
    score = predictions.convert(model.process, "velocity", "score", velocity, x, t)
    assert error(score, arrays["score"]) < 1e-10
    sampler = samplers.ddim(model.process, model.denoiser(params, y))  # Euler's steps on this flow
    sample = quick_jit(
        lambda x: samplers.sample(jax.random.key(0), sampler, x, jnp.linspace(1.0, 0.0, 6))
    )(x)
    assert error(sample, arrays["sample"]) < 1e-10


def test_the_published_weights_are_those_of_the_published_size():
    shapes = read_keys("sit_xl_2")
    assert sum(map(np.prod, shapes.values())) == 675_129_632
    config = sit.config_of(shapes)
    assert config["learn_sigma"]
    like = nn.functional(nnx.eval_shape(lambda: sit.make(config)))[0]
    assert len(naming.plan(sit.TABLE, shapes, like).sources) == len(shapes) - 1
