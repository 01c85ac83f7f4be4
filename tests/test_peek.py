"""A second start is refused before it has cost anything."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.common import peek
from jaxdiff.training import folders, lock

ROOT = Path(__file__).parent.parent


def start(*words):
    command = [sys.executable, "-X", "importtime", "-m", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("option", [("--run-dir", "{}"), ("--run-dir={}",)])
def test_a_second_start_is_refused_in_the_words_of_the_lock_without_an_import(tmp_path, option):
    words = ["experiments.digits", "train", *(word.format(tmp_path) for word in option)]
    with lock.writing(tmp_path):
        began = time.monotonic()
        done = start(*words)
        assert time.monotonic() - began < 5
        assert done.returncode == 1
        holder = peek.holder_of(tmp_path)
    assert done.stderr.splitlines()[-1] == (
        f"error: --run-dir {tmp_path} is being written by {holder}. "
        "Wait until it ends, stop it, or take another --run-dir."
    )
    assert "jax" not in done.stderr.replace(str(tmp_path), "")


def test_the_look_and_the_lock_say_the_same(tmp_path, capfd):
    program = (
        "import sys; from jaxdiff.training import lock\n"
        "with lock.writing(sys.argv[1]): print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.readline()
        with pytest.raises(folders.RunError) as refused, lock.writing(tmp_path):
            pass
        line = ["python", "-m", "experiments.toy2d", "--run-dir", str(tmp_path)]
        with pytest.raises(SystemExit) as ended:
            peek.refuse_if_written(line)
        process.stdin.close()
    assert ended.value.code == f"error: {refused.value}"
    assert peek.holder_of(tmp_path) is None
    peek.refuse_if_written(line)


@pytest.mark.parametrize(
    "line",
    [
        ["-m", "experiments.digits", "sample", "--run-dir", "{}"],
        ["-m", "pytest", "--run-dir", "{}"],
        ["-m"],
        ["-c", "pass"],
        ["-m", "experiments.digits", "train", "--run-dir"],
        ["-m", "experiments.digits", "train", "--distributed", "--run-dir", "{}"],
    ],
)
def test_those_who_read_and_other_programs_are_let_through(tmp_path, line):
    with lock.writing(tmp_path):
        peek.refuse_if_written(["python", *(word.format(tmp_path) for word in line)])
