r"""Denoising: regress what noise did to the data.

    loss = E_{t, eps} [ w(t) ||kind_hat(x_t, t) - kind||^2 / D ],    x_t = alpha x0 + sigma eps,

which has the gradient of score matching against the unknown score of q(x_t) (Vincent 2011,
Neural Computation 23(7), section 4; Song et al. 2021, arXiv:2011.13456, eq. 7).

An error in one kind of prediction is a known multiple of the error in any other (see
`predictions.error_ratio`), so the error is taken in what the network predicts, where nothing is
divided by a small number, and `loss_on` and the weighting become one factor of it.
"""

from jaxdiff import checks, predictions, timesteps, weightings
from jaxdiff.denoisers import Model, as_model
from jaxdiff.losses import noised
from jaxdiff.processes import Process
from jaxdiff.typing import Apply, Array, Batch, Key, LossFn, PyTree


def denoising(
    apply: Apply | Model,
    process: Process | None = None,
    *,
    prediction: str | None = None,
    loss_on: str | None = None,
    weighting: weightings.Weighting | None = None,
    times: timesteps.Draw | None = None,
    drop_cond: float = 0.0,
    null_cond: PyTree = None,
) -> LossFn:
    """Make a denoising loss.

    Args:
        apply: a `Model`; or the network, ``apply(params, x_t, t (B,), cond, key=key)`` ->
            (B, ...), with its process and prediction.
        process: the forward process; that of a Model.
        prediction: what the network predicts, one of `predictions.KINDS`, by default eps; that
            of a Model.
        loss_on: the kind whose squared error is averaged; by default `prediction`. It matters to
            a weighting that does not name a kind itself, as `weightings.simple`.
        weighting: by default `weightings.simple()`.
        times: training times, by default `timesteps.draw_stratified()`.
        drop_cond: the probability with which an example's conditioning is replaced by
            `null_cond`, for classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598,
            algorithm 1).
        null_cond: one example's worth of "no conditioning", a pytree like `cond` without its
            batch axis.

    Returns:
        ``loss_fn(params, key, batch)`` -> (loss (B,), {"loss": (B,), "squared_error": (B,)}),
        both means over the dimensions of an example; the second is the unweighted error of what
        the network predicts.

    Raises:
        ValueError: if `process` or `prediction` is given beside a Model, a kind is unknown,
            `drop_cond` is not in [0, 1] or lacks `null_cond`, or, when called, if the network
            changes the shape of its input.
        TypeError: if there is a network without a process, or, when called, if ``batch["x0"]``
            holds integers.
    """
    model = as_model(apply, process, prediction, "eps")
    dropping = noised.Dropping(drop_cond, null_cond)
    weight = noised.weight(model.prediction, model.prediction, loss_on, weighting)
    return regression(model, weight, times, dropping)


def regression(
    model: Model,
    weight: noised.Weight,
    times: timesteps.Draw | None,
    dropping: noised.Dropping,
    couple: noised.Couple | None = None,
) -> LossFn:
    """Make the loss that :func:`denoising` and flow matching are, with any coupling."""
    apply, process, prediction = model
    noised.judge_apply(apply)
    checks.process(process)
    times = noised.judged_times(times)
    dropping.check()

    def loss_fn(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        drawn = noised.add_noise(key, process, batch, times, dropping, couple)
        target = predictions.from_pair(process, prediction, drawn.x0, drawn.eps, drawn.t)
        squared_error = noised.row_mean((drawn.evaluate(apply, params) - target) ** 2)
        loss = weight.at(process, drawn.t) * squared_error
        return loss, {"loss": loss, "squared_error": squared_error}

    return loss_fn
