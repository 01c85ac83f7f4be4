"""Training: the state and its update, compilation, checkpoints, the run directory, the loop."""

from jaxdiff.extras import needed_by

with needed_by("jaxdiff.training"):
    from jaxdiff.training import checkpoint, ema, parallel
    from jaxdiff.training.update import TrainState, Update, init, make_update

__all__ = ["TrainState", "Update", "checkpoint", "ema", "init", "make_update", "parallel"]
