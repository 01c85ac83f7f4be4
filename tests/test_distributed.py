"""How JAX's runtime is started: what a cluster must give."""

import pathlib
import re
import subprocess
import sys

import jax
import pytest

from experiments.common import optimization
from experiments.images import model
from jaxdiff.training import distributed
from jaxdiff.training import run as runs

ROOT = pathlib.Path(__file__).parent.parent
POD = (ROOT / "docs" / "pods.md").read_text()
RECIPES = re.findall(r"--ntasks-per-node=(\d+) --gres=gpu:(\d+)([^`]*)", POD)


@pytest.fixture
def started(monkeypatch):
    """Return the list of what JAX is started with, in place of starting it."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    preemption = jax.config.jax_enable_preemption_service
    yield calls
    jax.config.update("jax_enable_preemption_service", preemption)


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ("1", "1 process on it.*--ntasks-per-node=8.*JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7"),
        ("1(x4)", "1 process on it"),
        ("4(x4)", r"4 processes on it, .*--ntasks-per-node=8\)\.$"),
    ],
)
def test_a_slurm_job_that_would_leave_gpus_idle_is_refused(tasks, told, started, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    with pytest.raises(ValueError, match=told):
        distributed.start()
    assert not started


@pytest.mark.parametrize(("tasks", "gpus", "rest"), RECIPES)
def test_the_recipes_of_pods_md_use_every_gpu(tasks, gpus, rest, started, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", gpus)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", f"{tasks}(x4)")
    for name, value in re.findall(r"^export (\w+)=(\S+)", rest, re.MULTILINE):
        monkeypatch.setenv(name, value)
    distributed.start()
    assert started == [(None, None, None)]


def test_pods_md_has_a_recipe_for_one_process_a_gpu_and_for_one_a_node():
    assert [recipe[:2] for recipe in RECIPES] == [("8", "8"), ("1", "8")]


JOINING = """
import jax._src.xla_bridge as backends  # no public name tells
from experiments import digits
from jaxdiff.training import distributed

def start(*of_processes):
    assert not backends.backends_are_initialized(), of_processes
    raise ValueError("joining")

distributed.start = start
for command in {commands}:
    assert digits.main([*command, "--distributed"]) == 1
"""


def test_a_command_joins_the_others_before_anything_else_of_jax(tmp_path):
    """JAX refuses otherwise; on a run that is there too, whose record is read before."""
    begun = model.to_record(model.PRESETS["smoke"])
    runs.reconcile(tmp_path / "run", begun, free=optimization.FREE, grows="num_steps")
    run, out = ("--run-dir", str(tmp_path / "run")), ("--out", str(tmp_path / "out"))
    shared = ("--parallel", "mesh")
    new = ("--run-dir", str(tmp_path / "new"))
    commands = [("train", *new, *shared), ("train", *run, *shared)]
    commands += [("sample", *run, *out, *shared), ("evaluate", *run, *shared)]
    script = [sys.executable, "-c", JOINING.format(commands=commands)]
    process = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("joining") == len(commands)
