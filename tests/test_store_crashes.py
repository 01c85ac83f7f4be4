"""Runs in a bucket, killed and with a store that fails, end as the unharmed one on a disk."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import faulty
import pytest
import servers
from test_crashes import (
    HERE,
    MESH,
    SCRIPT,
    STEPS,
    assert_same_bits,
    by_two,
    compiled_once,  # noqa: F401
    losses,
    unharmed,
)
from test_parallel import finish

from jaxdiff import files
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import Checkpoints

bucket = servers.bucket("gs")


@pytest.fixture
def folder(bucket, request):
    return bucket / f"runs of tests/{request.node.originalname}"


def begun(folder, checkpoint_every=5, env=None):
    """Go on with the run in another process; it takes over what a kill left."""
    command = [sys.executable, SCRIPT, folder, STEPS, checkpoint_every]
    return subprocess.Popen(
        [*map(str, command)],
        cwd=HERE.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)} | (env or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(folder, seed, kills, env=None):
    """Start the run `kills` times, and kill it as often, each time after it saved something."""
    rng = random.Random(seed)
    for _ in range(kills):
        running, before = begun(folder, env=env), files.sizes(folder / "checkpoints")
        while files.sizes(folder / "checkpoints") == before and running.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        running.send_signal(signal.SIGKILL)
        said = running.communicate()[1]
        assert running.returncode in (-signal.SIGKILL, 0), said
        assert_nothing_wrong_is_believed(folder)


def assert_nothing_wrong_is_believed(folder):
    """Hold whatever a reader takes for a sound checkpoint against the unharmed run's."""
    with Checkpoints(folder / "checkpoints", report=lambda message: None) as checkpoints:
        for step in checkpoints.sound_steps():
            restored = checkpoints.restore(step=step)
            assert int(restored.state["step"]) == step
            if step in unharmed()[0]:
                assert_same_bits(restored.state, unharmed()[0][step])


def assert_ended_as_unharmed(folder, env=None):
    running = begun(folder, env=env)
    said = running.communicate()[1]
    assert running.returncode == 0, said
    states, metrics = unharmed()
    restored = Checkpoints(folder / "checkpoints").restore()
    assert restored.step == STEPS
    assert_same_bits(restored.state, states[STEPS])
    assert losses(runs.read_metrics(folder / runs.METRICS)) == losses(metrics)


@pytest.mark.slow
def test_a_run_in_a_bucket_killed_at_twenty_moments_ends_with_the_bits_of_a_local_one(folder):
    kill(folder, seed=2, kills=20)
    assert_ended_as_unharmed(folder)


@pytest.mark.slow
def test_a_run_killed_twenty_times_in_a_store_that_fails_ends_with_the_bits_of_a_local_one(
    bucket, folder
):
    upstream = os.environ["STORAGE_EMULATOR_HOST"]
    with faulty.proxy(upstream, seed=3, rate=0.05) as (url, counts):
        kill(folder, seed=4, kills=20, env=servers.gcs_environment(url))
        assert_ended_as_unharmed(folder, env=servers.gcs_environment(url))
    print(counts)
    assert sum(counts.values()) > 0


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed_in_a_bucket_end_with_the_bits_of_local_ones(
    folder, tmp_path
):
    """The state is in parts of both; the one that is left ends, and both go on from the last.

    Orbax writes it there by tensorstore, which wants answers that the emulator alone does not give.
    """
    emulator = os.environ["STORAGE_EMULATOR_HOST"]
    with faulty.proxy(emulator) as (url, _), servers.led_to(servers.gcs_environment(url)):
        kill_one_of_two(folder)
        finish(by_two(folder, STEPS, MESH, checkpoint_every=5))
        restored = Checkpoints(folder / "checkpoints").restore()
        found = losses(runs.read_metrics(folder / runs.METRICS))
    finish(by_two(tmp_path, STEPS, MESH, checkpoint_every=5))
    wanted = Checkpoints(tmp_path / "checkpoints").restore()
    assert restored.step == wanted.step == STEPS
    assert_same_bits(restored.state, wanted.state)
    assert found == losses(runs.read_metrics(tmp_path / runs.METRICS))


def kill_one_of_two(folder):
    """Start the two three times over, and kill one of them each time."""
    rng = random.Random(5)
    for killed in (1, 0, 1):
        before = files.sizes(folder / "checkpoints")
        running = by_two(folder, STEPS, MESH, checkpoint_every=5)
        while files.sizes(folder / "checkpoints") == before:
            assert all(each.poll() is None for each in running)
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        running[killed].send_signal(signal.SIGKILL)
        for each in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.communicate(timeout=150)
        assert all(each.returncode not in (None, 0) for each in running)
        assert_each_is_what_it_says(folder)


def assert_each_is_what_it_says(folder):
    with Checkpoints(folder / "checkpoints", report=lambda message: None) as checkpoints:
        for step in checkpoints.sound_steps():
            assert int(checkpoints.restore(step=step).state["step"]) == step
