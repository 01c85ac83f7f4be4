import itertools
import json
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
from jaxdiff.training.program import Steps
from jaxdiff.training.telling import Telling
from jaxdiff.training.update import scan_steps

OPTIMIZER = optax.adam(0.1)


def loss_fn(params, key, batch):
    noise = jax.random.normal(key, batch["x0"].shape)
    return (batch["x0"] * params["w"] + noise - 1.0) ** 2, {}


UPDATE = jax.jit(training.make_update(loss_fn, OPTIMIZER, ema_decay=0.9))


def train(folder, num_steps, step_fn=UPDATE, checkpoint_every=4, until=None, steps=None, **telling):
    state = training.init({"w": jnp.ones(())}, OPTIMIZER, ema_decay=0.9)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        restored = checkpoints.restore(target=state)
        state = state if restored is None else jax.tree.map(jnp.asarray, restored.state)
        start = int(state.step)
        batches = ({"x0": jnp.full(4, float(step))} for step in itertools.count(start))
        log = run.MetricsLog(folder / run.METRICS, after=start)
        try:
            return loop.fit(
                state,
                Steps(step_fn, **(steps or {})),
                jax.random.key(0),
                itertools.islice(batches, None if until is None else until - start),
                num_steps=num_steps,
                checkpoints=checkpoints,
                config={"name": "test"},
                cadence=training.Cadence(log=3, save=checkpoint_every),
                telling=Telling(log, **telling),
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


def test_the_report_of_a_bad_step_says_what_repeats_it(tmp_path):
    """Also where the bad step is neither logged nor saved."""

    def broken(state, key, batch):
        new, metrics = UPDATE(state, key, batch)
        return new, {**metrics, "grad_norm": jnp.where(new.step == 5, jnp.inf, 1.0)}

    with pytest.raises(loop.NotFinite, match="Step 5 is not finite: .*grad_norm=inf") as caught:
        train(tmp_path, 13, broken, repeat=lambda step: {"indices": [step, 7]})
    assert caught.value.details["step"] == 5
    assert caught.value.details["indices"] == [5, 7]
    assert json.loads(json.dumps(caught.value.details))["values"]["grad_norm"] == "inf"


def test_bad_steps_may_be_skipped_and_are_said(tmp_path, capsys):
    def now_and_then(state, key, batch):
        new, metrics = UPDATE(state, key, batch)
        bad = new.step % 4 == 1
        return new, {**metrics, "loss": jnp.where(bad, jnp.nan, metrics["loss"])}

    train(tmp_path, 13, now_and_then, steps={"skip_nonfinite": True})
    said = capsys.readouterr().err
    assert [f"Step {i} is not finite and was skipped" in said for i in (1, 5, 9, 13)] == [True] * 4
    assert "Step 4 " not in said
    logged = [line["step"] for line in run.read_metrics(tmp_path / run.METRICS)]
    assert logged == [3, 6, 12]  # of 3, 6, 9, 12, 13

    def always(state, key, batch):
        new, metrics = UPDATE(state, key, batch)
        return new, {**metrics, "loss": jnp.nan * metrics["loss"]}

    (tmp_path / "always").mkdir()
    with pytest.raises(loop.NotFinite, match=f"Step {loop.MAX_SKIPPED} is not finite"):
        train(tmp_path / "always", 1000, always, steps={"skip_nonfinite": True})


def test_saves_come_at_the_same_steps_however_many_a_call_makes():
    for start, num_steps, every, per_call in ((0, 13, 4, 3), (5, 40, 10, 8), (0, 6, 100, 3)):
        lengths = list(loop.call_lengths(start, num_steps, every, per_call))
        ends = start + np.cumsum(lengths)
        assert ends[-1] == num_steps
        assert set(lengths) <= {1, per_call}
        assert set(range(every * (start // every + 1), num_steps, every)) <= set(ends)


def test_several_steps_a_call_log_and_save_what_single_ones_do(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    train(tmp_path / "one", 13)
    scanned = jax.jit(scan_steps(training.make_update(loss_fn, OPTIMIZER, ema_decay=0.9)))
    train(tmp_path / "many", 13, steps={"several": scanned, "per_call": 3})
    one, many = (run.read_metrics(tmp_path / name / run.METRICS) for name in ("one", "many"))
    assert [line["step"] for line in many] == [line["step"] for line in one] == [3, 6, 9, 12, 13]
    for a, b in zip(one, many, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-12)
    found = [Checkpoints(tmp_path / name / "checkpoints").restore() for name in ("one", "many")]
    for a, b in zip(*(jax.tree.leaves(each.state) for each in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_batches_are_placed_before_they_are_wanted():
    placed, asked = [], []

    def place(batch, scanned):
        placed.append(batch["x0"].tolist())
        return batch

    batches = ({"x0": np.full(1, i)} for i in range(10))
    for length, _ in loop.feed(batches, iter([1] * 5), place, ahead=2):
        asked.append(length)
        assert len(placed) == min(len(asked) + 2, 5)
    assert placed == [[0], [1], [2], [3], [4]]


def test_a_profile_and_tensorboard_leave_their_files(tmp_path):
    train(tmp_path, 6, profile=(tmp_path / "profile", 2))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    log = run.MetricsLog(tmp_path / run.METRICS, after=0, tensorboard=tmp_path / "board")
    log.write({"step": 1, "loss": 2.0})
    log.close()
    (events,) = (tmp_path / "board").iterdir()
    assert b"loss" in events.read_bytes()


def test_a_log_on_a_full_disk_is_a_clear_error(tmp_path):
    log = run.MetricsLog(tmp_path / run.METRICS, after=0)
    log._file.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(run.RunError, match="/dev/full cannot be written: No space left on device"):
        log.write({"step": 1})
    log.close()


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    (tmp_path / run.METRICS).write_text('null\n{"step": 1}\n[1]\n{"loss": 2}\n{"st')
    assert run.read_metrics(tmp_path / run.METRICS) == [{"step": 1}]


def test_checkpoints_hold_the_mean_loss_since_the_one_before(tmp_path):
    train(tmp_path, 8, checkpoint_every=4)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.best("loss") in (4, 8)
        assert checkpoints.best("no such metric") is None
    found = json.loads((tmp_path / "checkpoints" / "8" / "metrics.json").read_text())
    assert found["loss"] > 0


def test_the_best_checkpoint_stays(tmp_path):
    values = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.2}
    with Checkpoints(tmp_path, keep_last=2, keep_best="loss") as checkpoints:
        for step, value in values.items():
            checkpoints.save(step, {"w": jnp.ones(2)}, metrics={"loss": value})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.best("loss") == 2


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_where_the_data_end_what_was_trained_is_saved_and_said(tmp_path, steps_per_call):
    (tmp_path / "ended").mkdir()
    scan = jax.jit(scan_steps(training.make_update(loss_fn, OPTIMIZER, ema_decay=0.9)))
    with pytest.raises(
        loop.DataEnded, match=r"ended after step 6, which is saved\. Repeat the data"
    ):
        train(tmp_path / "ended", 13, until=6, steps={"several": scan, "per_call": steps_per_call})
    assert Checkpoints(tmp_path / "ended" / "checkpoints").steps()[-1] == 6
    assert run.read_metrics(tmp_path / "ended" / run.METRICS)[-1]["step"] == 6
    (tmp_path / "whole").mkdir()
    assert_same(train(tmp_path / "ended", 13), train(tmp_path / "whole", 13))


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
