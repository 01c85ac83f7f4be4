"""Langevin dynamics, and correctors that run it, or any sampler, between the steps of another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import checks, numerics, timesteps
from jaxdiff.samplers.protocol import Sampler, check_sampler, one_call
from jaxdiff.typing import Array, Key


def langevin(
    score: Callable[[Array, Array], Array],
    step_size: float | Array | Callable[[Array], Any],
    *,
    noise: Any = 1.0,
) -> Sampler:
    """Make unadjusted Langevin dynamics: x + step score(x, t) + noise sqrt(2 step) z.

    A step from t to s moves x within the distribution of time t and ignores s; a grid that
    repeats each time M times gives M moves a noise level (annealed Langevin dynamics), and a
    constant grid plain dynamics. The last time of a grid is never moved at. Without noise it is
    gradient ascent of the density.

    Args:
        score: (x (B, ...), t ()) -> the score (B, ...), such as `denoisers.to_score` makes; one
            of that knows its process, and so which grids begin too late.
        step_size: a number or a function of t; Song & Ermon take c variance(t).
        noise: factor of the noise; 0, as a Python number, draws none. At 1 the dynamics keeps
            the density, up to O(step).

    Raises:
        TypeError: if `score` is no function, or an option no real number.
        ValueError: if `step_size` or `noise` is known and negative or not finite; when sampling,
            if the score changes the shape, or its process is known and a known grid starts past
            its t_max, or where the denoiser within divides by alpha = 0.

    Source: Song & Ermon 2019 (arXiv:1907.05600), eq. 4 and algorithm 1, whose step is 2 of ours.
    """
    score = checks.judged("score", score, "(x, t) -> the score, in the shape of x")
    process = getattr(score.fn, "process", None)
    if callable(step_size):
        checks.function("step_size", step_size, "of t, or a number", takes=1)
    else:
        checks.number("step_size", step_size, 0.0)
    known_noise = numerics.concrete(checks.number("noise", noise, 0.0))
    silent = known_noise is not None and known_noise == 0.0

    def step(key: Key, x: Array, t: Array, s: Array) -> Array:
        size = step_size
        if callable(step_size):
            size = checks.number("step_size(t)", step_size(t), 0.0)
        size = jnp.asarray(size, x.dtype)
        moved = x + size * score(x, t)
        if silent:
            return moved
        return moved + noise * numerics.sqrt(2.0 * size) * numerics.normal(key, x)

    def check(ts: Array) -> None:
        if process is not None:
            timesteps.check_start(process, ts[0], score.needs_signal)

    return Sampler(
        init=lambda x_T: x_T,
        step=step,
        check=check,
        needs_signal=score.needs_signal is not None,
        calls=one_call,
    )


def predictor_corrector(
    predictor: Sampler, corrector: Sampler, num_corrections: int = 1
) -> Sampler:
    """Make a sampler that corrects where a predictor has stepped to, within the same time.

    After a step from t to s the corrector takes `num_corrections` steps from s to s, but none
    where s = 0.

    Args:
        predictor: any sampler; a multistep one goes on from the corrected x.
        corrector: a sampler that moves at a standing time, as `langevin` does.
        num_corrections: at least 0.

    Raises:
        TypeError: if either is no Sampler, or `num_corrections` no whole number.
        ValueError: if `num_corrections` is negative, or the corrector stands still at a standing
            time, as every solver does, and so would change nothing.

    Source: Song et al. 2021 (arXiv:2011.13456), algorithm 1.
    """
    check_sampler("predictor", predictor)
    check_sampler("corrector", corrector)
    num_corrections = checks.count("num_corrections", num_corrections, 0)
    if corrector.stands_still:
        raise ValueError(
            "`corrector` must move at a standing time; got a solver, which stands still there and "
            "would correct nothing. Take samplers.langevin."
        )

    def step(key: Key, state: Any, t: Array, s: Array) -> Any:
        num_rows = predictor.value(state).shape[0]
        rows = numerics.row_keys(key, num_rows)  # first: a key split before its rows differs
        key_predictor, *keys = numerics.split(rows, 1 + num_corrections)
        predicted = predictor.step(key_predictor, state, t, s)
        if num_corrections == 0:
            return predicted

        def correct(state: Any) -> Any:
            def body(moving: Any, key: Key) -> tuple[Any, None]:
                moved = corrector.step(key, moving, s, s)
                return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, moving), None

            x = predictor.value(state)
            moved, _ = jax.lax.scan(body, corrector.init(x), jnp.stack(keys))
            return predictor.replace(state, corrector.value(moved).astype(x.dtype))

        return jax.lax.cond(s > 0, correct, lambda state: state, predicted)

    def check(ts: Array) -> None:
        predictor.check(ts)
        corrector.check(ts[1:])

    predicts, corrects = predictor.calls, corrector.calls

    def calls(t: Array, s: Array) -> Array:
        assert predicts is not None
        assert corrects is not None
        return predicts(t, s) + num_corrections * corrects(s, s) * (s > 0)

    return Sampler(
        predictor.init,
        step,
        predictor.value,
        predictor.replace,
        check,
        needs_signal=predictor.needs_signal,
        calls=None if predicts is None or corrects is None else calls,
    )
