"""The trainer of the library: a run from a folder to a state, of finished values."""

import functools
import itertools
import json
import signal

import jax
import jax.numpy as jnp
import networks_cases
import numpy as np
import optax
import pytest

from jaxdiff import numerics, training
from jaxdiff.training import lock, loop, parallel, run, throughput
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints
from jaxdiff.training.loading import average_of
from jaxdiff.training.parallel import mode_of_one_device
from jaxdiff.training.trainer import NONFINITE

KEY = jax.random.key(3)
FLOPS = 3.0
CADENCE = training.Cadence(log=3, save=4)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """The operations of a step are not counted anew for each of these runs."""
    monkeypatch.setattr(throughput, "count_flops", lambda *args: FLOPS)


def loss_fn(params, key, batch):
    noise = numerics.normal(key, batch["x0"])
    return (batch["x0"] * params["w"] + noise - 1.0) ** 2, {}


def update(**options):
    return training.make_update(loss_fn, optax.adam(0.1), ema_decay=0.9, **options)


def start():
    return update().init({"w": jnp.ones(())})


def batches_from(step):
    return ({"x0": jnp.full(4, float(i))} for i in itertools.count(step))


def fit(folder, num_steps=13, **options):
    given = {"key": KEY, "num_steps": num_steps, "cadence": CADENCE} | options
    make = given.pop("make_state", start)
    made = given.pop("update", update())
    return training.fit(folder, make, made, given.pop("batches_from", batches_from), **given)


def by_hand(num_steps=13, start=start, update=update):
    state, step = start(), jax.jit(update())
    for batch in itertools.islice(batches_from(0), num_steps):
        state, _ = step(state, KEY, batch)
    return state


def assert_same(a, b):
    for got, wanted in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_it_makes_the_updates_and_leaves_a_run(tmp_path):
    folder = tmp_path / "new" / "run"
    state = fit(folder, record={"width": 3})
    assert_same(state, by_hand())
    assert [line["step"] for line in run.read_metrics(folder / run.METRICS)] == [3, 6, 9, 12, 13]
    assert Checkpoints(folder / run.CHECKPOINTS).steps() == [8, 12, 13]
    assert run.read_record(folder)["config"] == {"width": 3}
    last = run.read_metrics(folder / run.METRICS)[-1]
    assert last["examples_per_second"] == pytest.approx(4 * last["steps_per_second"])
    assert last["model_flops_per_second"] == pytest.approx(FLOPS * last["steps_per_second"])


def test_a_run_in_parts_is_the_run_in_one_whatever_the_mode(tmp_path):
    record = {"width": 3, "sizes": (1, 2)}
    fit(tmp_path, 6, record=record, mode=parallel.mode_of_pmap())
    mesh = parallel.mode_of_mesh(parallel.make_mesh(jax.device_count()), fsdp=True)
    fit(tmp_path, 11, record=record, mode=mesh)
    state = fit(tmp_path, 13, record=record, mode=mode_of_one_device()._replace(steps_per_call=2))
    np.testing.assert_allclose(state.params["w"], by_hand().params["w"], rtol=1e-12)


def test_the_mode_says_in_how_many_parts_a_gradient_is_taken(tmp_path, monkeypatch):
    seen = []
    compiled = mode_of_one_device()

    def compile_(update, **options):
        seen.append(update.accumulate)
        return compiled.compile(update, **options)

    state = fit(tmp_path, 3, mode=compiled._replace(compile=compile_, accumulate=2))
    assert seen == [2]
    np.testing.assert_allclose(state.params["w"], by_hand(3).params["w"], rtol=1e-12)
    with pytest.raises(TypeError, match="`update` must be of make_update"):
        compiled._replace(accumulate=2).steps(lambda *args: update()(*args))


def test_a_finished_run_is_given_back_and_nothing_is_asked_of_its_data(tmp_path):
    state = fit(tmp_path, 5)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(step):
        raise AssertionError("the data were asked for")

    assert_same(fit(tmp_path, 5, batches_from=refuse), state)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_frozen_arrays_are_given_and_never_saved(tmp_path):
    def of_teacher(state):
        def loss_fn(params, key, batch):
            return (batch["x0"] * params["w"] - state.frozen["w"]) ** 2, {}

        return loss_fn

    made = training.make_update(loss_of=of_teacher, optimizer=optax.adam(0.1), ema_decay=0.9)
    make = lambda: made.init({"w": jnp.ones(())})  # noqa: E731
    teacher = {"w": np.float64(2.0)}
    given = {"update": made, "frozen": teacher}

    def with_own():
        return made.init({"w": jnp.ones(())}, frozen={"w": jnp.asarray(2.0)})

    fit(tmp_path, 6, make_state=make, **given)
    state = fit(tmp_path, 9, update=made, make_state=with_own)
    assert "frozen" not in Checkpoints(tmp_path / "checkpoints").restore().state
    wanted = by_hand(9, with_own, lambda: made)
    assert_same(state, wanted)
    assert float(state.frozen["w"]) == 2.0
    with pytest.raises(ValueError, match="`frozen` and the state of `make_state` both"):
        fit(tmp_path, 20, make_state=with_own, **given)


def test_several_networks_and_plain_functions_are_trained_alike(tmp_path):
    dtype = jnp.float64
    gan = networks_cases.gan()
    x0 = jax.random.normal(jax.random.key(5), (4, 8, 4))

    def batches_from(step):
        return ({"x0": x0[i % 4]} for i in itertools.count(step))

    options = {
        "make_state": lambda: gan.init(networks_cases.gan_params(dtype)),
        "batches_from": batches_from,
    }
    fit(tmp_path, 2, update=gan, **options)
    state = fit(tmp_path, 4, update=lambda *args: gan(*args), **options)
    assert {"generator_loss", "critic_loss"} <= run.read_metrics(tmp_path / run.METRICS)[-1].keys()
    step, wanted = jax.jit(gan), options["make_state"]()
    for batch in itertools.islice(batches_from(0), 4):
        wanted, _ = step(wanted, KEY, batch)
    assert_same(state, wanted)


def test_a_step_that_is_not_finite_leaves_what_repeats_it(tmp_path):
    def broken_from(step):
        return ({"x0": jnp.full(4, 1.0 if i != 4 else jnp.inf)} for i in itertools.count(step))

    report = training.Report(repeat=lambda step: {"file": f"part {step}"})
    with pytest.raises(loop.NotFinite, match="Step 5 is not finite"):
        fit(tmp_path, batches_from=broken_from, report=report)
    found = json.loads((tmp_path / NONFINITE).read_text())
    drawn = jax.random.key_data(jax.random.fold_in(KEY, 4)).tolist()
    assert (found["step"], found["file"], found["key_data"]) == (5, "part 4", drawn)
    state = fit(tmp_path, update=update(skip_nonfinite=True), batches_from=broken_from)
    assert np.isfinite(state.params["w"])


BAD = (2, 5, 6, 10, 12, 13)
"""Steps that are not finite. Checkpoints come at 4, 8, 12 and 13; logged are 3, 6, 9, 12, 13."""


def broken_from(step, ends=None):
    for i in itertools.count(step):
        if i + 1 == ends:
            raise ConnectionError
        yield {"x0": jnp.full(4, jnp.nan if i + 1 in BAD else 1.0)}


def skipped(folder):
    """The counts of the log, and of the newest checkpoint."""
    lines = {line["step"]: line["skipped"] for line in run.read_metrics(folder / run.METRICS)}
    checkpoints = Checkpoints(folder / run.CHECKPOINTS)
    found = checkpoints.metrics(checkpoints.steps()[-1])
    return lines, found["skipped"], found.get("skipped_in_a_row", 0)


@pytest.mark.parametrize("ends", [(6,), (11,), (7, 9, 12)])
def test_what_was_skipped_is_counted_over_all_of_a_run_whatever_interrupts_it(
    tmp_path, capsys, ends
):
    skipping = update(skip_nonfinite=True)
    fit(tmp_path / "whole", update=skipping, batches_from=broken_from)
    assert skipped(tmp_path / "whole") == ({3: 1, 9: 3}, 6, 2)
    assert capsys.readouterr().err.count("was skipped") == len(BAD)
    for end in ends:  # the steps after a checkpoint are made again
        cut = functools.partial(broken_from, ends=end)
        with pytest.raises(ConnectionError):
            fit(tmp_path / "cut", update=skipping, batches_from=cut)
    fit(tmp_path / "cut", update=skipping, batches_from=broken_from)
    assert skipped(tmp_path / "cut") == skipped(tmp_path / "whole")
    fit(tmp_path / "cut", num_steps=16)  # no more are skipped; those that were are still said
    assert skipped(tmp_path / "cut") == ({3: 1, 9: 3, 15: 6, 16: 6}, 6, 0)


def test_several_steps_a_call_count_what_single_ones_do(tmp_path):
    mode = mode_of_one_device()._replace(steps_per_call=3)
    fit(tmp_path, update=update(skip_nonfinite=True), batches_from=broken_from, mode=mode)
    assert skipped(tmp_path) == ({3: 1, 9: 3}, 6, 2)


def test_a_run_that_skips_nothing_says_nothing_of_it(tmp_path):
    fit(tmp_path, num_steps=4)
    assert not any("skipped" in line for line in run.read_metrics(tmp_path / run.METRICS))
    assert "skipped" not in Checkpoints(tmp_path / run.CHECKPOINTS).metrics(4)


def test_too_many_skipped_in_a_row_stop_a_run_in_parts_where_they_stop_the_whole(tmp_path):
    def broken_until(ends):
        def batches(step):
            for i in range(step, 200):
                if i == ends:
                    raise ConnectionError
                yield {"x0": jnp.full(4, jnp.nan)}

        return batches

    def go_on(ends=None):
        fit(tmp_path, 200, update=skipping, batches_from=broken_until(ends))

    skipping = update(skip_nonfinite=True)
    with pytest.raises(ConnectionError):
        go_on(ends=70)
    with pytest.raises(loop.NotFinite, match=f"Step {loop.MAX_SKIPPED} is not finite"):
        go_on()


def test_a_signal_saves_and_the_same_call_goes_on(tmp_path):
    def stopping_from(step):
        for i, batch in enumerate(batches_from(step), step):
            if i == 7:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with pytest.raises(loop.Stopped):
        fit(tmp_path, batches_from=stopping_from)
    assert_same(fit(tmp_path), by_hand())


def test_what_is_said_where_steps_are_left(tmp_path):
    begun = []
    report = training.Report(begun=lambda: begun.append(True), profile_steps=1)
    fit(tmp_path, 5, report=report)
    fit(tmp_path, 5, report=report)
    assert begun == [True]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_another_run_is_refused_and_what_is_free_is_not(tmp_path):
    record = training.Record({"width": 3, "folder": "a"}, free=("folder",))
    fit(tmp_path, 5, record=record)
    fit(tmp_path, 6, record=record._replace(config={"width": 3, "folder": "b"}))
    with pytest.raises(run.RunError, match="width: there 3, asked 4"):
        fit(tmp_path, 7, record={"width": 4, "folder": "b"})
    newer = record._replace(config={"width": 3, "folder": "b", "depth": 2}, defaults={"depth": 2})
    fit(tmp_path, 7, record=newer)


def test_a_folder_that_another_process_writes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.files, "hold", lambda descriptor: False)
    with pytest.raises(run.RunError, match="being written by"):
        fit(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"num_steps": 0}, ValueError, "`num_steps` must be at least 1"),
        ({"num_steps": 2.5}, TypeError, "`num_steps` must be a whole number"),
        ({"cadence": training.Cadence(log=0)}, ValueError, "`cadence.log` must be at least 1"),
        ({"cadence": training.Cadence(save=True)}, TypeError, "`cadence.save` must be a whole"),
        ({"key": 0}, TypeError, "key"),
        ({"keep": training.Keep(last=0)}, ValueError, "`keep_last`"),
        ({"mode": mode_of_one_device()._replace(steps_per_call=0)}, ValueError, "`steps_per_call`"),
        ({"batches_from": lambda step: iter(())}, loop.DataEnded, "ended after step 0"),
        ({"record": {"x": object()}}, TypeError, "JSON"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_leaves_no_folder(tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        fit(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_run_is_read_back_without_its_network(tmp_path):
    with pytest.raises(run.RunError, match="does not exist"):
        training.load_run(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        training.load_run(tmp_path)
    decays = {"main": 0.9, "slow": training.ema.Warmup(0.99)}
    made = training.make_update(loss_fn, optax.adam(0.1), ema_decay=decays)
    state = fit(
        tmp_path, 9, update=made, make_state=lambda: made.init({"w": jnp.ones(())}), record={"a": 1}
    )
    found = training.load_run(tmp_path)
    assert (found.step, found.config, found.record["config"]) == (9, {"a": 1}, {"a": 1})
    assert_same(found.params, state.ema["main"])
    assert_same(training.load_run(tmp_path, "slow").params, state.ema["slow"])
    assert_same(training.load_run(tmp_path, raw=True).params, state.params)
    assert training.load_run(tmp_path, step=8).step == 8
    for options, said in (
        ({"average": "fast"}, "`average` must be one of 'main', 'slow'.*got 'fast'"),
        ({"average": "slow", "raw": True}, "`average` and `raw`"),
    ):
        with pytest.raises(ValueError, match=said):
            training.load_run(tmp_path, **options)


def test_an_average_is_found_by_part_and_by_name():
    params = {"critic": {"w": 1.0}, "generator": {"w": 2.0}}
    assert average_of(params, params) is params
    named = {part: {"main": tree, "other": {"w": 0.0}} for part, tree in params.items()}
    assert average_of(params, named) == params
    assert average_of(params, named, "other")["critic"] == {"w": 0.0}
    with pytest.raises(ValueError, match="`average` must be None"):
        average_of(params, params, "main")
