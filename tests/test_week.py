"""A run of many steps takes no more of the machine at its end than near its beginning."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_memory_threads_and_files_stay_flat_for_a_hundred_thousand_steps(tmp_path):
    """Two hundred checkpoints are saved meanwhile, of which three stay."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, HERE / "week_run.py", tmp_path / "run", "100000", "10000"]
    done = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(*said, sep="\n")
    first, last = said[0], said[-1]
    assert (first["step"], last["step"]) == (10_000, 100_000)
    for name in ("rss", "threads", "system_threads", "files"):
        assert last[name] <= 1.05 * first[name], name
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [99_000, 99_500, 100_000]
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size < 2 * 2**20
