r"""Samples that begin from an example, or agree with one where it is known.

Both are any other sampler that begins otherwise. They are begun as every sampler is, with noise
alone, x_T = sigma eps at the first time t of the grid, and put under it

    sdedit        alpha_t x0 + x_T
    inpainting    the same where x0 is known, and there after every step to s
                  x_s = alpha_s x0 + sigma_s eps

So the known part follows the way of its own noise, to x0 itself where sigma_s = 0.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff import checks, numerics
from jaxdiff.processes import Process
from jaxdiff.samplers.protocol import SAME_TIME, Sampler, check_sampler
from jaxdiff.typing import Array, Key


class State(NamedTuple):
    """The state of the sampler within, and the noise eps (B, ...) that it was begun with."""

    within: Any
    eps: Array


def sdedit(process: Process, sampler: Sampler, x0: Array, t_start: Any) -> Sampler:
    """Begin a sampler with an example that noise covers in part.

    Args:
        process: the forward process.
        sampler: that goes on from there.
        x0: the examples (B, ...), or (1, ...) for all rows.
        t_start: the first time of the grid: at t_max little of x0 is left, or nothing.

    Returns:
        The sampler, which no longer encodes.

    Raises:
        TypeError: if `process` is no process, `sampler` no Sampler, or `x0` holds no
            floating-point numbers.
        ValueError: if a known `t_start` is negative; when sampling, if the grid is known to begin
            elsewhere, or `x0` has not the shape of x_T.

    Source: Meng et al. 2022 (arXiv:2108.01073), section 3.
    """
    x0 = _judged(process, sampler, x0, t_start)

    def init(x_T: Array) -> Any:  # noqa: N803
        under = _as_alike("x0", x0, x_T)
        return sampler.init(_at(process.alpha, t_start, x_T) * under + x_T)

    def check(ts: Array) -> None:
        _check_start(ts, t_start)
        sampler.check(ts)

    return sampler._replace(init=init, check=check, deterministic=False)


def inpainting(
    process: Process, sampler: Sampler, x0: Array, known: Array, t_start: Any
) -> Sampler:
    """Let a sampler keep what is known of its samples, by putting it in place after each step.

    It takes any denoiser, and asks nothing more of it. Around :func:`sdedit` the rest begins with
    the example too. `unipc` corrects no points that were moved: it is its predictor alone then.

    Args:
        process: the forward process.
        sampler: that fills in the rest.
        x0: the examples (B, ...), or (1, ...) for all rows.
        known: where they are known, booleans that broadcast against them, such as (1, H, W, 1).
        t_start: the first time of the grid, where there is noise.

    Returns:
        The sampler, which no longer encodes.

    Raises:
        TypeError: as :func:`sdedit`, and if `known` holds no booleans.
        ValueError: as :func:`sdedit`, if `t_start` is 0, and if `known` does not fit `x0`.

    Source: Song et al. 2021 (arXiv:2011.13456), appendix I.2, with one noise for all steps.
    """
    x0 = _judged(process, sampler, x0, t_start)
    checks.number("t_start", t_start, 0.0, above=True)
    known = jnp.asarray(known)
    if known.dtype != bool:
        raise TypeError(f"`known` must hold booleans; got {known.dtype}.")
    if known.ndim != x0.ndim:
        raise ValueError(f"`known` must have the rank of `x0`, {x0.ndim}; got {known.shape}.")
    sizes = zip(known.shape[1:], x0.shape[1:], strict=True)
    if any(own not in (1, size) for own, size in sizes):
        raise ValueError(f"`known` must broadcast against `x0`, {x0.shape}; got {known.shape}.")

    def put(within: Any, eps: Array, s: Array) -> State:
        x = sampler.value(within)
        noised = _at(process.alpha, s, x) * x0.astype(x.dtype) + _at(process.sigma, s, x) * eps
        return State(sampler.replace(within, jnp.where(known, noised, x)), eps)

    def init(x_T: Array) -> State:  # noqa: N803
        _as_alike("x0", x0, x_T)
        if known.shape[0] not in (1, x_T.shape[0]):
            raise ValueError(
                f"`known` must have a row for each of x_T, {x_T.shape[0]}, or one; "
                f"got {known.shape}."
            )
        eps = x_T / _at(process.sigma, t_start, x_T)
        return put(sampler.init(x_T), eps, jnp.asarray(t_start, float))

    def step(key: Key, state: State, t: Array, s: Array) -> State:
        return put(sampler.step(key, state.within, t, s), state.eps, s)

    def check(ts: Array) -> None:
        _check_start(ts, t_start)
        sampler.check(ts)

    return sampler._replace(
        init=init,
        step=step,
        value=lambda state: sampler.value(state.within),
        replace=lambda state, x: state._replace(within=sampler.replace(state.within, x)),
        check=check,
        info=lambda state: sampler.info(state.within),
        deterministic=False,
    )


def _judged(process: Process, sampler: Sampler, x0: Any, t_start: Any) -> Array:
    checks.process(process)
    check_sampler("sampler", sampler)
    checks.number("t_start", t_start, 0.0)
    return checks.batch("x0", x0)


def _at(of_time: Any, t: Any, x: Array) -> Array:
    return of_time(jnp.asarray(t, float)).astype(x.dtype)


def _as_alike(name: str, value: Array, x: Array) -> Array:
    """Return a value that has a row for each row of x, or one row, in the dtype of x."""
    if value.shape[1:] != x.shape[1:] or value.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"`{name}` must have the shape of x_T, {x.shape}; got {value.shape}.")
    return value.astype(x.dtype)


def _check_start(ts: Array, t_start: Any) -> None:
    first, wanted = numerics.concrete(ts), numerics.concrete(t_start)
    if first is None or wanted is None:
        return
    if abs(first[0] - wanted) > SAME_TIME * np.finfo(first.dtype).eps * max(first[0], wanted):
        raise ValueError(f"`ts` must begin at `t_start`, {wanted:g}; got ts[0]={first[0]:g}.")
