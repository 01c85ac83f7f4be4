"""The same run by jit, by pmap and over meshes: on eight forced devices, of one process or two."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
from servers import free_port

HERE = pathlib.Path(__file__).parent
SHARED_CACHE = "ignore:Error reading persistent compilation cache"
"""Another process may be writing there: then this one compiles for itself."""
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
SHARED = ("pmap", "mesh fsdp")
ALONE = ("jit in parts", "mesh", "mesh all fsdp", "handed on")
ALONE += ("pmap of a compiled loss in parts", "mesh of a compiled loss")
SCANNED = ("scanned jit", "scanned pmap", "scanned mesh")
CASES = [
    *(("float64", 1, mode) for mode in (*SHARED, *ALONE, *SCANNED)),
    *(("float64", 2, mode) for mode in SHARED),
]
CASES = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
# in float32 two processes are held to one by test_crashes.py
CASES += [("float32", 1, mode) for mode in (*SHARED, "mesh", "mesh all fsdp")]

each_dtype = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)]
)


def start(devices, *argv):
    """Start a script of this folder with so many forced devices."""
    flags = f"--xla_force_host_platform_device_count={devices} " + os.environ.get("XLA_FLAGS", "")
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-W", SHARED_CACHE, *map(str, argv)],
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parent)},
    )


def finish(running):
    """Wait for processes of one run; return what each printed."""
    outputs = [process.communicate(timeout=600) for process in running]
    for process, (_, err) in zip(running, outputs, strict=True):
        assert process.returncode == 0, err
    return [out for out, _ in outputs]


@functools.cache
def found(dtype, num_processes):
    script = HERE / "parallel_run.py"
    if num_processes == 1:
        running = [start(8, script, dtype)]
    else:
        port = free_port()
        running = [start(4, script, dtype, port, i) for i in range(num_processes)]
    results = [json.loads(out.splitlines()[-1]) for out in finish(running)]
    assert all(each["devices"] == 8 for each in results)
    assert all(each["distances"] == results[0]["distances"] for each in results)
    return results[0]


@pytest.mark.parametrize(("dtype", "num_processes", "mode"), CASES)
def test_every_mode_ends_with_the_parameters_of_one_device(dtype, num_processes, mode):
    results = found(dtype, num_processes)
    print(f"in the end {results['distances'][mode]:.1e}, moved {results['moved']:.2f}")
    assert results["distances"][mode] < TOLERANCE[dtype]
    assert results["ema"][mode] < TOLERANCE[dtype]
    assert results["moved"] > 0.02


@pytest.mark.parametrize(
    ("dtype", "num_processes"),
    [
        ("float32", 1),
        *(pytest.param("float64", count, marks=pytest.mark.slow) for count in (1, 2)),
    ],
)
def test_an_examples_noise_is_the_same_in_every_mode(dtype, num_processes):
    losses = found(dtype, num_processes)["first losses"]
    rel = {"float32": 1e-6, "float64": 1e-12}[dtype]
    for mode in losses:
        assert losses[mode] == pytest.approx(losses["jit"], rel=rel), mode


@each_dtype
def test_no_mode_adds_an_axis_to_the_state(dtype):
    assert all(found(dtype, 1)["shapes"])


def test_a_split_state_takes_its_share_of_a_devices_memory():
    held = found("float32", 1)["held"]
    assert held["mesh"] == 1.0
    assert held["mesh fsdp"] < 1.1 / 2
    assert held["mesh all fsdp"] < 1.1 / 8


@pytest.mark.parametrize("name", ["gan", "student", "autoencoder"])
def test_several_networks_end_alike_in_every_mode_and_when_resumed(name):
    results = found("float32", 1)["networks"][name]
    print(results)
    assert {"jit", "pmap", "mesh fsdp"} <= results["params"].keys()
    assert max(results["params"].values()) < TOLERANCE["float32"]
    assert max(results["rest"].values()) < TOLERANCE["float32"]
    assert results["moved"] > 0.02
    assert results["resumed"]
    assert results["held"] < 1.1 / 2  # what is frozen is split too


@each_dtype
def test_a_wrapped_loss_draws_the_noise_of_the_plain_one_on_eight_devices(dtype):
    for name, gap in found(dtype, 1)["wrapped"].items():
        assert gap < {"float32": 1e-6, "float64": 1e-12}[dtype], name


@each_dtype
def test_what_cannot_be_split_is_refused(dtype):
    refusals = found(dtype, 1)["refusals"]
    assert "8 devices" in refusals["rows"]
    assert "8 devices" in refusals["mesh rows"]
    assert "`accumulate` must divide" in refusals["parts"]
    assert "`axis_name` must be 'data'" in refusals["unnamed axis"]
    assert "`data` x `fsdp`" in refusals["devices"]
    assert "must have the axes" in refusals["axes"]
    assert "Auto axes" in refusals["explicit"]
