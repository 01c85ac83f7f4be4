r"""Score matching without a clean target: explicit, implicit, sliced and by finite differences.

With s the network's score at x_t, J its Jacobian and D the number of dimensions, each is w(t) / D
times

    explicit             ||s - grad log q(x_t)||^2, of a score that is known
    implicit             ||s||^2 + 2 tr J
    sliced               ||s||^2 + 2 z^T J z
    finite difference    the same, with z^T J z from s(x_t + h z) and s(x_t - h z)

for z of independent signs. In expectation all differ from `losses.denoising` of the same options by
a constant only, so all have its gradient. (The papers halve the squares; here a
loss of a score is its mean squared error, whichever way it is written.)

Sources: Hyvarinen 2005 (JMLR 6), eqs. 2 and 4; Song et al. 2019 (arXiv:1905.07088), eq. 8;
Pang et al. 2020 (arXiv:2007.03317), section 4.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp

from jaxdiff import checks, numerics, predictions, rows, timesteps, weightings
from jaxdiff.denoisers import Model, as_model
from jaxdiff.losses import noised
from jaxdiff.processes import Process
from jaxdiff.typing import Apply, Array, Batch, Key, LossFn, Network, PyTree

Objective: TypeAlias = Callable[[Key, Callable[[Array], Array], noised.Noised], Array]
"""(key, score of x_t, batch) -> (B,), the mean over dimensions of one of the lines above."""


def explicit(
    apply: Apply | Model,
    process: Process | None = None,
    score: Network | None = None,
    *,
    prediction: str | None = None,
    loss_on: str | None = None,
    weighting: weightings.Weighting | None = None,
    times: timesteps.Draw | None = None,
) -> LossFn:
    """Make explicit score matching, against a score that is known.

    Args:
        apply: a `Model`; or the network, ``apply(params, x_t, t (B,), cond, key=key)`` ->
            (B, ...), with its process and prediction.
        process: the forward process; that of a Model.
        score: (x_t (B, ...), t (B,)) -> grad log q(x_t), as `denoisers.to_score` makes it of an
            exact denoiser; always needed.
        prediction: what the network predicts, one of `predictions.KINDS`, by default score; that
            of a Model.
        loss_on: as in `losses.denoising`; by default `prediction`.
        weighting: as in `losses.denoising`.
        times: training times, by default `timesteps.draw_stratified()`; with
            `timesteps.draw_at(0.0)` and a network that predicts the score, the data themselves.

    Returns:
        ``loss_fn(params, key, batch)`` -> (loss (B,), {"loss": (B,)}), means over dimensions.

    Raises:
        ValueError: if `process` or `prediction` is given beside a Model, a kind is unknown or,
            when called, if a shape is wrong.
        TypeError: if there is a network without a process, `score` is no function or, when
            called, if ``batch["x0"]`` holds integers.
    """
    known = checks.judged("score", cast(Any, score), "(x_t (B, ...), t (B,)) -> (B, ...)")

    def objective(key: Key, s: Callable[[Array], Array], drawn: noised.Noised) -> Array:
        return noised.row_mean((s(drawn.x_t) - known(drawn.x_t, drawn.t)) ** 2)

    return _make(
        objective, as_model(apply, process, prediction, "score"), loss_on, weighting, times
    )


def implicit(
    apply: Apply | Model,
    process: Process | None = None,
    *,
    prediction: str | None = None,
    loss_on: str | None = None,
    weighting: weightings.Weighting | None = None,
    times: timesteps.Draw | None = None,
) -> LossFn:
    """Make implicit score matching, with the exact trace: D tangents through the network.

    Args, results and errors are those of :func:`explicit`; the loss may be negative. The rows of
    the network must not depend on each other.
    """

    def objective(key: Key, s: Callable[[Array], Array], drawn: noised.Noised) -> Array:
        basis = jnp.eye(drawn.x_t[0].size, dtype=drawn.x_t.dtype)
        basis = basis.reshape(-1, 1, *drawn.x_t.shape[1:])
        value, forms = _quadratic_forms(s, drawn.x_t, basis)
        return noised.row_mean(value**2) + 2.0 * jnp.mean(forms, axis=0)

    return _make(
        objective, as_model(apply, process, prediction, "score"), loss_on, weighting, times
    )


def sliced(
    apply: Apply | Model,
    process: Process | None = None,
    *,
    num_projections: int = 1,
    prediction: str | None = None,
    loss_on: str | None = None,
    weighting: weightings.Weighting | None = None,
    times: timesteps.Draw | None = None,
) -> LossFn:
    """Make sliced score matching, the form of reduced variance: one tangent a projection.

    All else is as :func:`implicit` has it; `num_projections`, at least 1, are averaged, fewer are
    a ValueError.
    """
    num_projections = checks.count("num_projections", num_projections)

    def objective(key: Key, s: Callable[[Array], Array], drawn: noised.Noised) -> Array:
        value, forms = _quadratic_forms(s, drawn.x_t, _signs(key, drawn.x_t, num_projections))
        return noised.row_mean(value**2) + 2.0 * jnp.mean(forms, axis=0) / value[0].size

    return _make(
        objective, as_model(apply, process, prediction, "score"), loss_on, weighting, times
    )


def finite_difference(
    apply: Apply | Model,
    process: Process | None = None,
    *,
    step: float = 1e-2,
    num_projections: int = 1,
    prediction: str | None = None,
    loss_on: str | None = None,
    weighting: weightings.Weighting | None = None,
    times: timesteps.Draw | None = None,
) -> LossFn:
    """Make sliced score matching by finite differences: two evaluations a projection, no tangent.

    ||s||^2 is that of the mean of both evaluations. `step`, positive, is h in the units of x_t;
    the bias is of order step^2. All else is as :func:`sliced` has it, and a ValueError refuses a
    step that is not positive.
    """
    num_projections = checks.count("num_projections", num_projections)
    checks.number("step", step, 0.0, above=True)

    def objective(key: Key, s: Callable[[Array], Array], drawn: noised.Noised) -> Array:
        def along(z: Array) -> Array:
            ahead, behind = s(drawn.x_t + step * z), s(drawn.x_t - step * z)
            slope = z * (ahead - behind) / (2.0 * step)
            return noised.row_mean((0.5 * (ahead + behind)) ** 2 + 2.0 * slope)

        return jnp.mean(jax.vmap(along)(_signs(key, drawn.x_t, num_projections)), axis=0)

    return _make(
        objective, as_model(apply, process, prediction, "score"), loss_on, weighting, times
    )


def _make(
    objective: Objective,
    model: Model,
    loss_on: str | None,
    weighting: weightings.Weighting | None,
    times: timesteps.Draw | None,
) -> LossFn:
    apply, process, prediction = model
    weight = noised.weight("score", prediction, loss_on, weighting)
    noised.judge_apply(apply)
    checks.process(process)
    times = noised.judged_times(times)

    def loss_fn(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        key_noise, key_objective = jax.random.split(rows.one_key(key))
        drawn = noised.add_noise(key_noise, process, batch, times)
        key_objective = noised.by_row(key_objective, noised.clean(batch)[1])

        def score(x_t: Array) -> Array:
            output = drawn.evaluate(apply, params, x_t)
            return predictions.convert(process, prediction, "score", output, x_t, drawn.t)

        loss = weight.at(process, drawn.t) * objective(key_objective, score, drawn)
        return loss, {"loss": loss}

    return loss_fn


def _signs(key: Key, x: Array, num: int) -> Array:
    """Return signs (num, B, ...), row i of (key, i) only."""
    signs = numerics.rademacher(key, jnp.empty((x.shape[0], num, *x.shape[1:]), x.dtype))
    return jnp.moveaxis(signs, 1, 0)


def _quadratic_forms(s: Callable[[Array], Array], x: Array, tangents: Array) -> tuple[Array, Array]:
    """Return s(x) (B, ...) and z^T J z (N, B) of tangents z (N, B or 1, ...), one J a row."""
    value, push = jax.linearize(s, x)

    def form(z: Array) -> Array:
        product = z * push(jnp.broadcast_to(z, x.shape))
        return jnp.sum(product.reshape(x.shape[0], -1), axis=1)

    return value, jax.vmap(form)(tangents)
