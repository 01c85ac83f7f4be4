import itertools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import training
from jaxdiff.training import loop, run
from jaxdiff.training.checkpoint import Checkpoints

OPTIMIZER = optax.adam(0.1)


def loss_fn(params, key, batch):
    noise = jax.random.normal(key, batch["x0"].shape)
    return (batch["x0"] * params["w"] + noise - 1.0) ** 2, {}


UPDATE = jax.jit(training.make_update(loss_fn, OPTIMIZER, ema_decay=0.9))


def train(folder, num_steps, step_fn=UPDATE, checkpoint_every=4):
    state = training.init({"w": jnp.ones(())}, OPTIMIZER, ema_decay=0.9)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        restored = checkpoints.restore(target=state)
        state = state if restored is None else jax.tree.map(jnp.asarray, restored.state)
        start = int(state.step)
        log = run.MetricsLog(folder / run.METRICS, after=start)
        try:
            return loop.fit(
                state,
                step_fn,
                jax.random.key(0),
                ({"x0": jnp.full(4, float(step))} for step in itertools.count(start)),
                num_steps=num_steps,
                checkpoints=checkpoints,
                config={"name": "test"},
                log=log,
                log_every=3,
                checkpoint_every=checkpoint_every,
            )
        finally:
            log.close()


def assert_same(a, b):
    for got, wanted in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = train(tmp_path / "one", 13)
    train(tmp_path / "two", 6)
    assert_same(train(tmp_path / "two", 13), whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_stops_and_the_run_goes_on_as_if_nothing_was(tmp_path, name):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = train(tmp_path / "one", 13)

    def signalled(state, key, batch):
        if int(state.step) == 5:
            os.kill(os.getpid(), getattr(signal, name))
        return UPDATE(state, key, batch)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Stopped, match=f"Stopped by {name} after step 6"):
        train(tmp_path / "two", 13, signalled)
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(train(tmp_path / "two", 13), whole)
    steps = [line["step"] for line in run.read_metrics(tmp_path / "two" / run.METRICS)]
    assert steps == [3, 6, 9, 12, 13] or steps == [3, 9, 12, 13]


def test_steps_beyond_the_newest_checkpoint_leave_the_log(tmp_path):
    path = tmp_path / run.METRICS
    path.write_text('{"step": 3, "loss": 1.0}\n{"step": 6, "loss": 1.0}\n{"step": 9, "lo')
    log = run.MetricsLog(path, after=4)
    log.write({"step": 6, "loss": 2.0})
    log.close()
    assert run.read_metrics(path) == [{"step": 3, "loss": 1.0}, {"step": 6, "loss": 2.0}]


def test_a_loss_that_is_not_finite_stops_and_saves_nothing_of_it(tmp_path):
    def broken(state, key, batch):
        state, metrics = UPDATE(state, key, batch)
        bad = state.step > 5
        return state, {**metrics, "loss": jnp.where(bad, jnp.nan, metrics["loss"])}

    with pytest.raises(loop.NotFinite, match="Step 6 is not finite: .*loss=nan"):
        train(tmp_path, 13, broken)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [4]


def test_the_hash_counts_the_mathematics_only():
    config = {"a": 1, "every": 5}
    assert run.config_hash(config, free=("every",)) == run.config_hash(
        {"a": 1, "every": 7}, free=("every",)
    )
    assert run.config_hash(config) != run.config_hash({"a": 2, "every": 5})
    assert len(run.config_hash(config)) == 16


def test_a_run_may_grow_and_change_what_is_free_but_nothing_else(tmp_path):
    config = {"num_steps": 5, "rate": 0.1, "every": 1, "decay": 5}
    options = {"free": ("num_steps", "every"), "grows": "num_steps"}
    run.write_record(tmp_path, config, free=options["free"])
    text = (tmp_path / run.CONFIG).read_text()
    longer = {"num_steps": 9, "rate": 0.1, "every": 2, "decay": None}
    assert run.reconcile(tmp_path, longer, **options) == {**longer, "decay": 5}
    for change, named in (
        ({"rate": 0.2}, "--rate: there 0.1, asked 0.2"),
        ({"num_steps": 4}, "--num-steps"),
    ):
        with pytest.raises(run.RunError, match=named):
            run.reconcile(tmp_path, {**config, **change}, **options)
    assert (tmp_path / run.CONFIG).read_text() == text


def test_directories_that_are_no_runs_are_refused(tmp_path):
    options = {"free": (), "grows": "num_steps"}
    (tmp_path / "file").write_text("")
    with pytest.raises(run.RunError, match="cannot be written"):
        run.write_record(tmp_path / "file" / "run", {"num_steps": 1}, free=())
    (tmp_path / run.CONFIG).write_text("{")
    with pytest.raises(run.RunError, match="cannot be read"):
        run.reconcile(tmp_path, {"num_steps": 1}, **options)
    (tmp_path / run.CONFIG).unlink()
    (tmp_path / run.CHECKPOINTS).mkdir()
    with pytest.raises(run.RunError, match="holds checkpoints but no config.json"):
        run.reconcile(tmp_path, {"num_steps": 1}, **options)
