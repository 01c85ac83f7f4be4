r"""The scalable interpolant transformer of Ma et al. 2024 (arXiv:2401.08740).

The network is that of :mod:`jaxdiff.pretrained.dit` under the names of its repository; its time is
that of the interpolant, which runs from noise at 0 to data at 1:

    x = u data + (1 - u) noise,   v(x, u) = data - noise    on average.

Here t = 1 - u runs from data to noise, and the velocity d x / d t is noise - data: -v(x, 1 - t).
"""

from jaxdiff import processes
from jaxdiff.denoisers import Model
from jaxdiff.pretrained.dit import ORIGINAL, config_of, make
from jaxdiff.pretrained.naming import Table
from jaxdiff.typing import Apply, Array, Key, PyTree

__all__ = ["TABLE", "config_of", "make", "model"]

TABLE: Table = ORIGINAL


def model(apply: Apply) -> Model:
    """Return the model that the published weights are of, of the network's pure function.

    Args:
        apply: as :func:`jaxdiff.nn.functional` makes it of :func:`make`.

    Source: Ma et al. 2024 (arXiv:2401.08740), section 3: linear interpolant, velocity predicted.
    """

    def velocity(
        params: PyTree, x_t: Array, t: Array, cond: PyTree = None, *, key: Key | None = None
    ) -> Array:
        return -apply(params, x_t, 1.0 - t, cond, key=key)

    velocity.time = "t"  # type: ignore[attr-defined]
    return Model(velocity, processes.flow(), "velocity")
