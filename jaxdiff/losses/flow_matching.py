r"""Flow matching: regress the velocity of straight paths from data to noise.

    loss = E ||velocity_hat(x_t, t) - (alpha' x0 + sigma' eps)||^2 / D

With x0 and eps independent this is denoising with another weight (Lipman et al. 2023,
arXiv:2210.02747, theorem 2 and eq. 14). Coupling them by optimal transport within each batch makes
the paths of a batch not cross, so that the flow is straighter (Pooladian et al. 2023,
arXiv:2304.14772, algorithm 1; Tong et al. 2024, arXiv:2302.00482, section 3.2.2). The marginals
at both ends stay the same, but x_t is then no longer Gaussian about alpha x0: the
velocity field transports noise to data, and scores, denoisers and ELBOs made of it do not hold.
"""

from typing import Literal

import jax
import numpy as np

from jaxdiff import checks, processes, timesteps, weightings
from jaxdiff.denoisers import Model, as_model
from jaxdiff.losses import noised
from jaxdiff.losses.denoising import regression
from jaxdiff.processes import Process
from jaxdiff.typing import Apply, Array, LossFn, PyTree


def flow_matching(
    apply: Apply | Model,
    process: Process | None = None,
    *,
    prediction: str | None = None,
    coupling: Literal["independent", "optimal_transport"] = "independent",
    weighting: weightings.Weighting | None = None,
    times: timesteps.Draw | None = None,
    drop_cond: float = 0.0,
    null_cond: PyTree = None,
) -> LossFn:
    """Make a flow-matching loss: the squared error of the velocity.

    Args:
        apply: a `Model`; or the network, ``apply(params, x_t, t (B,), cond, key=key)`` ->
            (B, ...), with its process and prediction.
        process: by default `processes.flow()`: x_t = (1 - t) x0 + t eps; that of a Model.
        prediction: what the network predicts, one of `predictions.KINDS`, by default velocity;
            that of a Model. The error is that of the velocity in any case.
        coupling: of x0 and eps. "optimal_transport" pairs the rows of a batch so that the sum of
            squared distances is smallest, exactly, on the host. A row's noise then
            depends on the whole batch, on the shard of it under pmap, and conditioning goes
            with its x0.
        weighting: by default 1 on the error of the velocity.
        times: by default `timesteps.draw_stratified()`.
        drop_cond: as in `losses.denoising`.
        null_cond: as in `losses.denoising`.

    Returns:
        ``loss_fn(params, key, batch)`` as `losses.denoising` makes it.

    Raises:
        ValueError: if `coupling` or a kind is unknown, or as `losses.denoising`.
        TypeError: when called, if ``batch["x0"]`` holds integers.
    """
    checks.choice("coupling", coupling, ("independent", "optimal_transport"))
    if process is None and not isinstance(apply, Model):
        process = processes.flow()
    model = as_model(apply, process, prediction, "velocity")
    couple = optimal_transport if coupling == "optimal_transport" else None
    dropping = noised.Dropping(drop_cond, null_cond)
    weight = noised.weight(model.prediction, model.prediction, "velocity", weighting)
    return regression(model, weight, times, dropping, couple)


def optimal_transport(x0: Array, eps: Array) -> Array:
    """Reorder the rows of eps to the smallest sum of squared distances to those of x0.

    Args:
        x0: (B, ...).
        eps: the same shape.

    Returns:
        eps with its rows permuted, by the linear assignment of SciPy.
    """

    def assign(x0: np.ndarray, eps: np.ndarray) -> np.ndarray:
        from scipy.optimize import linear_sum_assignment

        rows, others = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (x0, eps))
        # a row that is not finite goes with any: its loss says so, and the update may skip it
        likeness = np.nan_to_num(rows, posinf=0.0, neginf=0.0) @ others.T
        return linear_sum_assignment(-likeness)[1].astype(np.int32)

    shape = jax.ShapeDtypeStruct(x0.shape[:1], np.int32)
    order = jax.pure_callback(assign, shape, x0, eps, vmap_method="sequential")
    return eps[order]
