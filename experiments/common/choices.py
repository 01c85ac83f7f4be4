"""Processes, weightings and predictions by their names on command lines."""

from collections.abc import Callable
from typing import Literal

from jaxdiff import processes, weightings
from jaxdiff.processes import Process

PROCESSES: dict[str, Callable[[], Process]] = {
    "cosine": processes.cosine,
    "vp": processes.vp,
    "sub_vp": processes.sub_vp,
    "flow": processes.flow,
    "ddpm": processes.ddpm,
    "edm": processes.edm,
    "ve": processes.ve,
}

WEIGHTINGS: dict[str, Callable[[], weightings.Weighting]] = {
    "simple": weightings.simple,
    "min_snr": weightings.min_snr,
    "edm": weightings.edm,
    "likelihood": weightings.likelihood,
}

ProcessName = Literal["cosine", "vp", "sub_vp", "flow", "ddpm", "edm", "ve"]

Kind = Literal["x0", "eps", "v", "score", "velocity"]
