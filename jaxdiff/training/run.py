"""The run directory: which run it is, whether it may go on, and what it writes down.

A run is its config. Fields that do not change the mathematics (where data lies, how often to
save) may differ from one start to the next and stand outside the hash; so does the number of
steps, which may grow. Any other difference is refused before a file is touched.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxdiff import files
from jaxdiff.training.folders import RunError as RunError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"

PACKAGES = ("jaxdiff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "diffrax", "numpy")


def config_hash(config: Mapping[str, Any], *, free: Collection[str] = ()) -> str:
    """Return 16 hexadecimal digits that name the mathematics of a config.

    Args:
        config: what JSON can hold.
        free: fields that do not count.
    """
    counted = {name: value for name, value in config.items() if name not in free}
    text = json.dumps(counted, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Return package versions, the devices and the git commit of the working directory."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "versions": versions,
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """Return what `config.json` says, or None where there is none.

    Raises:
        RunError: if it cannot be read.
    """
    path = run_dir / CONFIG
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}). Take another --run-dir.") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise RunError(f"{path} is not the config of a run. Take another --run-dir.")
    return record


def reconcile(
    run_dir: Path,
    config: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    grows: str | None = None,
) -> dict[str, Any]:
    """Return the config to run with: the asked one, where the directory's own run allows it.

    Touches no file. A field that is None takes the recorded value.

    Args:
        run_dir: may not exist yet.
        config: what is asked for.
        free: fields that may differ.
        grows: the field, if any, that may be larger than it was.

    Raises:
        RunError: if the directory belongs to another config, names the differing fields.
    """
    record = read_record(run_dir)
    if record is None:
        if (run_dir / CHECKPOINTS).exists():
            raise RunError(
                f"{run_dir} holds checkpoints but no {CONFIG} to tell what they are of. "
                "Take another --run-dir."
            )
        return dict(config)
    old = record["config"]
    asked = {k: old.get(k) if v is None else v for k, v in config.items()}
    differing = [
        name
        for name in sorted(asked.keys() | old.keys())
        if name not in free and asked.get(name) != old.get(name) and name != grows
    ]
    if grows is not None and asked[grows] < old.get(grows, asked[grows]):
        differing.append(grows)
    if differing:
        fields = "\n".join(
            f"  --{name.replace('_', '-')}: there {old.get(name)}, asked {asked.get(name)}"
            for name in differing
        )
        raise RunError(
            f"{run_dir} holds a run of another config:\n{fields}\n"
            "Ask for the same to resume it, or take another --run-dir."
        )
    return asked


def write_record(
    run_dir: Path,
    config: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    also: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json`: the config, its hash and the environment, unless it is there already.

    Args:
        run_dir: made if missing.
        config: what JSON can hold.
        free: fields that do not count in the hash.
        also: what else the record says of the first start.

    Raises:
        RunError: if the directory cannot be written.
    """
    old = read_record(run_dir)
    if old is not None and old["config"] == dict(config):
        return
    record = {"config": dict(config), "hash": config_hash(config, free=free)}
    record |= (
        {**(also or {}), **environment()}
        if old is None
        else {k: old[k] for k in old if k not in record}
    )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        files.write_text(run_dir / CONFIG, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"--run-dir {run_dir} cannot be written: {error.strerror}.") from error


replace_text = files.write_text


class MetricsLog:
    """`metrics.jsonl`: one object a logged step, flushed as written; TensorBoard beside it."""

    def __init__(self, path: Path, *, after: int, tensorboard: Path | None = None) -> None:
        """Open the log for appending, forgetting what lies beyond step `after`.

        A run that was killed has logged steps that its newest checkpoint does not hold; they come
        again.

        Args:
            path: of the JSON lines.
            after: the last step to keep.
            tensorboard: a folder for TensorBoard's event files, if they are wanted.
        """
        kept = [line for line in read_metrics(path) if line["step"] <= after]
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._board: Any = None
        if tensorboard is not None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(tensorboard), purge_step=after + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one object.

        Raises:
            RunError: if the disk does not take it.
        """
        try:
            self._file.write(json.dumps(dict(values)) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"{self._file.name} cannot be written: {error.strerror}. Saved checkpoints are as "
                "they were."
            ) from error
        if self._board is not None:
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Close the files."""
        with contextlib.suppress(OSError):  # what was left unwritten was said
            self._file.close()
        if self._board is not None:
            self._board.close()


class NoLog:
    """The log of a process that is not to write one."""

    def write(self, values: Mapping[str, Any]) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Close nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics file, none where there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the line that a kill cut short
            line = json.loads(text)
            lines += [line] if isinstance(line, dict) and "step" in line else []
    return lines
