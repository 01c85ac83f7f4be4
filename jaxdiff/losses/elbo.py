r"""The variational bound as a loss: one time an example, unbiased, in nats an example.

With a grid it is the discrete-time bound of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 5, with the
posterior's variance; Kingma et al. 2021, arXiv:2107.00630, eq. 14 and appendix E), without one the
continuous-time bound (there eq. 15): see `jaxdiff.variational` for the terms.
`likelihood.elbo` evaluates the whole sum for a denoiser.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import checks, forward, numerics, predictions, rows, timesteps, variational
from jaxdiff.denoisers import Model, as_model
from jaxdiff.losses import noised
from jaxdiff.processes import Process
from jaxdiff.typing import Apply, Array, Batch, Key, LossFn, PyTree


def elbo(
    apply: Apply | Model,
    process: Process | Callable[[PyTree], Process] | None = None,
    *,
    prediction: str | None = None,
    ts: Array | None = None,
    t_min: Any = None,
    decoder: variational.Decoder | None = None,
) -> LossFn:
    """Make the negative variational bound, a bound on -log p(x0).

    Args:
        apply: a `Model`; or the network, ``apply(params, x_t, t (B,), cond, key=key)`` ->
            (B, ...), with its process and prediction.
        process: the forward process, or a function of the parameters that returns it, so that a
            schedule is learned with the network: ``lambda params: params["process"]``; that of
            a Model.
        prediction: what the network predicts, one of `predictions.KINDS`, by default eps; that of
            a Model. Where alpha(t_max) = 0 it must hold x0 there: x0, v or velocity.
        ts: a grid from t_max down to a time with noise, for the bound in so many steps; by
            default that of infinitely many.
        t_min: where the latter end: a time with noise; only without `ts`, and needed then.
        decoder: what makes x0 of x_t at the end; by default `variational.gaussian_decoder()`,
            and the bound is one of a density. With `variational.level_decoder` it is one of the
            probability of levels.

    Returns:
        ``loss_fn(params, key, batch)`` -> (loss (B,), {"loss", "prior", "diffusion",
        "reconstruction"}), in nats an example: sums over dimensions.

    Raises:
        ValueError: if `process` or `prediction` is given beside a Model, the kind is unknown, both
            or neither of `ts` and `t_min` are given, or the grid is not one that ends with noise.
        TypeError: if there is a network without a process or, when called, if ``batch["x0"]``
            holds integers.
    """
    model = as_model(apply, process, prediction, "eps")
    apply, process, prediction = model.apply, model.process, model.prediction
    noised.judge_apply(apply)
    predictions.check_kind("prediction", prediction)
    if not isinstance(process, Process):
        checks.function("process", process, "of the parameters, or a process", takes=1)
    if (ts is None) == (t_min is None):
        raise ValueError(
            "`ts` or `t_min` must be given, not both: a grid for the bound in so many steps, or "
            "the last time of the one in continuous time."
        )
    if ts is not None:
        ts = timesteps.check_grid(ts)
    else:
        checks.number("t_min", t_min, 0.0)
    if isinstance(process, Process):
        noise = numerics.known_value(process.sigma, t_min if ts is None else ts[-1])
        if noise is not None and not noise > 0.0:
            last = t_min if ts is None else ts[-1]
            name = "t_min" if ts is None else "ts"
            raise ValueError(f"`{name}` must end the bound at a time with noise; got {last}.")
    decode = variational.gaussian_decoder() if decoder is None else decoder

    def loss_fn(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        p = process if isinstance(process, Process) else checks.process(process(params))
        key_time, key_noise, key_end = jax.random.split(rows.one_key(key), 3)
        x0, numbers = noised.clean(batch)
        u = timesteps.stratified(key_time, numbers or len(x0))  # in (0, 1]
        if ts is None:
            last, span = jnp.asarray(t_min, u.dtype), p.t_max - t_min
            t = last + span * u
            weight = -0.5 * span * numerics.time_derivative(lambda t: variational.snr(p, t), t)
        else:
            last, num_steps = ts[-1], ts.shape[0] - 1
            step = jnp.minimum((u * num_steps).astype(int), num_steps - 1)
            t = ts[step]
            gain = variational.snr(p, ts[step + 1]) - variational.snr(p, t)
            weight = 0.5 * num_steps * gain
        drawn = noised.add_noise(key_noise, p, batch, lambda *_: t)
        target = predictions.from_pair(p, prediction, drawn.x0, drawn.eps, drawn.t)
        error = drawn.evaluate(apply, params) - target
        to_x0 = predictions.error_ratio(p, "x0", prediction, drawn.t)
        diffusion = weight * to_x0**2 * variational.row_sum(error**2)
        end = last.astype(drawn.x0.dtype)
        x_end, _ = forward.perturb(noised.by_row(key_end, numbers), p, drawn.x0, end)
        terms = {
            "prior": variational.prior_divergence(p, drawn.x0),
            "diffusion": diffusion,
            "reconstruction": -decode(p, drawn.x0, x_end, end),
        }
        loss = sum(terms.values(), start=jnp.zeros_like(diffusion))
        return loss, {"loss": loss, **terms}

    return loss_fn
