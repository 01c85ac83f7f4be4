"""Several processes as one run: JAX's own runtime, started and asked."""

import hashlib
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdiff.typing import PyTree

DAY = 24 * 3600
"""How long, in seconds, processes that are done wait for one that is not."""


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Start JAX's multi-process runtime; before anything else of JAX.

    Args:
        coordinator_address: HOST:PORT of process 0; None where the cluster tells (TPU pods, SLURM,
            Open MPI, Kubernetes).
        num_processes: how many there are; None likewise.
        process_id: which this is, from 0; None likewise.

    Raises:
        ValueError: if only some of the three are given, a number is out of its range, or SLURM
            gives a node more GPUs than its processes would use.
        RuntimeError: if no cluster is found, or the others are not reached.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"`{missing[0]}` must be given too, or none of {', '.join(given)}.")
    if num_processes is not None and process_id is not None:
        if num_processes < 1:
            raise ValueError(f"`num_processes` must be at least 1; got {num_processes}.")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"`process_id` must lie in 0..{num_processes - 1}; got {process_id}.")
    if coordinator_address is not None and not _is_address(coordinator_address):
        raise ValueError(f"`coordinator_address` must be HOST:PORT; got {coordinator_address!r}.")
    _check_all_gpus_are_used()
    # It would catch SIGTERM from here on and do nothing about it; the training loop does.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except ValueError as error:  # JAX's words for a cluster that it does not find
        raise RuntimeError(
            "no cluster tells how many processes there are; say it by `coordinator_address`, "
            "`num_processes` and `process_id`"
        ) from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"process {process_id} cannot join at {coordinator_address}: {reason}. Is the address "
            "that of process 0, its port free, and are the others started?"
        ) from error


def is_started() -> bool:
    """Tell whether this is one of several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Tell whether this is the process that writes and reports: process 0."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Tell whether a flag is up in any process; all processes must ask together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def wait_for_all() -> None:
    """Wait until every process comes here, a day at most: once, at the end of a program.

    JAX itself waits for five minutes at its end, and then aborts processes that are still at work.
    """
    if is_started():
        from jax._src.distributed import global_state  # there is no public way to wait longer

        client = global_state.client
        assert client is not None
        client.wait_at_barrier("jaxdiff_end", 1000 * DAY)


def agree(**values: str) -> None:
    """Check that all processes were started alike; all must ask together.

    Raises:
        ValueError: if one has other values, naming the first that differs.
    """
    if jax.process_count() == 1:
        return
    for name, value in values.items():
        digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
        found = np.asarray(multihost_utils.process_allgather(digest))
        if (found != found[0]).any():
            others = sorted(set(np.flatnonzero((found != found[0]).any(axis=1)).tolist()))
            raise ValueError(
                f"`{name}` of process 0 is not that of process {', '.join(map(str, others))}; "
                "start all with the same command, code and data."
            )


def rows_of(num_rows: int) -> np.ndarray:
    """Return which of so many rows are this process's share of some work."""
    return np.arange(jax.process_index(), num_rows, jax.process_count())


def join_rows(part: np.ndarray, num_rows: int) -> np.ndarray:
    """Return all rows, of which each process brings those of `rows_of`; all must ask together."""
    count = jax.process_count()
    if count == 1:
        return part
    longest = -(-num_rows // count)
    padded = np.zeros((longest, *part.shape[1:]), part.dtype)
    padded[: len(part)] = part
    found = np.asarray(multihost_utils.process_allgather(padded))
    return np.swapaxes(found, 0, 1).reshape(-1, *part.shape[1:])[:num_rows]


def gather(tree: PyTree) -> PyTree:
    """Return a tree as NumPy arrays that are whole in every process; all must ask together."""

    def of_leaf(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(of_leaf, tree)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdigit()


def _check_all_gpus_are_used() -> None:
    """Refuse a SLURM job of which JAX would leave GPUs idle.

    Under SLURM JAX gives each process the one device of its number on the node, unless
    JAX_LOCAL_DEVICE_IDS names others (jax/_src/clusters/cluster.py).
    """
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    tasks, _, rest = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")
    alike = tasks.isdigit() and "," not in rest  # as many on each node: "8" or "8(x4)"
    if os.environ.get("JAX_LOCAL_DEVICE_IDS") or not (gpus.isdigit() and alike):
        return
    if int(tasks) < int(gpus):
        devices = ",".join(map(str, range(int(gpus))))
        remedy = f", or set JAX_LOCAL_DEVICE_IDS={devices}" if tasks == "1" else ""
        raise ValueError(
            f"SLURM gives each node {gpus} GPUs and starts {tasks} process"
            f"{'es' * (tasks != '1')} on it, each of which would use one. Start one a GPU "
            f"(--ntasks-per-node={gpus}){remedy}."
        )
