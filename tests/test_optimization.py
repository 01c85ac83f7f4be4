"""Muon and the rates of the experiments' optimizers."""

import itertools
import os
import subprocess
import sys
import types

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.common.optimization import build_optimizer, build_schedule, muon
from jaxdiff import nn
from jaxdiff.training.checkpoint import Checkpoints

CONFIG = types.SimpleNamespace(
    optimizer="muon",
    schedule="constant_linear",
    num_steps=100,
    decay_steps=None,
    warmup_steps=10,
    learning_rate=1e-2,
    muon_learning_rate=0.3,
    weight_decay=0.1,
    clip_norm=1.0,
)
SHAPES = {
    "block_00": {"inner": {"kernel": (4, 6), "bias": (6,)}, "conv_in": {"kernel": (3, 3, 2, 5)}},
    "conv_in": {"kernel": (3, 3, 1, 4)},
    "table": (5, 4),
}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: 0.1 * rng.normal(size=shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def orthogonal(matrix):
    """Five Newton-Schulz steps with Jordan's numbers."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = a * x + b * square @ x + c * square @ square @ x
    return x


def by_hand(gradients, parameter, rate, weight_decay, beta=0.95):
    """Two steps or so of one matrix (in, out): Nesterov's momentum, made orthogonal."""
    momentum = np.zeros_like(parameter)
    for gradient in gradients:
        momentum = beta * momentum + (1 - beta) * gradient
        ahead = beta * momentum + (1 - beta) * gradient
        rows, columns = parameter.shape
        update = max(1.0, columns / rows) ** 0.5 * orthogonal(ahead)
        parameter = parameter - rate * (update + weight_decay * parameter)
    return parameter


def moved(optimizer, params, gradients):
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_inner_matrices_move_by_muon_and_the_rest_by_adamw():
    params, gradients = drawn(0), [drawn(1), drawn(2)]
    rates = optax.constant_schedule(0.3), optax.constant_schedule(1e-2)
    found, _ = moved(muon(*rates, 1e9, 0.1), params, gradients)
    rest, _ = moved(optax.adamw(1e-2, b2=0.99, weight_decay=0.1), params, gradients)
    for layer, shape in (("inner", (4, 6)), ("conv_in", (18, 5))):
        pick = [tree["block_00"][layer]["kernel"].reshape(shape) for tree in (params, *gradients)]
        wanted = by_hand(pick[1:], pick[0], 0.3, 0.1)
        kernel = found["block_00"][layer]["kernel"]
        np.testing.assert_allclose(kernel.reshape(shape), wanted, atol=1e-7)
    np.testing.assert_array_equal(found["table"], rest["table"])
    np.testing.assert_array_equal(found["conv_in"]["kernel"], rest["conv_in"]["kernel"])
    bias = [tree["block_00"]["inner"]["bias"] for tree in (found, rest)]
    np.testing.assert_array_equal(*bias)


@pytest.mark.slow
def test_gradients_are_clipped_for_both():
    params, second = drawn(0), jax.tree.map(lambda a: 0.1 * a, drawn(2))
    gradients = [jax.tree.map(lambda a: 1e6 * a, drawn(1)), second]
    size = float(optax.tree.norm(gradients[0]))
    scaled = [jax.tree.map(lambda a: a / size, gradients[0]), gradients[1]]
    config = types.SimpleNamespace(**{**vars(CONFIG), "clip_norm": 1.0, "warmup_steps": 0})
    free = types.SimpleNamespace(**{**vars(config), "clip_norm": 1e9})
    found, _ = moved(build_optimizer(config), params, gradients)
    wanted, _ = moved(build_optimizer(free), params, scaled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), found, wanted)


def test_both_rates_go_alike_to_peaks_of_their_own():
    zero = jax.tree.map(np.zeros_like, drawn(0))
    params = jax.tree.map(np.ones_like, zero)
    config = types.SimpleNamespace(**{**vars(CONFIG), "weight_decay": 1.0})
    optimizer = build_optimizer(config)
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for count in range(1, 101):
        updates, state = step(zero, state, params)  # weight decay alone: the rate itself
        if count in (1, 6, 40, 76):
            share = {1: 0.0, 6: 0.5, 40: 1.0, 76: 0.5}[count]
            decayed = updates["block_00"]["inner"]["kernel"], updates["table"]
            for update, peak in zip(decayed, (0.3, 1e-2), strict=True):
                np.testing.assert_allclose(update, -peak * share, atol=1e-7)


@pytest.mark.parametrize(
    ("warmup", "wanted"),
    [
        (10, {0: 0.0, 5: 0.5, 10: 1.0, 50: 1.0, 75: 0.5, 99: 0.02, 100: 0.0, 150: 0.0}),
        (0, {0: 1.0, 50: 1.0, 75: 0.5, 100: 0.0}),
        (60, {0: 0.0, 30: 0.5, 60: 1.0, 80: 0.5, 100: 0.0}),
    ],
)
def test_a_rate_may_stay_until_the_last_half_and_fall_to_nothing(warmup, wanted):
    config = types.SimpleNamespace(**{**vars(CONFIG), "warmup_steps": warmup})
    rate = build_schedule(config, 1.0)
    found = {step: float(rate(step)) for step in wanted}
    assert found == pytest.approx(wanted, abs=1e-6)


def names_of_muon(module, method="__call__"):
    params, _ = nn.functional(module, method)
    state = jax.eval_shape(build_optimizer(CONFIG).init, params)
    by_muon = state[1].inner_states["muon"].inner_state[0].trace
    paths = [path for path, _ in jax.tree.leaves_with_path(by_muon)]
    kept = {jax.tree_util.keystr(path, simple=True, separator=".") for path in paths}
    every = [path for path, _ in jax.tree.leaves_with_path(params)]
    return kept, {jax.tree_util.keystr(p, simple=True, separator=".") for p in every} - kept


def test_it_is_the_matrices_between_the_ends_of_a_network_that_move_by_muon():
    texts = nn.Texts(9, length=3, width=8, depth=1)
    options = {"multipliers": (1, 2), "num_heads": 2, "conditioning": texts}
    kept, left = names_of_muon(
        nnx.eval_shape(lambda: nn.UNet((4, 4, 1), channels=4, rngs=nnx.Rngs(0), **options))
    )
    assert {"down_00_00.conv_in.kernel", "down_00_00.conv_out.kernel"} < kept
    assert {"attention.qkv.kernel", "conditioning.texts.block_00.qkv.kernel"} < kept
    assert all(name.endswith(".kernel") for name in kept)
    ends = {name for name in left if name.endswith("kernel")}
    assert ends == {"conv_in.kernel", "conv_out.kernel"}
    assert {"conditioning.texts.tokens", "conditioning.texts.positions"} < left


@pytest.mark.slow
def test_of_an_autoencoder_it_is_those_between_the_ends_of_both_ways():
    def make():
        return nn.Autoencoder(1, latent_channels=2, widths=(4, 8), rngs=nnx.Rngs(0))

    kept, left = names_of_muon(nnx.eval_shape(make), "encode")
    ends = {name for name in left if name.endswith("kernel")}
    pairs = itertools.product(("encoder", "decoder"), ("conv_in", "conv_out"))
    assert ends == {f"{way}.{end}.kernel" for way, end in pairs}
    assert any(name.endswith("conv_in.kernel") for name in kept)


@pytest.mark.slow
def test_its_state_is_restored_bit_for_bit(tmp_path):
    optimizer = build_optimizer(CONFIG)
    params, gradients = drawn(0), [drawn(1), drawn(2)]
    halfway, state = moved(optimizer, params, gradients)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"params": halfway, "opt_state": state}, {})
        found = checkpoints.restore({"params": halfway, "opt_state": optimizer.init(params)}).state
    assert jax.tree.structure(found["opt_state"]) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found["opt_state"], state)


def test_an_optimizer_that_is_none_is_refused():
    config = types.SimpleNamespace(**{**vars(CONFIG), "optimizer": "sgd"})
    with pytest.raises(ValueError, match="`optimizer` must be one of adamw, muon; got 'sgd'"):
        build_optimizer(config)


def test_a_config_that_names_none_has_adamw():
    plain = {name: value for name, value in vars(CONFIG).items() if name != "optimizer"}
    params, gradients = drawn(0), [drawn(1)]
    found, _ = moved(build_optimizer(types.SimpleNamespace(**plain)), params, gradients)
    named, _ = moved(
        build_optimizer(types.SimpleNamespace(**plain, optimizer="adamw")), params, gradients
    )
    jax.tree.map(np.testing.assert_array_equal, found, named)


SPLIT = """if True:
    import tempfile
    import jax, numpy as np
    from test_optimization import CONFIG, build_optimizer, drawn
    from jaxdiff import training
    from jaxdiff.training import parallel
    from jaxdiff.training.checkpoint import Checkpoints

    def loss_fn(params, key, batch):
        weights = [(3 * leaf) ** 2 * batch["x0"].mean() - leaf for leaf in jax.tree.leaves(params)]
        return batch["x0"][:, 0] * sum(each.sum() for each in weights), {}

    params = jax.tree.map(lambda a: np.concatenate([a, a], axis=-1), drawn(0))
    optimizer = build_optimizer(CONFIG)
    def start():
        return training.init(params, optimizer, ema_decay=0.9)
    update = training.make_update(loss_fn, optimizer, ema_decay=0.9)
    mesh, key = parallel.make_mesh(2, 2), jax.random.key(0)
    batches = np.random.default_rng(0).normal(size=(6, 8, 2)) + 1.0
    whole, one = start(), parallel.jit(update)
    split, many = parallel.init(start, mesh, fsdp=True), parallel.mesh(update, mesh, fsdp=True)
    kernels = [leaf for leaf in jax.tree.leaves(split.opt_state) if leaf.ndim > 1]
    assert all(leaf.addressable_shards[0].data.size * 2 == leaf.size for leaf in kernels)
    for batch in batches[:3]:
        whole, split = (step(state, key, {"x0": batch})[0] for step, state in
                        ((one, whole), (many, split)))
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        checkpoints.save(3, split, {})
        split = checkpoints.restore(parallel.init(start, mesh, fsdp=True)).state
    for batch in batches[3:]:
        whole, split = (step(state, key, {"x0": batch})[0] for step, state in
                        ((one, whole), (many, split)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), whole.params,
                 jax.device_get(split.params))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), whole.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-3, moved
"""


@pytest.mark.slow
def test_a_split_state_moves_as_a_whole_one_and_is_restored():
    flags = "--xla_force_host_platform_device_count=4 " + os.environ.get("XLA_FLAGS", "")
    here = os.path.dirname(__file__)
    paths = os.pathsep.join((here, os.path.dirname(here)))
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths, "JAX_ENABLE_X64": "1"}
    env["JAX_PLATFORMS"] = "cpu"
    run = subprocess.run([sys.executable, "-c", SPLIT], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
