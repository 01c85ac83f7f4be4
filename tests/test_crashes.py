"""Runs killed, moved to other devices and spread over processes end as the unharmed one."""

import contextlib
import functools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import fit_run
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from servers import free_port
from test_parallel import finish, start

from experiments.images import sample_folders as streaming
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.loop import STOPPED_EXIT_CODE

HERE = pathlib.Path(__file__).parent
SCRIPT = HERE / "fit_run.py"
STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """What this process compiles it shares with those that it starts."""
    shared = {
        "jax_compilation_cache_dir": os.environ["JAX_COMPILATION_CACHE_DIR"],
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    with contextlib.ExitStack() as changed:
        changed.callback(compilation_cache.reset_cache)
        for name, value in shared.items():
            changed.callback(jax.config.update, name, getattr(jax.config, name))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield


def fit(folder, num_steps=STEPS, devices=1, **running):
    """Go on with a run in another process; return what it ends with."""
    finish([start(devices, SCRIPT, folder, num_steps, 20, json.dumps(running))])
    return Checkpoints(folder / "checkpoints").restore()


def fit_here(folder, num_steps=STEPS, checkpoint_every=20):
    """Go on with a run in this process, on one device; return what it ends with."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        assert fit_run.main(folder, str(num_steps), checkpoint_every) == 0
    return Checkpoints(folder / "checkpoints").restore()


@functools.cache
def unharmed():
    """What nothing harmed: the state after 20 steps and at the end, and the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        fit_here(pathlib.Path(folder))
        checkpoints = Checkpoints(pathlib.Path(folder) / "checkpoints")
        states = {step: checkpoints.restore(step=step).state for step in (20, STEPS)}
        return states, runs.read_metrics(pathlib.Path(folder) / runs.METRICS)


def assert_same_bits(state, wanted):
    for (path, got), (_, leaf) in zip(
        *(jax.tree.leaves_with_path(each) for each in (state, wanted)), strict=True
    ):
        np.testing.assert_array_equal(got, leaf, err_msg=jax.tree_util.keystr(path))


def distance(one, other):
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    gap = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
    return (gap / sum(float(np.sum(b**2)) for _, b in pairs)) ** 0.5


def losses(metrics):
    return {line["step"]: line["loss"] for line in metrics}


def kill_again_and_again(folder, seed, kills, command):
    """Start a command `kills` times and kill it as often, each time after it made progress."""
    rng = random.Random(seed)
    moments = [rng.uniform(0.0, 1.0) for _ in range(kills)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
    for moment in moments:
        running = subprocess.Popen(
            command,
            cwd=HERE.parent,
            env=env,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        before = progress_of(folder)
        while progress_of(folder) == before and running.poll() is None:
            time.sleep(0.002)  # until it has made a step or begun a save
        time.sleep(moment * 0.25)
        running.send_signal(signal.SIGKILL)
        running.wait()


def progress_of(folder):
    """What a run has left on disk, so that a change shows that it is at work."""
    metrics = folder / runs.METRICS
    checkpoints = folder / "checkpoints"
    names = sorted(os.listdir(checkpoints)) if checkpoints.exists() else []
    return (metrics.stat().st_size if metrics.exists() else 0, names)


def kill_and_compare(folder, seed, kills):
    command = [sys.executable, str(SCRIPT), str(folder), str(STEPS), "5"]
    kill_again_and_again(folder, seed, kills, command)
    states, metrics = unharmed()
    restored = fit_here(folder, checkpoint_every=5)
    assert restored.step == STEPS
    assert_same_bits(restored.state, states[STEPS])
    # every step was made once, of the same batch and noise
    assert losses(runs.read_metrics(folder / runs.METRICS)) == losses(metrics)


def test_a_run_killed_at_a_moment_ends_with_the_bits_of_the_unharmed_one(tmp_path):
    kill_and_compare(tmp_path / "run", seed=0, kills=1)


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_ends_with_the_bits_of_the_unharmed_one(tmp_path):
    kill_and_compare(tmp_path / "run", seed=1, kills=20)


@pytest.mark.slow
def test_a_run_moves_from_one_device_to_a_mesh_of_eight_to_pmap_on_four(tmp_path):
    fit(tmp_path, 20)
    fit(tmp_path, 40, devices=8, parallel="mesh", fsdp=2)
    moved = fit(tmp_path, devices=4, parallel="pmap")
    states, metrics = unharmed()
    for name in ("params", "ema"):
        gap = distance(moved.state[name], states[STEPS][name])
        print(f"{name} differ by {gap:.1e}")
        assert gap < 1e-5
    assert [line["step"] for line in runs.read_metrics(tmp_path / runs.METRICS)] == [
        line["step"] for line in metrics
    ]


@pytest.mark.slow
def test_a_run_goes_on_with_half_its_devices_at_the_rows_that_it_began_with(tmp_path):
    mesh = {"parallel": "mesh", "fsdp": 2}
    fit(tmp_path, 20, devices=8, **mesh)
    half = start(4, SCRIPT, tmp_path, 40, 20, json.dumps(mesh))
    _, err = half.communicate(timeout=600)
    assert half.returncode == 0, err
    assert "in 2 parts, for 4 rows a device" in err
    ended = fit(tmp_path, devices=8, **mesh)
    states, metrics = unharmed()
    assert distance(ended.state, states[STEPS]) < 1e-5
    found = losses(runs.read_metrics(tmp_path / runs.METRICS))
    assert found == pytest.approx(losses(metrics), rel=1e-4)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_at_the_rows_that_it_began_with(tmp_path):
    finish(by_two(tmp_path, 30, MESH))
    one = start(1, SCRIPT, tmp_path, STEPS, 20, "{}")
    _, err = one.communicate(timeout=600)
    assert one.returncode == 0, err
    assert "in 8 parts, for 4 rows a device" in err
    ended = Checkpoints(tmp_path / "checkpoints").restore()
    assert distance(ended.state, unharmed()[0][STEPS]) < 1e-5


PMAP, MESH = {"parallel": "pmap"}, {"parallel": "mesh", "fsdp": 8}


def by_two(folder, num_steps, mode, harm=(), checkpoint_every=20):
    """Start two processes of four devices, the second one harmed."""
    shared = {"coordinator_address": f"localhost:{free_port()}", "num_processes": 2}
    shared["distributed"] = True
    options = [json.dumps({**mode, **shared, "process_id": process_id}) for process_id in range(2)]
    return [
        start(4, SCRIPT, folder, num_steps, checkpoint_every, options[0]),
        start(4, SCRIPT, folder, num_steps, checkpoint_every, options[1], *harm),
    ]


def test_two_processes_of_four_devices_resume_a_run_and_save_it(tmp_path):
    """One device begins it, they have the state in parts, and one device has it to itself again."""
    fit_here(tmp_path, 2)
    finish(by_two(tmp_path, 4, MESH))
    ended = fit_here(tmp_path, 20)
    states, metrics = unharmed()
    assert distance(ended.state["params"], states[20]["params"]) < 1e-5
    found, wanted = (losses(each) for each in (runs.read_metrics(tmp_path / runs.METRICS), metrics))
    assert found == pytest.approx({step: wanted[step] for step in range(1, 21)}, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [((30, MESH),), ((20, PMAP), (40, MESH))], ids=("once", "twice"))
def test_two_processes_make_most_of_a_run(parts, tmp_path):
    for num_steps, mode in parts:
        finish(by_two(tmp_path, num_steps, mode))
    ended = fit(tmp_path)
    states, metrics = unharmed()
    assert distance(ended.state["params"], states[STEPS]["params"]) < 1e-5
    found = losses(runs.read_metrics(tmp_path / runs.METRICS))
    assert found == pytest.approx(losses(metrics), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["eight", "two"])
def test_images_are_the_same_by_one_device_eight_and_two_processes(by, tmp_path):
    fit(tmp_path / "run", 20)

    def sample(name, devices, options):
        command = ("-m", "experiments.digits", "sample", "--run-dir", tmp_path / "run", "--quiet")
        what = ("--num", 1100, "--num-steps", 2, "--out", tmp_path / name)
        finish([start(devices, *command, *what, *each) for each in options])
        return streaming.read(tmp_path / name)

    images, labels = sample("one", 1, [()])
    assert images.shape == (1100, 8, 8, 1)
    assert images.std() > 10
    others = ("--coordinator-address", f"localhost:{free_port()}", "--num-processes", 2)
    shared = [("--parallel", "mesh", "--distributed", *others, "--process-id", i) for i in range(2)]
    devices, options = {"eight": (8, [("--parallel", "mesh")]), "two": (4, shared)}[by]
    found, found_labels = sample(by, devices, options)
    np.testing.assert_array_equal(found_labels, labels)
    differing = (found != images).mean()
    print(f"{by}: {differing:.1e} of the pixels differ")
    assert differing < 1e-3  # a rounding may fall on the other side of a level
    assert np.abs(found.astype(int) - images).max() <= 16  # by one of the 17 levels


@pytest.mark.parametrize(
    ("harm", "said"),
    [pytest.param("fail", "OSError", marks=pytest.mark.slow), ("seed", "`config`")],
)
def test_a_process_that_fails_takes_the_other_down_at_once(tmp_path, harm, said):
    running = by_two(tmp_path, 20, PMAP, harm=(harm,))
    began = time.monotonic()
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert all(process.returncode not in (0, STOPPED_EXIT_CODE) for process in running)
    assert said in errors[1]
    assert time.monotonic() - began < 90  # JAX itself waits for 300 seconds
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    running = by_two(tmp_path, 100_000, PMAP)
    while not runs.read_metrics(tmp_path / runs.METRICS):
        assert running[0].poll() is None
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [STOPPED_EXIT_CODE] * 2, errors
    newest = Checkpoints(tmp_path / "checkpoints").steps()[-1]
    assert all(f"after step {newest}," in error for error in errors)


def train(folder, *options):
    command = [sys.executable, "-m", "experiments.digits", "train", "--preset", "smoke", "--quiet"]
    return subprocess.Popen(
        [*command, "--run-dir", str(folder), *options],
        cwd=HERE.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_hundred_starts_in_a_used_folder_are_refused_in_a_sentence_and_change_nothing(tmp_path):
    slow = ["--width", "128", "--depth", "4", "--batch-size", "256", "--decay-steps", "99999"]
    first = train(tmp_path / "shared", *slow, "--num-steps", "99999")
    while not (tmp_path / "shared" / ".lock").exists():
        assert first.poll() is None
        time.sleep(0.02)
    seconds = []
    for seed in range(100):
        began = time.monotonic()
        _, err = train(tmp_path / "shared", *slow, "--seed", str(seed)).communicate(timeout=60)
        seconds.append(time.monotonic() - began)
        assert re.fullmatch(r"error: .*being written by process \d+ on .*\n", err), err
    print(f"the longest start took {max(seconds):.1f} s")
    while not runs.read_metrics(tmp_path / "shared" / runs.METRICS):
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode == STOPPED_EXIT_CODE
    one = Checkpoints(tmp_path / "shared" / "checkpoints").restore()
    steps = str(one.step)
    alone = train(tmp_path / "alone", *slow, "--num-steps", steps, "--no-evaluate")
    _, err = alone.communicate()
    assert alone.returncode == 0, err
    two = Checkpoints(tmp_path / "alone" / "checkpoints").restore()
    assert_same_bits(one.state, two.state)


def test_sigterm_saves_and_exits_with_its_own_code(tmp_path):
    running = start(1, SCRIPT, tmp_path, 100_000, 100_000)
    while not (tmp_path / runs.METRICS).exists() or not runs.read_metrics(tmp_path / runs.METRICS):
        assert running.poll() is None
        time.sleep(0.01)
    for _ in range(3):  # a job, its step and its group are each sent one
        running.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    _, err = running.communicate(timeout=60)
    assert running.returncode == STOPPED_EXIT_CODE, err
    assert "Traceback" not in err
    assert "Stopped by SIGTERM after step" in err
    (step,) = Checkpoints(tmp_path / "checkpoints").steps()
    assert f"after step {step}," in err
