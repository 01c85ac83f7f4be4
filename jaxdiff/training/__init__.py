"""Training: the state and its update, compilation, checkpoints, the run directory, the loop."""

from jaxdiff.training import checkpoint, parallel
from jaxdiff.training.update import TrainState, init, make_update

__all__ = ["TrainState", "checkpoint", "init", "make_update", "parallel"]
