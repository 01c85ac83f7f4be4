"""The goldens written afresh, larger and of another seed, and the same tests held to them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peers import common

HERE = Path(__file__).parent
PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
SCRIPTS = sorted({path.stem for path in (HERE / "peers").glob("*.py")} - {"common"})

PYTEST = ("-q", "-p", "no:cacheprovider", "-m", "slow or not slow", "-k", "not full_size")
"""Every variant of a model, those that take long too."""

pytestmark = pytest.mark.slow


def script(name, *options):
    assert PYTHON.exists(), "make .venv-peers/made makes the environment of the scripts"
    command = [PYTHON, "-m", f"peers.{name}", *map(str, options)]
    subprocess.run(command, cwd=HERE, check=True, capture_output=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_models_equal_their_sources_with_other_seeds_and_sizes(name, tmp_path):
    script(name, "--out", tmp_path, "--seed", 1, "--larger")
    tests = HERE / f"test_pretrained_{name}.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *PYTEST, tests],
        env=os.environ | {"JAXDIFF_GOLDENS": str(tmp_path)},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_goldens_are_what_their_scripts_write(name, tmp_path):
    script(name, "--out", tmp_path)
    for path in tmp_path.iterdir():
        fresh, stored = common.read(path), common.read(common.FOLDER / path.name)
        assert fresh[:3] == stored[:3]
        assert fresh.arrays.keys() == stored.arrays.keys()
        for key, array in stored.arrays.items():
            narrow = array.dtype == np.float32  # whose sums depend on the number of threads
            rtol, atol = (1e-5, 1e-5 * np.abs(array).max(initial=0.0)) if narrow else (1e-8, 1e-10)
            np.testing.assert_allclose(fresh.arrays[key], array, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", SCRIPTS)
def test_lists_of_weights_are_what_their_scripts_write(name, tmp_path):
    script(name, "--out", tmp_path, "--keys")
    for path in tmp_path.iterdir():
        assert (common.KEYS / path.name).read_text() == path.read_text(), path.name
