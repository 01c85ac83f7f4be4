"""The likelihood of one trained run is the same on any number of devices, far beyond its error.

Each number of devices compiles a program of its own, which rounds otherwise; what the solver makes
of that must stay small at the default tolerance.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
NUM_IMAGES = 96


def python(*argv, devices=1):
    """Run a script or module as a user does, by XLA's own settings."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parent)}
    run = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_the_likelihood_does_not_depend_on_the_number_of_devices(tmp_path):
    train = ["-m", "experiments.digits", "train", "--run-dir", tmp_path, "--quiet"]
    python(*train, "--num-steps", 300, "--no-evaluate")
    found = {}
    for devices in (1, 3, 8):
        printed = python(HERE / "likelihood_run.py", tmp_path, NUM_IMAGES, devices=devices)
        result = json.loads(printed.splitlines()[-1])
        assert result["devices"] == devices
        found[devices] = np.asarray(result["bits"])
    for devices in (3, 8):
        gap = found[devices] - found[1]
        print(f"{devices} devices: mean {gap.mean():.1e}, worst {np.abs(gap).max():.1e} bits/dim")
        assert abs(gap.mean()) < 1e-3
        assert np.abs(gap).max() < 5e-3
