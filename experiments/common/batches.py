"""The batches of a run, which its config and their number alone decide."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from experiments.common import options
from experiments.common.optimization import TrainingConfig
from jaxdiff import data
from jaxdiff.data import Records
from jaxdiff.typing import Batch


def batches_of(records: Records, config: TrainingConfig) -> Callable[[int], Iterator[Batch]]:
    """Return what `training.fit` draws batches from: a step -> this process's from that step on.

    What the library refuses of the config's values is refused by the option's name.

    Args:
        records: what is trained on.
        config: a dataclass, of the run.
    """

    def batches_from(step: int) -> Iterator[Batch]:
        with options.naming(type(config)):
            return data.batches(
                records,
                config.batch_size,
                seed=config.seed,
                start_step=step,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )

    return batches_from


def repeating(records: Records, config: TrainingConfig) -> Callable[[int], dict[str, Any]]:
    """Return what says of a step which examples repeat it; see `training.Report`.

    Args:
        records: likewise.
        config: likewise.
    """

    def repeat(step: int) -> dict[str, Any]:
        indices = data.batch_indices(len(records), config.batch_size, config.seed, step)
        return {"seed": config.seed, "indices": indices.tolist()}

    return repeat
