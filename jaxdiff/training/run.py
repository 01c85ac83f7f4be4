"""The run directory: which run it is, whether it may go on, and what it writes down.

A run is its config. Fields that do not change the mathematics (where data lies, how often to
save) may differ from one start to the next and stand outside the hash; so does the number of
steps, which may grow. Any other difference is refused before a file is touched.
"""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxdiff import files
from jaxdiff.training.folders import CHECKPOINTS as CHECKPOINTS
from jaxdiff.training.folders import RunError as RunError
from jaxdiff.training.metrics_log import METRICS as METRICS
from jaxdiff.training.metrics_log import MetricsLog as MetricsLog
from jaxdiff.training.metrics_log import NoLog as NoLog
from jaxdiff.training.metrics_log import read_metrics as read_metrics
from jaxdiff.training.metrics_parts import MetricsParts as MetricsParts

CONFIG = "config.json"

_SETTINGS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_enable_x64",
    "jax_default_matmul_precision",
)
_KINDS = {str: "text", list: "a list", dict: "an object"}
_FREE_BEFORE: tuple[tuple[str, ...], ...] = (
    ("num_steps", "data_dir", "checkpoint_every", "log_every", "remat"),
    (),
)
"""The fields that did not count in records that do not name them."""

PACKAGES = ("jaxdiff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "diffrax", "numpy")


class Record(NamedTuple):
    """What a run is, as its folder says it.

    Attributes:
        config: what JSON can hold.
        free: fields of it that may differ from one start to the next.
        defaults: values of fields that a config did not always have.
        also: what else the folder says of the first start.
    """

    config: Mapping[str, Any]
    free: Collection[str] = ()
    defaults: Mapping[str, Any] = {}
    also: Mapping[str, Any] = {}


def as_record(record: Record | Mapping[str, Any] | None) -> Record | None:
    """Return the record of a config, which may be given alone, as JSON holds it.

    Raises:
        TypeError: if JSON cannot hold the config.
    """
    if record is None:
        return None
    record = record if isinstance(record, Record) else Record(record)
    return record._replace(config=json.loads(json.dumps(dict(record.config))))


def recorded(run_dir: files.Path) -> Record | None:
    """Return what a folder says of its run, or None where it says nothing.

    Raises:
        RunError: as :func:`read_record`.
    """
    record = read_record(run_dir)
    return None if record is None else Record(record["config"], free_of(record))


def free_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that do not count in the hash of what :func:`read_record` gave."""
    return next(free for free in _allowed(record) if record["hash"] == _hash_of(record, free))


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


def random_numbers() -> dict[str, Any]:
    """Return the settings of JAX that decide what numbers a seed and a program give, by name.

    Another generator draws other noise; 64 bits or another precision of products round otherwise.
    """
    return {name: getattr(jax.config, name) for name in _SETTINGS}


def check_random(run_dir: files.Path) -> None:
    """Refuse to go on with a run whose random numbers were others.

    Raises:
        RunError: naming each setting that differs.
    """
    there = (read_record(run_dir) or {}).get("random_numbers", {})
    here = random_numbers()
    differing = "\n".join(
        f"  {name.upper()}: there {there[name]}, here {here[name]}"
        for name in _SETTINGS
        if name in there and there[name] != here[name]
    )
    if differing:
        raise RunError(
            f"{run_dir} holds a run of other random numbers:\n{differing}\n"
            "Set the environment as it was to resume it, or take another --run-dir."
        )


def read_record(run_dir: files.Path) -> dict[str, Any] | None:
    """Return what `config.json` says, or None where there is none.

    Raises:
        RunError: if it cannot be read, is no record of a run, or its config is not that of its
            hash.
    """
    path = run_dir / CONFIG
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}). Take another --run-dir.") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise RunError(f"{path} is not the config of a run. Take another --run-dir.")
    for name, kind in (("hash", str), ("free", list), ("versions", dict), ("random_numbers", dict)):
        if not isinstance(record.get(name, kind()), kind):
            raise RunError(
                f"{path} is not the config of a run: `{name}` must be {_KINDS[kind]}; "
                f"got {record[name]!r}. Bring back what was written there."
            )
    hashes = [_hash_of(record, free) for free in _allowed(record)]
    if record.get("hash") not in hashes:
        raise RunError(
            f"{path} was changed: its hash is {record.get('hash')}, that of its config {hashes[0]}."
            " Bring back what was written there, or take another --run-dir."
        )
    return record


def _allowed(record: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    """Return what may be the fields of a record that do not count."""
    return [tuple(map(str, record["free"]))] if "free" in record else _FREE_BEFORE


def _hash_of(record: Mapping[str, Any], free: Collection[str]) -> str:
    return config_hash(record["config"], free=free)


def reconcile(
    run_dir: files.Path,
    config: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    grows: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the config to run with: the asked one, where the directory's own run allows it.

    Touches no file. A field that is None takes the recorded value.

    Args:
        run_dir: may not exist yet.
        config: what is asked for.
        free: fields that may differ.
        grows: the field, if any, that may be larger than it was.
        defaults: values of fields that a config did not always have: what a record, or what is
            asked for, lacks is at its default.

    Raises:
        RunError: if the directory belongs to another config, names the differing fields.
    """
    check_random(run_dir)
    record = read_record(run_dir)
    if record is None:
        if (run_dir / CHECKPOINTS).exists():
            raise RunError(
                f"{run_dir} holds checkpoints but no {CONFIG} to tell what they are of. "
                "Take another --run-dir."
            )
        return dict(config)
    old = {**(defaults or {}), **record["config"]}
    wanted: dict[str, Any] = {**(defaults or {}), **config}
    asked: dict[str, Any] = {k: old.get(k) if v is None else v for k, v in wanted.items()}
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
    run_dir: files.Path,
    config: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    also: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json`: the config, its hash and the environment, unless it is there already.

    The hash can be checked by whoever reads it: the fields that do not count are written as `free`.

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
    record = {"config": dict(config), "hash": config_hash(config, free=free), "free": sorted(free)}
    record |= (
        {**(also or {}), "random_numbers": random_numbers(), **environment()}
        if old is None
        else {k: old[k] for k in old if k not in record}
    )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        files.write_text(run_dir / CONFIG, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise RunError(
            f"--run-dir {run_dir} cannot be written: {error.strerror}. Take another."
        ) from error
