"""Reading back what a run has trained, without its data and without its network."""

import os
from typing import Any, NamedTuple

import jax

from jaxdiff.training import folders
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import CheckpointError
from jaxdiff.training.trainer import open_checkpoints
from jaxdiff.typing import PyTree

MAIN = "main"
"""The average of several that is meant where none is named."""


class Run(NamedTuple):
    """What a run has trained.

    Attributes:
        config: of the checkpoint, as JSON holds it; empty where the run has no record.
        step: updates done.
        params: an average of the parameters, or those of the last step: NumPy arrays in nested
            dictionaries.
        record: what `config.json` says, None where there is none.
    """

    config: dict[str, Any]
    step: int
    params: PyTree
    record: dict[str, Any] | None


def load_run(
    directory: str | os.PathLike[str],
    average: str | None = None,
    *,
    raw: bool = False,
    step: int | None = None,
) -> Run:
    """Read what a run has trained; a run at work may be read too.

    Args:
        directory: that `training.fit` was given, or a command as `--run-dir`.
        average: which, by name, of several that were kept; by default the only one, or that named
            "main".
        raw: the parameters of the last step in place of an average.
        step: of the checkpoint; by default the newest sound one.

    Raises:
        RunError: if there is no such folder, or its record cannot be read.
        CheckpointError: if it holds no checkpoint, no sound one or none of `step`.
        ValueError: if there is no such average, or there are several and none was named.
    """
    folder = folders.existing_run(directory, "`directory`")
    record = runs.read_record(folder)
    with open_checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(step=step)
    if restored is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet. Train it first.")
    params = restored.state["params"]
    if not raw:
        params = average_of(params, restored.state["ema"], average)
    elif average is not None:
        raise ValueError(f"`average` and `raw` choose parameters each: give one; got {average!r}.")
    return Run(restored.config, restored.step, params, record)


def average_of(params: PyTree, ema: PyTree, name: str | None = None) -> PyTree:
    """Return one average of those that a state holds.

    Args:
        params: the state's, of one network or by part.
        ema: the state's: one average, several by name, or either by part.
        name: of one of several; None the only one, or "main".

    Raises:
        ValueError: if there is no such average, or there are several and none was named.
    """
    wanted: Any = jax.tree.structure(params)
    if jax.tree.structure(ema) == wanted:
        if name is not None:
            raise ValueError(f"`average` must be None: this run keeps one; got {name!r}.")
        return ema
    if all(jax.tree.structure(each) == wanted for each in ema.values()):
        chosen = MAIN if name is None else name
        if chosen not in ema:
            raise ValueError(
                f"`average` must be one of {', '.join(map(repr, ema))}, which this run keeps; "
                f"got {name!r}."
            )
        return ema[chosen]
    return {part: average_of(params[part], ema[part], name) for part in params}
