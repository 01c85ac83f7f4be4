"""Measure what the library costs beside the bare computation, paired in one run.

    python -m experiments.bench train_step
    python -m experiments.bench checkpoints
    python -m experiments.bench input
    python -m experiments.bench input --data-set jpegs
    python -m experiments.bench scaling
    python -m experiments.bench collectives
    python -m experiments.bench samplers
    python -m experiments.bench seeds

The sides take turns, so that a machine whose speed drifts slows all; the last line is the median
of the pairwise ratios, ours over bare; of `collectives`, what is counted over what is expected.
"""

import sys
from collections.abc import Callable

from experiments.benches.collectives import collectives
from experiments.benches.inputs import input_pipeline
from experiments.benches.samplers import samplers
from experiments.benches.scaling import scaling
from experiments.benches.seeds import seeds
from experiments.benches.training import checkpoints, train_step
from experiments.common import command

COMMANDS: dict[str, Callable[..., None]] = {
    "train_step": train_step,
    "checkpoints": checkpoints,
    "input": input_pipeline,
    "scaling": scaling,
    "collectives": collectives,
    "samplers": samplers,
    "seeds": seeds,
}


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("bench", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
