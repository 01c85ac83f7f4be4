r"""Denoising: regress what noise did to the data.

    loss = E_{t, eps} [ w(t) ||kind_hat(x_t, t) - kind||^2 / D ],    x_t = alpha x0 + sigma eps,

which has the gradient of score matching against the unknown score of q(x_t) (Vincent 2011,
Neural Computation 23(7), section 4; Song et al. 2021, arXiv:2011.13456, eq. 7).

An error in one kind of prediction is a known multiple of the error in any other (see
`predictions.error_ratio`), so the error is taken in what the network predicts, where nothing is
divided by a small number, and `loss_on` and the weighting become one factor of it.
"""

import jax
import jax.numpy as jnp

from jaxdiff import forward, numerics, predictions, timesteps, weightings
from jaxdiff.processes import Process
from jaxdiff.typing import Apply, Array, Batch, Key, LossFn, PyTree


def denoising(
    apply: Apply,
    process: Process,
    *,
    prediction: str = "eps",
    loss_on: str | None = None,
    weighting: weightings.Weighting | None = None,
    times: timesteps.Draw | None = None,
    drop_cond: float = 0.0,
    null_cond: PyTree = None,
) -> LossFn:
    """Make a denoising loss.

    Args:
        apply: the network, ``apply(params, x_t, t (B,), cond, key=key)`` -> (B, ...).
        process: the forward process.
        prediction: what the network predicts, one of `predictions.KINDS`.
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
        ValueError: if a kind is unknown, `drop_cond` is not in [0, 1] or lacks `null_cond`, or,
            when called, if the network changes the shape of its input.
        TypeError: when called, if ``batch["x0"]`` holds integers.
    """
    predictions.check_kind("prediction", prediction)
    loss_on = prediction if loss_on is None else loss_on
    predictions.check_kind("loss_on", loss_on)
    weighting = weightings.simple() if weighting is None else weighting
    times = timesteps.draw_stratified() if times is None else times
    if not 0.0 <= drop_cond <= 1.0:
        raise ValueError(f"`drop_cond` must lie in [0, 1]; got {drop_cond}.")
    if drop_cond > 0.0 and null_cond is None:
        raise ValueError("`null_cond` must say what replaces the conditioning that is dropped.")
    weighted = loss_on if weighting.on is None else weighting.on

    def loss_fn(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        x0 = numerics.as_float(batch["x0"], "x0")
        cond = batch.get("cond")
        key_time, key_eps, key_drop, key_network = jax.random.split(key, 4)
        t = times(key_time, process, x0.shape[0]).astype(x0.dtype)
        x_t, eps = forward.perturb(key_eps, process, x0, t)
        if drop_cond > 0.0:
            cond = _drop(key_drop, cond, null_cond, drop_cond, x0.shape[0])
        output = apply(params, x_t, t, cond, key=key_network)
        if output.shape != x0.shape:
            raise ValueError(
                f"`apply` must return the shape of x0, {x0.shape}; got {output.shape}."
            )
        target = predictions.from_pair(process, prediction, x0, eps, t)
        error = (output.astype(x0.dtype) - target).reshape(x0.shape[0], -1)
        squared_error = jnp.mean(error**2, axis=1)
        scale = predictions.error_ratio(process, weighted, prediction, t)
        loss = weighting.weight(process, t) * scale**2 * squared_error
        return loss, {"loss": loss, "squared_error": squared_error}

    return loss_fn


def _drop(key: Key, cond: PyTree, null_cond: PyTree, rate: float, num_rows: int) -> PyTree:
    """Replace each row's conditioning by the null one with probability `rate`."""
    if cond is None:
        raise ValueError('`drop_cond` needs conditioning: batch["cond"] is missing.')
    dropped = numerics.uniform(key, num_rows) < rate

    def choose(value: Array, null: Array) -> Array:
        mask = dropped.reshape((-1,) + (1,) * (value.ndim - 1))
        return jnp.where(mask, jnp.asarray(null, value.dtype), value)

    return jax.tree.map(choose, cond, null_cond)
