"""Guidance by the command line: what it makes of a model, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.command import Refusal
from experiments.images.generator import make_generator
from experiments.images.guided import RULES, Guidance, GuidedRecipe, Weaker, guided_by
from experiments.images.model import PRESETS, Recipe, build_model
from jaxdiff import Model, data, guidance, processes, sample, samplers, timesteps

SHAPE, LABELS, STEPS = (2, 2, 1), np.array([0, 1, 2, 1]), 5
PROCESS = processes.cosine()
IMAGES = data.Description(shape=SHAPE, num_levels=17, num_classes=3)
CONFIG = dataclasses.replace(PRESETS["smoke"], width=8)


def apply(params, x_t, t, cond=None, *, key=None):
    """A network of v to which labels matter; 3 is the null one."""
    shift = 0.0 if cond is None else params["shift"][cond][:, None, None, None]
    return jnp.tanh(params["gain"] * x_t + shift)


RECIPE = Recipe(lambda: {}, Model(apply, PROCESS, "v"), 3)
PARAMS = {"gain": jnp.asarray(0.7), "shift": jnp.array([-0.5, 0.4, 1.0, 0.1])}
WEAKER = {"gain": jnp.asarray(0.3), "shift": jnp.array([-0.2, 0.2, 0.3, 0.1])}


def composed(away, scale, rule, interval):
    """The same in Python, by the library alone."""
    key_start, key_path = jax.random.split(jax.random.key(7))
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key_start, np.arange(len(LABELS)))
    ts = timesteps.uniform(PROCESS, STEPS)
    x_T = PROCESS.prior_sample(rows, (len(LABELS), *SHAPE))  # noqa: N806
    model = RECIPE.model.denoiser(PARAMS, LABELS)
    guided = guidance.classifier_free(model, away, scale, rule=rule)
    if interval is not None:
        guided = guidance.interval(PROCESS, guided, model, *interval)
    draw = jax.jit(lambda x_T: sample(key_path, samplers.ddim(PROCESS, guided), x_T, ts))  # noqa: N803
    return draw(x_T)


@pytest.mark.parametrize(
    ("weaker", "rule", "interval"),
    [(None, "linear", (0.3, 3.0)), (RECIPE, "rescaled", None), (None, "projected", None)],
)
def test_guided_samples_are_those_of_the_library(weaker, rule, interval):
    guiding = Guidance(guidance_scale=2.5, rule=rule, interval=interval)
    recipe = GuidedRecipe(RECIPE, guiding, weaker)
    generate = make_generator(recipe, SHAPE, "ddim", STEPS)
    got, _ = generate(recipe.share(PARAMS, WEAKER), jax.random.key(7), LABELS)
    nulls = RECIPE.model.denoiser(PARAMS, np.full_like(LABELS, 3))
    away = nulls if weaker is None else RECIPE.model.denoiser(WEAKER, LABELS)
    wanted = composed(away, 2.5, RULES[rule], interval)
    np.testing.assert_allclose(got, wanted, atol=1e-12)  # the scale is traced in one of them


@pytest.mark.parametrize("method", ["ddim", pytest.param("adaptive", marks=pytest.mark.slow)])
def test_one_program_takes_any_scale_and_interval(method):
    traces = []

    def counted(*args, **given):
        traces.append(True)
        return apply(*args, **given)

    recipe = RECIPE._replace(model=Model(counted, PROCESS, "v"))
    guided = GuidedRecipe(recipe, Guidance(guidance_scale=2.0, interval=(0.0, 1.0)))
    generate = make_generator(guided, SHAPE, method, STEPS)
    seen, numbers = [], []
    for scale, high in ((1.0, 1.0), (4.0, 1.0), (1.0, 3.0), (4.0, 3.0)):
        shared = guided.share(PARAMS) | {"scale": np.float64(scale), "high": np.float64(high)}
        seen.append(generate(shared, jax.random.key(0), LABELS)[0])
        numbers.append(len(traces))
    assert len(set(numbers)) == 1
    np.testing.assert_allclose(seen[2], seen[0], atol=1e-12)  # of scale 1, where is the same
    assert np.abs(seen[1] - seen[0]).max() > 1e-3
    assert np.abs(seen[3] - seen[1]).max() > 1e-3


def test_a_model_that_needs_signal_says_so_guided():
    eps = RECIPE._replace(model=Model(apply, PROCESS, "eps"))
    for pair in ((eps, None), (RECIPE, eps), (eps, RECIPE)):
        recipe = GuidedRecipe(pair[0], Guidance(guidance_scale=2.0), pair[1])
        assert recipe.model.needs_signal
        shared = recipe.share(PARAMS, WEAKER)
        assert recipe.denoiser(shared).needs_signal == "a network that predicts eps"
    assert GuidedRecipe(RECIPE, Guidance()).denoiser(recipe.share(PARAMS)).v is not None


def test_scale_1_is_the_model_itself():
    guiding = Guidance(rule="rescaled", interval=(0.1, 1.0))
    model, params, said = guided_by(guiding, None, CONFIG, PARAMS, IMAGES, {})
    assert isinstance(model, Recipe)
    assert params is PARAMS
    assert said is None
    guiding = dataclasses.replace(guiding, guidance_scale=0.0)  # the model without its label
    model, _, said = guided_by(guiding, None, CONFIG, PARAMS, IMAGES, {})
    assert isinstance(model, GuidedRecipe)
    wanted = {"scale": 0.0, "rule": "rescaled", "interval": [0.1, 1.0], "weaker_run": None}
    assert said == wanted


def test_a_run_without_a_null_label_leans_away_from_a_weaker_one_only():
    guiding = Guidance(guidance_scale=2.0)
    never = dataclasses.replace(CONFIG, drop_cond=0.0)
    without = dataclasses.replace(IMAGES, num_classes=None)
    guiding.check_label(CONFIG, IMAGES)
    Guidance().check_label(never, without)
    for config, images, said in (
        (never, IMAGES, "trained with --drop-cond 0"),
        (CONFIG, without, "a run without classes"),
    ):
        with pytest.raises(Refusal, match=f"--guidance-scale must be 1 for .*{said}.*got"):
            guiding.check_label(config, images)
        dataclasses.replace(guiding, weaker_run="there").check_label(config, images)
    # without labels the weaker run guides all the same
    here = {"data": without.to_record()}
    params = build_model(CONFIG, without).init_params()
    weaker = Weaker(CONFIG, params, here, {"run": "abc", "step": 3})
    model, shared, said = guided_by(guiding, weaker, CONFIG, params, without, here)
    generate = make_generator(model, SHAPE, "ddim", 2)
    assert np.isfinite(generate(shared, jax.random.key(0), LABELS)[0]).all()
    assert said["weaker_run"] == {"run": "abc", "step": 3}


@pytest.mark.parametrize(
    ("changes", "of_data", "said"),
    [
        ({"process": "flow"}, {}, "of there --process is flow, of the run cosine"),
        ({"data": "mnist"}, {}, "of there --data is mnist, of the run digits"),
        ({}, {"contents": "f00"}, "the contents of its data is f00, of the run None"),
        ({}, {"shape": [4, 4, 1]}, "the shape of its data is"),
    ],
)
def test_a_weaker_run_of_other_data_or_process_is_refused(changes, of_data, said):
    here = {"data": IMAGES.to_record() | {"contents": None}}
    there = {"data": here["data"] | of_data}
    weaker = Weaker(dataclasses.replace(CONFIG, **changes), PARAMS, there, {})
    guiding = Guidance(weaker_run="there")
    with pytest.raises(Refusal, match=f"--weaker-run must be of the same .*{said}"):
        guided_by(guiding, weaker, CONFIG, PARAMS, IMAGES, here)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guidance_scale": float("inf")}, "--guidance-scale must be finite; got inf"),
        ({"interval": (2.0, 1.0)}, "--interval must be LOW HIGH .*got 2 1"),
        ({"interval": (-1.0, 1.0)}, "--interval must be LOW HIGH .*got -1 1"),
        ({"interval": (float("nan"), 1.0)}, "--interval must be LOW HIGH .*got nan 1"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(Refusal, match=said):
        Guidance(**options).check()
    Guidance(guidance_scale=-1.0, interval=(1.0, 1.0)).check()
