"""Training: the state and its update, compilation, checkpoints, the run directory, the trainer."""

from jaxdiff.extras import needed_by

with needed_by("jaxdiff.training"):
    from jaxdiff.devices import distributed
    from jaxdiff.training import checkpoint, ema, networks, parallel
    from jaxdiff.training.loading import Run, load_run
    from jaxdiff.training.run import Record
    from jaxdiff.training.state import TrainState, init
    from jaxdiff.training.telling import Cadence
    from jaxdiff.training.trainer import Keep, Report, fit
    from jaxdiff.training.update import GradientUpdate, Update, make_update

__all__ = [
    "Cadence",
    "GradientUpdate",
    "Keep",
    "Record",
    "Report",
    "Run",
    "TrainState",
    "Update",
    "checkpoint",
    "distributed",
    "ema",
    "fit",
    "init",
    "load_run",
    "make_update",
    "networks",
    "parallel",
]
