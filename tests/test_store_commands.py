"""Every command, as a user starts it, with its folders in a bucket: whole, and the same again."""

import os
import pathlib
import subprocess
import sys

import pytest
import servers

from jaxdiff import files

ROOT = pathlib.Path(__file__).parent.parent
RUN = "SCHEME://bucket/a b/run"
COMMANDS = {
    "digits": [
        ("digits", "train", "--preset", "smoke", "--tensorboard", "--profile-steps", "1"),
        ("digits", "sample", "--num", "8", "--num-steps", "4", "--out", f"{RUN}/samples"),
        ("digits", "sample", "--num", "8", "--num-steps", "4", "--out", f"{RUN}/drawn.png"),
        ("digits", "evaluate", "--eval-examples", "8", "--sample-steps", "4"),
        ("digits", "export", "--out", f"{RUN}/params.npz"),
    ],
    "latents": [
        ("latents", "train", "--preset", "smoke"),
        ("latents", "sample", "--prompt", "a red star", "--num", "2", "--out", f"{RUN}/star.png"),
    ],
    "theory": [("theory", "--preset", "smoke")],
    "toy2d": [("toy2d", "--preset", "smoke")],
    "families": [("families", "--preset", "smoke")],
    "solvers": [("solvers", "mixture", "--preset", "smoke")],
    "ablate": [
        ("ablate", "losses", "--preset", "smoke", "--shard", "1/2"),
        ("ablate", "losses", "--preset", "smoke"),
    ],
}


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files.names(folder)}


def called(scheme, command, environment, tmp_path):
    name, *options = (word.replace("SCHEME", scheme) for word in (*command, "--run-dir", RUN))
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment | {"JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "name"),
    [*(("gs", name) for name in COMMANDS), ("s3", "digits"), ("s3", "theory"), ("s3", "ablate")],
)
def test_a_command_ends_in_a_bucket_and_a_second_call_changes_nothing(scheme, name, tmp_path):
    (tmp_path / "scratch").mkdir()
    serve = {"gs": servers.gcs, "s3": servers.s3}[scheme]
    with serve(tmp_path / "log") as environment, servers.led_to(environment):
        folder = files.to_path(RUN.replace("SCHEME", scheme))
        for command in COMMANDS[name]:
            called(scheme, command, environment, tmp_path / "scratch")
        first = contents(folder)
        for command in COMMANDS[name]:
            if "evaluate" not in command:  # it judges anew, and times it
                called(scheme, command, environment, tmp_path / "scratch")
        again = contents(folder)
        assert sorted(again) == sorted(first)
        assert [each for each in first if again[each] != first[each]] == []
    assert not (ROOT / f"{scheme}:").exists()
    assert list((tmp_path / "scratch").iterdir()) == []  # nothing is left on the way
    print(len(first), sorted(first))
