"""Several processes as one run: JAX's own runtime, started and asked."""

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
        ValueError: if only some of the three are given, or a number is out of its range.
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
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            shutdown_timeout_seconds=DAY,
        )
    except ValueError as error:  # JAX's words for a cluster that it does not find
        raise RuntimeError(
            "no cluster tells how many processes there are; say it by `coordinator_address`, "
            f"`num_processes` and `process_id` ({error})"
        ) from error


def is_main() -> bool:
    """Tell whether this is the process that writes and reports: process 0."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Tell whether a flag is up in any process; all processes must ask together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


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
