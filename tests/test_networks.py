"""Several networks, frozen ones, statistics, and losses of the state: in jit, parts and resumed."""

import functools

import jax
import jax.numpy as jnp
import networks_cases as cases
import numpy as np
import optax
import pytest

from jaxdiff import training
from jaxdiff.training import make_update, networks, parallel
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints
from jaxdiff.training.update import scan_steps

KEY = jax.random.key(0)
STEPS = 4
BATCHES = np.random.default_rng(1).normal(size=(STEPS, 8, cases.NUM_DIMS))
SGD = optax.sgd(0.1)


def gan_start(**options):
    return cases.gan(**options).init(cases.gan_params())


def student_start():
    return cases.student().init(cases.student_params(), cases.teacher(), cases.statistics())


STARTS = {"gan": gan_start, "student": student_start}
UPDATES = {"gan": cases.gan, "student": cases.student}


@functools.cache
def compiled(name):
    return jax.jit(UPDATES[name]())


@functools.cache
def two_steps(name):
    return run(compiled(name), STARTS[name](), BATCHES[:2])


def run(update, state, batches=BATCHES, key=KEY):
    metrics = {}
    for batch in batches:
        state, metrics = update(state, key, {"x0": batch})
    return state, metrics


def assert_close(got, wanted, rtol=1e-10):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-14)


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


# --- Against the same written out ------------------------------------------------------------


@jax.jit
def gan_by_hand(step, params, averages, moments, batch):
    losses, norms = {}, {}
    for i, (part, loss_fn, optimizer, decay) in enumerate(
        [
            ("critic", cases.critic_loss, cases.CRITIC, 0.5),
            ("generator", cases.generator_loss, cases.GENERATOR, 0.9),
        ]
    ):
        key = jax.random.fold_in(jax.random.fold_in(KEY, i), step)

        def mean(own, part=part, loss_fn=loss_fn, key=key, params=params):
            return jnp.mean(loss_fn({**params, part: own}, key, {"x0": batch})[0])

        losses[part], grads = jax.value_and_grad(mean)(params[part])
        norms[part] = optax.tree.norm(grads)
        updates, moment = optimizer.update(grads, moments[part], params[part])
        params = {**params, part: optax.apply_updates(params[part], updates)}
        average = optax.incremental_update(params[part], averages[part], 1.0 - decay)
        moments, averages = {**moments, part: moment}, {**averages, part: average}
    return params, averages, moments, losses, norms


def test_networks_are_moved_in_turn_each_by_its_own_loss():
    params = averages = cases.gan_params()
    moments = {"critic": cases.CRITIC.init(params["critic"])}
    moments["generator"] = cases.GENERATOR.init(params["generator"])
    losses, norms = {}, {}
    for step, batch in enumerate(BATCHES[:2]):
        params, averages, moments, losses, norms = gan_by_hand(
            step, params, averages, moments, batch
        )
    state, metrics = two_steps("gan")
    assert_close(state.params, params)
    assert_close(state.ema, averages)
    assert_close(state.opt_state, moments)
    assert int(state.step) == 2
    for part in ("critic", "generator"):
        np.testing.assert_allclose(metrics[f"{part}_loss"], losses[part], rtol=1e-10)
        np.testing.assert_allclose(metrics[f"{part}_grad_norm"], norms[part], rtol=1e-10)
    assert "critic_margin" in metrics
    np.testing.assert_allclose(metrics["loss"], sum(losses.values()), rtol=1e-10)
    np.testing.assert_allclose(metrics["grad_norm"], np.hypot(*norms.values()), rtol=1e-10)


@jax.jit
def student_by_hand(state, batch):
    def mean(params):
        key = jax.random.fold_in(KEY, state.step)
        loss, _, new = cases.student_loss_of(state)(params, key, {"x0": batch})
        return jnp.mean(loss), new

    grads, new = jax.grad(mean, has_aux=True)(state.params)
    updates, moments = cases.STUDENT.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 0.1)
    return state._replace(
        step=state.step + 1, params=params, ema=ema, opt_state=moments, statistics=new
    )


def test_a_loss_of_the_state_sees_its_step_averages_frozen_networks_and_statistics():
    wanted = student_start()
    for batch in [*BATCHES, *BATCHES]:  # past the 5th, where the loss changes
        wanted = student_by_hand(wanted, batch)
    found, _ = run(compiled("student"), student_start(), [*BATCHES, *BATCHES])
    assert_close(found, wanted)
    assert_same_bits(found.frozen, cases.teacher())


def test_the_gradient_is_that_of_the_params_that_the_loss_is_given():
    update = make_update(
        loss_of=lambda state: lambda p, k, b: (b["x0"] @ (p["w"] - 2 * state.params["w"]), {}),
        optimizer=SGD,
        ema_decay=0.9,
    )
    state = update.init({"w": jnp.ones(cases.NUM_DIMS)})
    moved, _ = run(jax.jit(update), state, BATCHES[:1])
    np.testing.assert_allclose(moved.params["w"], 1.0 - 0.1 * BATCHES[0].mean(0), rtol=1e-12)


@pytest.mark.parametrize("name", UPDATES)
def test_parts_shards_and_several_steps_a_call_make_the_same_update(name):
    make = UPDATES[name]
    wanted, metrics = two_steps(name)
    sharded = jax.jit(jax.vmap(make(axis_name="i", accumulate=2), (None, None, 0), axis_name="i"))
    state, found = STARTS[name](), {}
    for batch in BATCHES[:2].reshape(2, 2, 4, -1):
        new = sharded(state, KEY, {"x0": batch})
        state, found = jax.tree.map(lambda x: x[0], new)
    assert_close(state, wanted)
    assert_close(found, metrics)
    if name == "student":
        scanned, _ = jax.jit(scan_steps(make()))(student_start(), KEY, {"x0": BATCHES[:2]})
        assert_close(scanned, wanted)


def test_a_part_waits_for_its_step_and_its_loss_is_taken_all_the_same():
    update = jax.jit(cases.gan(every={"generator": 3}))
    plain, state = compiled("gan"), gan_start()
    for step, batch in enumerate(BATCHES, 1):
        before = state
        state, metrics = update(state, KEY, {"x0": batch})
        always, as_always = plain(before, KEY, {"x0": batch})
        np.testing.assert_allclose(metrics["generator_loss"], as_always["generator_loss"])
        np.testing.assert_allclose(metrics["loss"], as_always["loss"])
        assert_close(state.params["critic"], always.params["critic"])
        if step % 3 == 0:
            assert_close(state.params["generator"], always.params["generator"])
            assert metrics["generator_grad_norm"] > 0
        else:
            for field in ("params", "ema", "opt_state"):
                held = [getattr(each, field)["generator"] for each in (state, before)]
                assert_same_bits(*held)
            assert metrics["generator_grad_norm"] == 0
    assert int(state.step) == STEPS


def test_a_single_part_moves_and_the_others_stay():
    update = make_update(cases.critic_loss, SGD, ema_decay=0.5, part="critic")
    state = update.init(cases.gan_params())
    assert state.ema.keys() == state.opt_state.keys() == {"critic"}
    moved, _ = run(jax.jit(update), state, BATCHES[:1])
    assert_same_bits(moved.params["generator"], state.params["generator"])
    assert np.abs(moved.params["critic"]["w"] - state.params["critic"]["w"]).max() > 0


def test_several_averages_of_several_networks():
    decays = {"fast": 0.5, "slow": 0.9}
    params = {"generator": cases.gan_params()["generator"]}

    def loss_fn(p, key, batch):
        return jnp.sum(cases.imagine(p, key, batch["x0"]) ** 2, axis=1), {}

    update = networks.alternate(
        generator=make_update(loss_fn, SGD, ema_decay=decays, part="generator")
    )
    state, _ = run(jax.jit(update), update.init(params), BATCHES[:1])
    for name, decay in decays.items():
        wanted = optax.incremental_update(state.params["generator"], params["generator"], 1 - decay)
        assert_close(state.ema["generator"][name], wanted)


# --- What is left alone -----------------------------------------------------------------------


def test_a_step_that_is_not_finite_leaves_the_statistics_too():
    update = jax.jit(cases.student(skip_nonfinite=True))
    state, _ = run(update, student_start(), BATCHES[:1])
    broken = BATCHES[1].copy()
    broken[3, 0] = np.nan
    skipped, metrics = update(state, KEY, {"x0": broken})
    assert not np.isfinite(metrics["loss"])
    assert int(skipped.step) == 2
    assert_same_bits(skipped._replace(step=state.step), state)
    moved, _ = update(skipped, KEY, {"x0": BATCHES[1]})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))


def test_one_networks_failure_skips_both():
    def broken(params, key, batch):
        loss, metrics = cases.generator_loss(params, key, batch)
        return loss + batch["bad"], metrics

    make = cases.gan(losses=(cases.critic_loss, broken), skip_nonfinite=True)
    state = make.init(cases.gan_params())
    batch = {"x0": BATCHES[0], "bad": jnp.full(8, jnp.inf)}
    skipped, metrics = jax.jit(make)(state, KEY, batch)
    assert np.isfinite(metrics["critic_loss"])
    assert_same_bits(skipped.params, state.params)
    assert_same_bits(skipped.opt_state, state.opt_state)


@pytest.mark.parametrize("mode", ["jit", "pmap", "mesh"])
def test_what_is_frozen_is_neither_donated_nor_copied(mode):
    step = {
        "jit": parallel.jit,
        "pmap": parallel.pmap,
        "mesh": lambda update, donate: parallel.mesh(
            update, parallel.make_mesh(1), donate=donate, fsdp=True
        ),
    }[mode](cases.student(), donate=True)
    state = student_start()
    weights = state.params["w"]
    first, _ = step(state, KEY, {"x0": BATCHES[0]})
    held = first.frozen["teacher"]["w"]
    second, _ = step(first, KEY, {"x0": BATCHES[1]})
    assert second.frozen["teacher"]["w"] is held
    assert not state.frozen["teacher"]["w"].is_deleted()
    assert first.params["w"].is_deleted()
    assert mode != "jit" or weights.is_deleted()
    assert_close(second, two_steps("student")[0])


def test_a_plain_function_is_given_the_state_whole_and_may_change_all_of_it():
    update = cases.student()

    def plain(state, key, batch):
        new, metrics = update(state, key, batch)
        return new._replace(frozen=jax.tree.map(lambda x: x + 1, new.frozen)), metrics

    mesh = parallel.make_mesh(1)
    for step in (parallel.jit(plain), parallel.mesh(plain, mesh, fsdp=True)):
        state, _ = step(student_start(), KEY, {"x0": BATCHES[0]})
        np.testing.assert_array_equal(state.frozen["offset"], jnp.arange(2) + 1)


# --- Checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UPDATES)
def test_a_run_killed_and_resumed_is_the_unharmed_one_to_the_bit(tmp_path, name):
    step = compiled(name)
    whole, _ = run(step, STARTS[name]())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, two_steps(name)[0])
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(STARTS[name]())
    assert restored.step == 2
    state = jax.device_get(restored.state)  # what is on no device yet compiles nothing anew
    resumed, _ = run(step, state, BATCHES[2:])
    assert_same_bits(resumed, whole)


def test_what_is_frozen_is_not_written_and_is_taken_from_the_target(tmp_path):
    state = student_start()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        found = checkpoints.restore().state
        assert found.keys() == {"step", "params", "ema", "opt_state", "statistics"}
        other = state._replace(frozen={"another": jnp.ones(2)})
        assert_same_bits(checkpoints.restore(other).state, other)
        without = state._replace(statistics=())
        with pytest.raises(CheckpointError, match="statistics.square: wanted no such leaf"):
            checkpoints.restore(without)
    assert not any(
        b"teacher" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )


def test_a_checkpoint_from_before_there_were_statistics_restores(tmp_path):
    update = make_update(lambda p, k, b: (b["x0"] @ p["w"], {}), SGD, ema_decay=0.9)
    state = update.init({"w": jnp.ones(cases.NUM_DIMS)}, frozen={"teacher": jnp.ones(2)})
    earlier = {name: getattr(state, name) for name in ("step", "params", "ema", "opt_state")}
    with Checkpoints(tmp_path / "earlier") as one, Checkpoints(tmp_path / "now") as two:
        one.save(0, earlier)
        two.save(0, state)
        assert_same_bits(one.restore(state).state, state)
        assert_same_bits(one.restore().state, two.restore().state)


# --- Refusals ---------------------------------------------------------------------------------


def linear(params, key, batch):
    return batch["x0"] @ params["w"], {}


W = {"w": jnp.ones(cases.NUM_DIMS)}
CRITIC_UPDATE = make_update(cases.critic_loss, SGD, ema_decay=0.5, part="critic")
PLAIN = make_update(linear, SGD, ema_decay=0.5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: make_update(optimizer=SGD, ema_decay=0.9), "`loss_fn` must be a function"),
        (
            lambda: make_update(linear, SGD, ema_decay=0.9, loss_of=lambda state: linear),
            "`loss_fn` and `loss_of` are both given",
        ),
        (
            lambda: make_update(loss_of=linear, optimizer=SGD, ema_decay=0.9),
            "`loss_of` must be a function state -> loss_fn.*does not take 1",
        ),
        (lambda: make_update(linear, ema_decay=0.9), "`optimizer` must be one of optax"),
        (lambda: make_update(linear, SGD, ema_decay=0.9, part=0), "`part` must name a part"),
        (lambda: networks.alternate(), "must be given the update of each part"),
        (lambda: networks.alternate(critic=linear), r"`critic` must be an update.*part='critic'"),
        (
            lambda: networks.alternate(critic=PLAIN),
            "`critic` must be the update of the part of that name; its `part` is None",
        ),
        (lambda: networks.alternate(generator=CRITIC_UPDATE), "its `part` is 'critic'"),
        (
            lambda: networks.alternate(critic=CRITIC_UPDATE, every={"generator": 2}),
            "`every` must name parts, 'critic'; got 'generator'",
        ),
        (
            lambda: networks.alternate(critic=CRITIC_UPDATE, every={"critic": 0}),
            r"`every\['critic'\]` must be at least 1",
        ),
        (
            lambda: networks.alternate(
                critic=CRITIC_UPDATE,
                generator=make_update(
                    cases.generator_loss, SGD, ema_decay=0.5, part="generator", skip_nonfinite=True
                ),
            ),
            "`skip_nonfinite` must be the same for all",
        ),
        (lambda: CRITIC_UPDATE.init(W), "`params` must have the part 'critic'.*has 'w'"),
        (lambda: CRITIC_UPDATE.init(jnp.ones(2)), "`params` must be a dictionary by part"),
        (
            lambda: networks.alternate(critic=CRITIC_UPDATE).init(cases.gan_params()),
            "`params` must have the parts that are trained, 'critic', alone; got 'generator' too",
        ),
        (lambda: cases.gan().init({"critic": W}), "must have the part 'generator'"),
        (
            lambda: PLAIN.init(W, statistics={"count": jnp.zeros((), int)}),
            r"`statistics\['count'\]` must be an array of floating-point.*`state.step`",
        ),
        (lambda: PLAIN.init(W, frozen={"net": "a"}), r"`frozen\['net'\]` must be an array"),
        (lambda: PLAIN.init(W, frozen=jax.nn.relu), "`frozen` must be an array"),
    ],
)
def test_what_makes_no_update_or_state_is_refused_by_name(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


def of_state(loss_of):
    return make_update(loss_of=loss_of, optimizer=SGD, ema_decay=0.5)


def with_third(third):
    return make_update(lambda p, k, b: (b["x0"] @ p["w"], {}, third), SGD, ema_decay=0.5)


MEAN = {"mean": jnp.zeros(2)}


@pytest.mark.parametrize(
    ("update", "state", "match"),
    [
        (of_state(lambda s: None), PLAIN.init(W), r"`loss_of\(state\)` must be a function"),
        (of_state(lambda s: lambda p: p), PLAIN.init(W), r"does not take 3 arguments"),
        (
            with_third({"mean": jnp.zeros(2)}),
            PLAIN.init(W),
            "`loss_fn` must return third the new `state.statistics`.*`update.init`",
        ),
        (with_third({"mean": jnp.zeros((8, 2))}), PLAIN.init(W, statistics=MEAN), "means over"),
        (with_third({"mean": jnp.zeros(2, int)}), PLAIN.init(W, statistics=MEAN), "floating"),
        (CRITIC_UPDATE, PLAIN.init(W), "`state.params` must have the part 'critic'"),
        (
            CRITIC_UPDATE,
            training.init(cases.gan_params(), SGD, ema_decay=0.5)._replace(ema=W),
            "`state.ema` must have the part 'critic'.*`update.init`",
        ),
        (
            CRITIC_UPDATE,
            training.init(cases.gan_params(), SGD, ema_decay=0.5),
            "`state.opt_state` must be a dictionary by part.*`update.init`",
        ),
        (
            cases.gan(),
            cases.gan().init(cases.gan_params())._replace(params=cases.gan_params() | {"c": W}),
            "got 'c' too",
        ),
        (cases.gan(), {"params": W}, "`state` must be a TrainState"),
    ],
)
def test_a_state_or_loss_that_does_not_fit_is_refused_by_name(update, state, match):
    with pytest.raises((TypeError, ValueError), match=match):
        jax.eval_shape(update, state, KEY, {"x0": BATCHES[0]})
