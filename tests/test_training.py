import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses, numerics, processes, timesteps, training
from jaxdiff.training import make_update, parallel
from jaxdiff.training.update import scan_steps

KEY = jax.random.key(0)
BATCH = {"x0": np.random.default_rng(1).normal(size=(16, 3))}


def noisy_loss(params, key, batch):
    """Row i's loss depends on row i's noise, so that a shard's rows can be told apart."""
    noise = numerics.normal(key, batch["x0"])
    error = (batch["x0"] + noise) @ params["w"] - 1.0
    return error**2, {"noise": noise[:, 0]}


def start(optimizer, ema_decay=0.9):
    return training.init({"w": jnp.ones(3)}, optimizer, ema_decay=ema_decay)


def test_an_update_is_the_optimizers_on_the_mean_loss():
    optimizer = optax.adam(0.1)
    state = start(optimizer)
    new, metrics = jax.jit(make_update(noisy_loss, optimizer, ema_decay=0.9))(state, KEY, BATCH)

    @jax.jit
    def by_hand(state):
        def mean_loss(params):
            return noisy_loss(params, jax.random.fold_in(KEY, 0), BATCH)[0].mean()

        loss, grads = jax.value_and_grad(mean_loss)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return loss, optax.tree.norm(grads), opt_state, params

    loss, norm, opt_state, params = jax.device_get(by_hand(state))
    np.testing.assert_allclose(new.params["w"], params["w"], rtol=1e-13)
    ema = 0.9 * np.asarray(state.ema["w"]) + 0.1 * params["w"]
    np.testing.assert_allclose(new.ema["w"], ema, rtol=1e-13)
    assert jax.tree.structure(new.opt_state) == jax.tree.structure(opt_state)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-13)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-13)
    assert new.step == 1
    assert new.step.dtype == jnp.int32


def test_several_averages_are_kept_by_name():
    optimizer = optax.sgd(0.1)
    decays = {"fast": 0.5, "slow": 0.99}

    @jax.jit
    def evaluate(batch):
        def moved(decay):
            update = make_update(noisy_loss, optimizer, ema_decay=decay)
            return update(start(optimizer, decay), KEY, batch)[0].ema

        return moved(decays), {name: moved(decay) for name, decay in decays.items()}

    found, alone = evaluate(BATCH)
    for name in decays:
        np.testing.assert_array_equal(found[name]["w"], alone[name]["w"])


def test_noise_follows_the_step_and_nothing_else():
    optimizer = optax.sgd(0.1)
    update = jax.jit(make_update(noisy_loss, optimizer, ema_decay=0.9))
    state, first = update(start(optimizer), KEY, BATCH)
    _, second = update(state, KEY, BATCH)
    _, again = update(state, KEY, BATCH)
    assert first["noise"] != second["noise"]
    assert second["noise"] == again["noise"]


def apply(params, x_t, t, cond=None, *, key=None):
    return jnp.tanh(x_t * params["w"][None])


DENOISING = losses.denoising(apply, processes.vp(), times=timesteps.draw_stratified())


@functools.cache
def of_the_whole():
    """Return the update of DENOISING by a whole batch: (state, metrics)."""
    optimizer = optax.adam(0.1)
    return jax.jit(make_update(DENOISING, optimizer, ema_decay=0.9))(start(optimizer), KEY, BATCH)


@pytest.mark.parametrize("num_shards", [2, 4])
def test_shards_of_a_batch_make_the_update_of_the_whole(num_shards):
    optimizer = optax.adam(0.1)
    whole, whole_metrics = of_the_whole()
    sharded = make_update(DENOISING, optimizer, ema_decay=0.9, axis_name="shards")
    parts = jax.tree.map(lambda x: x.reshape(num_shards, -1, *x.shape[1:]), BATCH)
    new, metrics = jax.jit(jax.vmap(sharded, (None, None, 0), axis_name="shards"))(
        start(optimizer), KEY, parts
    )
    np.testing.assert_allclose(metrics["loss"][0], whole_metrics["loss"], rtol=1e-12)
    for got, wanted in zip(jax.tree.leaves(new), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got[0], wanted, rtol=1e-10)


def test_a_donated_state_gives_the_same_update():
    optimizer = optax.adam(0.1)
    update = make_update(noisy_loss, optimizer, ema_decay=0.9)
    params = {"w": jnp.ones(3)}
    kept, given = (training.init(params, optimizer, ema_decay=0.9) for _ in range(2))
    keep, give = parallel.jit(update), parallel.jit(update, donate=True)
    for _ in range(3):
        kept, _ = keep(kept, KEY, BATCH)
        given, _ = give(given, KEY, BATCH)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(given), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not params["w"].is_deleted()


@pytest.mark.parametrize("accumulate", [2, 8])
def test_a_gradient_in_parts_is_that_of_the_whole(accumulate):
    optimizer = optax.adam(0.1)
    whole, whole_metrics = of_the_whole()
    update = make_update(DENOISING, optimizer, ema_decay=0.9, accumulate=accumulate)
    parts, metrics = jax.jit(update)(start(optimizer), KEY, BATCH)
    np.testing.assert_allclose(metrics["loss"], whole_metrics["loss"], rtol=1e-12)
    for got, wanted in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_parts_that_do_not_divide_the_batch_are_refused():
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match="`accumulate` must be at least 1"):
        make_update(noisy_loss, optimizer, ema_decay=0.9, accumulate=0)
    with pytest.raises(ValueError, match="`accumulate` must divide the batch.*got 3 for 16"):
        make_update(noisy_loss, optimizer, ema_decay=0.9, accumulate=3)(
            start(optimizer), KEY, BATCH
        )


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_may_be_skipped(where):
    def loss_fn(params, key, batch):
        error = (batch["x0"] @ params["w"]) ** 2
        root = jnp.sqrt(jnp.abs(batch["bad"]) * params["w"].sum() ** 2)  # slope inf at 0 in w = 0
        return error + (jnp.where(batch["bad"] > 0, jnp.inf, 0.0) if where == "loss" else root), {}

    optimizer = optax.adam(0.1)
    update = jax.jit(make_update(loss_fn, optimizer, ema_decay=0.9, skip_nonfinite=True))
    state = start(optimizer)
    if where == "gradient":
        state = state._replace(params={"w": jnp.array([1.0, -1.0, 0.0])})
    good, bad = ({**BATCH, "bad": jnp.full(16, value)} for value in (0.0, 1.0))
    if where == "loss":
        state, _ = update(state, KEY, good)
    skipped, metrics = update(state, KEY, bad)
    values = [float(metrics[name]) for name in ("loss", "grad_norm")]
    assert not np.isfinite(values).all()
    assert int(skipped.step) == int(state.step) + 1
    for name in ("params", "ema", "opt_state"):
        old, new = (jax.tree.leaves(getattr(each, name)) for each in (state, skipped))
        for a, b in zip(old, new, strict=True):
            np.testing.assert_array_equal(a, b)


def test_several_steps_in_one_call_are_the_steps_one_by_one():
    optimizer = optax.adam(0.1)
    update = make_update(noisy_loss, optimizer, ema_decay=0.9)
    batches = np.random.default_rng(2).normal(size=(4, 16, 3))
    one, step = start(optimizer), jax.jit(update)
    seen = []
    for batch in batches:
        one, metrics = step(one, KEY, {"x0": batch})
        seen.append(metrics["loss"])
    many, metrics = jax.jit(scan_steps(update))(start(optimizer), KEY, {"x0": batches})
    np.testing.assert_allclose(metrics["loss"], np.stack(seen), rtol=1e-12)
    for got, wanted in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), {"a": 0.5, "b": 2.0}])
def test_decays_outside_0_1_are_refused(decay):
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match="`ema_decay"):
        make_update(noisy_loss, optimizer, ema_decay=decay)
    with pytest.raises(ValueError, match="`ema_decay"):
        training.init({"w": jnp.ones(3)}, optimizer, ema_decay=decay)
