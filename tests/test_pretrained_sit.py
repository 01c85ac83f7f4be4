"""The interpolant transformer against its source, whose time runs the other way."""

import jax
import jax.numpy as jnp
import pretrained_cases as cases
import pytest
from peers.common import read, read_keys
from test_pretrained_dit import weights

from jaxdiff import predictions, samplers
from jaxdiff.pretrained import naming, sit


def loaded(name):
    golden = read(name)
    like, apply = cases.abstract(sit, golden.config, "float64")
    return naming.fill(sit.TABLE, weights(golden), like, "float64"), sit.model(apply), golden.arrays


@pytest.mark.parametrize("name", ["sit_sigma", "sit_plain"])
def test_velocity_score_and_samples_are_those_of_its_source(name):
    params, model, arrays = loaded(name)
    x, t, y = arrays["x"], 1.0 - arrays["u"], arrays["y"]
    sampler = samplers.ddim(model.process, model.denoiser(params, y))  # Euler's steps on this flow

    @jax.jit
    def evaluate(x, t):
        velocity = model.apply(params, x, t, y)
        score = predictions.convert(model.process, "velocity", "score", velocity, x, t)
        sample = samplers.sample(jax.random.key(0), sampler, x, jnp.linspace(1.0, 0.0, 6))
        return velocity, score, sample

    velocity, score, sample = evaluate(x, t)
    assert cases.error(velocity, -arrays["velocity"]) < 1e-10
    assert cases.error(score, arrays["score"]) < 1e-10
    assert cases.error(sample, arrays["sample"]) < 1e-10


def test_the_published_weights_have_the_names_and_sizes_of_dit():
    assert read_keys("sit_xl_2") == read_keys("dit_xl_2")  # mapped by the test of that
