"""Training: the state and its update, compilation, checkpoints, the run directory, the loop."""

from jaxdiff.extras import needed_by

with needed_by("jaxdiff.training"):
    from jaxdiff.training import checkpoint, ema, networks, parallel
    from jaxdiff.training.state import TrainState, init
    from jaxdiff.training.update import GradientUpdate, Update, make_update

__all__ = [
    "GradientUpdate",
    "TrainState",
    "Update",
    "checkpoint",
    "ema",
    "init",
    "make_update",
    "networks",
    "parallel",
]
