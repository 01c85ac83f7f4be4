"""Every experiment's smoke preset, as a user starts it."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SMALL = (
    *("--width", "16", "--depth", "1", "--batch-size", "16", "--num-steps", "10"),
    *("--eval-examples", "4", "--eval-tolerance", "0.3", "--mixture-components", "2"),
    *("--sample-steps", "8"),
)
COMMANDS = [
    ("digits", "train", "--preset", "smoke", "--run-dir", "{tmp}/run"),
    ("digits", "train", "--preset", "smoke", "--run-dir", "{tmp}/unet", "--network", "unet"),
    ("digits", "train", "--preset", "edm", "--run-dir", "{tmp}/run", *SMALL),
    ("latents", "train", "--preset", "smoke", "--run-dir", "{tmp}/run"),
    ("theory", "--preset", "smoke", "--run-dir", "{tmp}/run"),
    ("toy2d", "--preset", "smoke", "--run-dir", "{tmp}/run"),
    ("families", "--preset", "smoke", "--run-dir", "{tmp}/run"),
    ("solvers", "mixture", "--preset", "smoke", "--run-dir", "{tmp}/run"),
    ("bench", "train_step", "--preset", "smoke", "--rounds", "1"),
    ("bench", "checkpoints", "--preset", "smoke", "--rounds", "1", "--steps", "5"),
    ("bench", "input", "--preset", "smoke", "--rounds", "1"),
    ("bench", "scaling", "--force-devices", "2", "--rounds", "1", "--fsdp"),
    ("bench", "collectives", "--force-devices", "4", "--fsdp", "2", "--slices", "2"),
    ("bench", "samplers", "--rounds", "1", "--width", "32"),
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command[:2]))
def test_a_smoke_runs_without_a_warning(command, tmp_path):
    name, *options = (word.format(tmp=tmp_path) for word in command)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"experiments.{name}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout or (tmp_path / "run").exists() or (tmp_path / "unet").exists()
