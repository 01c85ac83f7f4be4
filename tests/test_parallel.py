"""The same run by jit, by pmap and over meshes, on eight forced devices."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
MODES = ("pmap", "mesh", "mesh fsdp", "mesh all fsdp", "handed on")


@functools.cache
def found(dtype):
    flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "parallel_run.py"), dtype],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parent)},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["devices"] == 8
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_mode_ends_with_the_parameters_of_one_device(dtype, mode):
    results = found(dtype)
    print(f"after 50 steps {results['distances'][mode]:.1e}, moved {results['moved']:.2f}")
    assert results["distances"][mode] < TOLERANCE[dtype]
    assert results["ema"][mode] < TOLERANCE[dtype]
    assert results["moved"] > 0.02


def test_an_examples_noise_is_the_same_in_every_mode():
    losses = found("float64")["first losses"]
    for mode in losses:
        assert losses[mode] == pytest.approx(losses["jit"], rel=1e-12), mode


def test_no_mode_adds_an_axis_to_the_state():
    assert all(found("float64")["shapes"])


def test_a_split_state_takes_its_share_of_a_devices_memory():
    held = found("float32")["held"]
    assert held["mesh"] == 1.0
    assert held["mesh fsdp"] < 1 / 2 + 0.1
    assert held["mesh all fsdp"] < 1 / 8 + 0.1 / 8 + 0.02


def test_what_cannot_be_split_is_refused():
    refusals = found("float64")["refusals"]
    assert "8 devices" in refusals["rows"]
    assert "8 devices" in refusals["mesh rows"]
    assert "`data` x `fsdp`" in refusals["devices"]
    assert "must have the axes" in refusals["axes"]
    assert "Auto axes" in refusals["explicit"]
