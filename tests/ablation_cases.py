"""What the tests of ablations share: what they read of a folder, and one that takes no time."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.ablations import plane, told
from experiments.ablations.catalogue import MAKERS
from experiments.ablations.definition import Ablation
from experiments.ablations.world import Measure
from experiments.common import optimization
from experiments.latents import autoencoder as autoencoders
from experiments.latents import encoding
from experiments.latents.drawing import Coded
from jaxdiff import data, training


@contextlib.contextmanager
def made_once():
    """Keep the ready ablations: each call of a command line makes them all, for its help."""
    with pytest.MonkeyPatch.context() as patch:
        for name, make in MAKERS.items():
            patch.setitem(MAKERS, name, functools.cache(make))
        yield


def snapshot(folder):
    """Return the bytes of all that reproduces: no seconds among them."""
    kept = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".csv", ".png")}
    kept.pop("timings.csv")
    kept["results.json"] = (folder / "results.json").read_bytes()
    groups_ = [json.loads(p.read_text())["rows"] for p in sorted(folder.glob("groups/*"))]
    return kept | {"groups": groups_}


def relative(tree, other):
    gap = optax.tree.norm(jax.tree.map(lambda a, b: a - b, tree, other))
    return float(gap / optax.tree.norm(other))


def train_alone(config, batches, init_params, loss):
    optimizer = optimization.build_optimizer(config)
    decay = config.ema_decay
    state = training.init(init_params(), optimizer, ema_decay=decay)
    update = jax.jit(training.make_update(loss, optimizer, ema_decay=decay))
    for _ in range(config.num_steps):
        state, _ = update(state, jax.random.key(config.seed), next(batches))
    return state.ema


@functools.cache
def untrained(num_scenes, autoencoder_steps):
    """Return what `told.load` does, of an autoencoder and latents that are all zeros."""
    config = autoencoders.PRESETS["relations"]
    built = autoencoders.build(config, (32, 32, 3))
    params = zeros_like(jax.eval_shape(built.init_params))
    captions = [
        c for k in range(3) for c in told.scenes_of(k, num_scenes).captions(range(num_scenes))
    ]
    text = told.learn_text()
    latents = np.zeros((3 * num_scenes, *built.latent_shape), np.float32)
    made = {"mean": latents, "deviation": latents, "text": text.encode(captions)}
    shapes = built.latent_shape, built.shape
    store = encoding.Store(data.from_arrays(made), "", 1.0, 0.0, text.record, *shapes)
    return Coded(config, built, params, store, text)


def zeros_like(shapes):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def told_untrained(config):
    """Return the problem of a config for which nothing was trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(told, "load", untrained)
        return told.ToldProblem(config)


class Point:
    """A problem whose model is a point that moves to the data: folders are the same for all."""

    def __init__(self, config):
        self.config = config

    def init_params(self, member):
        return {"x": jax.random.normal(member.key, (2,))}

    def loss(self, member):
        def loss_fn(params, key, batch):
            gap = batch["x0"] - params["x"] - (member.config.loss == "flow_matching_ot")
            return jnp.sum(gap**2, -1), {}

        return loss_fn

    def table(self, config):
        return np.full(2, config.seed, np.float32)

    def batch(self, member, table, step):
        key = jax.random.fold_in(member.key, step)
        return {"x0": table + jax.random.normal(key, (member.config.batch_size, 2))}

    def draw(self, member, params):
        noise = jax.random.normal(jax.random.fold_in(member.key, 1), (16, 2))
        return params["x"] + noise / member.config.sample_steps

    def calls(self, config):
        return config.sample_steps

    def call_flops(self):
        return 1.0


MEASURES = {
    "norm": Measure("norm", of_model=lambda problem, member, params: jnp.sum(params["x"] ** 2)),
    "spread": Measure("spread", of_samples=lambda problem, how, seed, x: float(x.std())),
}
QUICK = Ablation(
    question="What does a folder go through?",
    world=plane.WORLD._replace(problem=Point, measures=MEASURES),
    base=plane.Config(
        loss="flow_matching", process="flow", batch_size=4, num_steps=10, sample_steps=4
    ),
    axes={"loss": ("flow_matching", "flow_matching_ot"), "learning_rate": (1.5e-3, 1e-2)},
    measures=("norm",),
    seeds=2,
)
OTHER = dataclasses.replace(QUICK, axes={"loss": ("flow_matching", "flow_matching_ot")})
BOTH = {"full": QUICK, "smoke": dataclasses.replace(QUICK, seeds=1)}
NAME = "ablation_cases:QUICK"
"""As a command line names it, and as those that read a folder must be told."""
TOLD = ("--definition", NAME)
