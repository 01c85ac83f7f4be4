"""What many tests share: one process of every kind, and a mixture that none is easy for."""

import numpy as np

from jaxdiff import Mixture, processes

PROCESSES = {
    "vp": processes.vp(),
    "sub_vp": processes.sub_vp(),
    "ve": processes.ve(),
    "cosine": processes.cosine(),
    "cosine_shifted": processes.cosine(-2.0),
    "edm": processes.edm(),
    "flow": processes.flow(),
    "ddpm": processes.ddpm(),
    "zero_snr": processes.from_betas(np.append(np.linspace(1e-4, 0.04, 99), 1.0)),
}

NO_SIGNAL_AT_END = ("cosine", "cosine_shifted", "flow", "zero_snr")

MIXTURE = Mixture(
    np.array([0.3, 0.7]),
    np.array([[1.0, 1.0], [-1.0, 0.5]]),
    np.array([[[0.1, 0.0], [0.0, 0.1]], [[0.2, 0.05], [0.05, 0.1]]]),
)
