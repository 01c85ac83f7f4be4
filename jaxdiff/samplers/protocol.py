r"""The sampler protocol and the one loop that runs every sampler.

A sampler is a tuple of pure functions, as an optimizer of optax is: `init` makes a state of
x_T, `step` moves it from time t to s <= t, `value` reads x off it. Whatever a method must
remember, the history of a multistep solver say, lives in its state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff import checks, rows, timesteps
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, Key, PyTree

SAME_TIME = 8
"""How many ulps of the larger apart two times are still one."""

Step = Callable[[Key, Any, Array, Array], Any]
"""(key, state, t, s) -> state at s."""


Calls = Callable[[Array, Array], Array]
"""(t, s), of one shape -> evaluations of the denoiser on steps from t to s, int of that shape."""


def _identity(state: Any) -> Any:
    return state


def one_call(t: Array, s: Array) -> Array:
    """Say that each step evaluates the denoiser once."""
    return jnp.ones(jnp.shape(t), int)


class Sampler(NamedTuple):
    """How to go from noise to data.

    Attributes:
        init: x_T (B, ...) -> state.
        step: (key, state, t, s) -> state at s, with s <= t of shape (); the key is one key or
            `(B,)` row keys, and feeds noise through `numerics.normal`.
        value: state -> x (B, ...).
        replace: (state, x) -> state with x in its place, for correctors.
        check: called with the grid where it is known; raises ValueError if the method's
            mathematics does not fit it.
        deterministic: whether `step` draws no noise and may also go from t to s > t, so that
            :func:`encode` can run it.
        stands_still: whether a step from t to t changes nothing, so that it corrects nothing.
        needs_signal: whether it cannot start where alpha is 0, because the method or the denoiser
            divides by it: see `timesteps.start`.
        calls: (t, s) -> evaluations of the denoiser that a step takes, int of their shape; None
            where the rows decide. See :func:`count_calls`.
        info: state -> what is known of the way so far, by name; "calls" (B,) where the rows decide.
            ``sample(..., collect=sampler.info)`` gives it after each step.
    """

    init: Callable[[Array], Any]
    step: Step
    value: Callable[[Any], Array] = _identity
    replace: Callable[[Any, Array], Any] = lambda state, x: x
    check: Callable[[Array], None] = lambda ts: None
    deterministic: bool = False
    stands_still: bool = False
    needs_signal: bool = False
    calls: Calls | None = None
    info: Callable[[Any], dict[str, Array]] = lambda state: {}


def sample(
    key: Key,
    sampler: Sampler,
    x_T: Array,  # noqa: N803
    ts: Array,
    *,
    index: Array | None = None,
    collect: Callable[[Any], PyTree] | None = None,
) -> Any:
    """Run a sampler along a time grid in one `lax.scan`.

    The noise of row i depends on (key, step, i) only, so neither the batch size nor the devices
    change an example. Nothing is kept of the way unless `collect` asks for it. Called eagerly,
    the loop is compiled anew each time: build the sampler inside a jitted function instead.

    Args:
        key: one key; consumed.
        sampler: what to run.
        x_T: noise (B, ...), as `process.prior_sample` draws it at the time ts[0]; computed with in
            float32 at least.
        ts: decreasing times (N + 1,), as `jaxdiff.timesteps` makes them. Neighbours that are equal,
            or but for rounding, are steps that a solver stands still in.
        index: the rows' numbers in the global batch (B,), by default 0..B-1.
        collect: state -> pytree, applied after each step.

    Returns:
        x0 (B, ...), or (x0, collected) with the N collected values stacked on a leading axis.

    Raises:
        TypeError: if `key` is no typed key, `sampler` no Sampler, `x_T` or `ts` holds integers,
            or `index` anything else.
        ValueError: if the shapes do not fit, the batch is empty, the known grid increases or holds
            NaN, the sampler refuses the grid, a known index is negative, or row keys are given.
    """
    key = rows.one_key(key)
    check_sampler("sampler", sampler)
    x_T = checks.batch("x_T", x_T)  # noqa: N806
    ts = timesteps.check_grid(ts)
    sampler.check(ts)
    if index is not None:
        index = checks.whole_numbers("index", index, 2**32)  # what a key can be folded with
        if index.shape != x_T.shape[:1]:
            raise ValueError(f"`index` must have shape {x_T.shape[:1]}; got {index.shape}.")
    return _run(key, sampler, x_T, ts, index, collect)


def encode(sampler: Sampler, x0: Array, ts: Array) -> Array:
    """Run a deterministic sampler backwards, from data to the noise that it makes them of.

    A first step that leaves a time without noise takes eps_hat = 0, its limit there: an error of
    order variance(s) of that one step, so a start at a small time with noise keeps a method's
    order.

    Args:
        sampler: a solver of the probability-flow ODE, one with `deterministic` set.
        x0: data (B, ...).
        ts: increasing times (N + 1,): a grid of `jaxdiff.timesteps`, reversed.

    Returns:
        x_T (B, ...), the state at ts[-1].

    Raises:
        TypeError: if `sampler` is no Sampler, or `x0` or `ts` holds integers.
        ValueError: if the sampler is not deterministic, the known grid decreases or holds NaN,
            or the sampler refuses the grid.

    Source: Song et al. 2021 (arXiv:2010.02502), section 4.3 and eq. 14.
    """
    check_sampler("sampler", sampler)
    if not sampler.deterministic:
        raise ValueError(
            "`sampler` must be deterministic to encode: ddim with eta=0, euler, heun, edm without "
            "churn, dpm_solver_pp, unipc, deis, adaptive, or one's own with deterministic=True."
        )
    x0 = checks.batch("x0", x0)
    ts = timesteps.check_grid(ts, decreasing=False)
    sampler.check(ts[::-1])
    return _run(jax.random.key(0), sampler, x0, ts, None, None)  # the key feeds nothing


def count_calls(sampler: Sampler, ts: Array) -> int | None:
    """Return how often a sampler evaluates its denoiser along a grid; None where the rows decide.

    Args:
        sampler: any; one's own says it by its `calls`.
        ts: a known grid (N + 1,).

    Raises:
        TypeError: if `sampler` is no Sampler, or `ts` holds no floating-point times.
        ValueError: if the grid is none.
    """
    check_sampler("sampler", sampler)
    ts = timesteps.check_grid(ts)
    return None if sampler.calls is None else int(sampler.calls(ts[:-1], ts[1:]).sum())


def check_sampler(name: str, value: Any) -> None:
    """Refuse what is no Sampler, such as a function that makes one.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(value, Sampler):
        raise TypeError(
            f"`{name}` must be a Sampler, such as samplers.ddim(process, denoise) makes; "
            f"got {checks.shown(value)}."
        )


def _run(
    key: Key,
    sampler: Sampler,
    x: Array,
    ts: Array,
    index: Array | None,
    collect: Callable[[Any], PyTree] | None,
) -> Any:
    ts = ts.astype(x.dtype)
    keys = jax.random.split(key, ts.shape[0] - 1)

    def body(state: Any, inputs: tuple[Key, Array, Array]) -> tuple[Any, PyTree]:
        step_key, t, s = inputs
        if index is not None:
            step_key = jax.vmap(jax.random.fold_in, (None, 0))(rows.whole(step_key), index)
        moved = sampler.step(step_key, state, t, s)
        moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state)
        return moved, None if collect is None else collect(moved)

    state, collected = jax.lax.scan(body, sampler.init(x), (keys, ts[:-1], ts[1:]))
    end = sampler.value(state)
    return end if collect is None else (end, collected)


# --- What the samplers share ----------------------------------------------------------------


def taken(process: Process, denoise: Denoiser) -> checks.Judged:
    """Return the denoiser with its outputs judged: with this every method begins.

    Raises:
        TypeError: if `process` is no process or `denoise` no function; when called, if it does
            not return an array.
        ValueError: when called, if the output has not the shape of x_t.
    """
    checks.process(process)
    return checks.judged("denoise", denoise, checks.DENOISER)


def solver(
    process: Process,
    denoise: Denoiser,
    step: Step,
    *,
    init: Callable[[Array], Any] = _identity,
    value: Callable[[Any], Array] = _identity,
    replace: Callable[[Any, Array], Any] = lambda state, x: x,
    deterministic: bool = False,
    divides_by_alpha: str | None = None,
    calls: Calls | None = one_call,
    info: Callable[[Any], dict[str, Array]] = lambda state: {},
) -> Sampler:
    """Make a Sampler of a step, one that stands still where t is s and refuses a wrong start.

    Times that differ by :data:`SAME_TIME` ulps are the same: rounding parts them where grids are
    joined, and slopes over such a step are nothing but rounding.

    Args:
        process: whose times the grid holds.
        denoise: what the step evaluates.
        step: the method's step.
        init: as in Sampler.
        value: as in Sampler.
        replace: as in Sampler.
        deterministic: as in Sampler.
        divides_by_alpha: the method's name if it cannot start where alpha is 0.
        calls: as in Sampler.
        info: as in Sampler.

    Raises:
        ValueError: when sampling, if a known grid starts past t_max, or where alpha is 0 and the
            method or the denoiser divides by it.
    """
    needs = divides_by_alpha or getattr(denoise, "needs_signal", None)

    def guarded(key: Key, state: Any, t: Array, s: Array) -> Any:
        moved = step(key, state, t, s)
        same = jnp.abs(t - s) <= SAME_TIME * jnp.finfo(t.dtype).eps * jnp.maximum(t, s)
        return jax.tree.map(lambda new, old: jnp.where(same, old, new), moved, state)

    def check(ts: Array) -> None:
        timesteps.check_start(process, ts[0], needs)

    return Sampler(
        init,
        guarded,
        value,
        replace,
        check,
        deterministic,
        stands_still=True,
        needs_signal=needs is not None,
        calls=calls,
        info=info,
    )


def traced_once(denoise: Denoiser) -> Denoiser:
    """Return a denoiser that is traced once however often a step calls it."""
    return jax.jit(lambda x_t, t: denoise(x_t, t))


def follow_flow(process: Process, x_t: Array, x0_hat: Array, t: Array, s: Array) -> Array:
    r"""Return alpha_s x0_hat + sigma_s eps_hat: the probability flow if x0_hat did not change.

    It is x0_hat where sigma_s = 0. Where sigma_t = 0, in encoding, eps_hat = 0, its limit there.
    """
    noisy = process.sigma(t) > 0
    kept = jnp.where(noisy, process.sigma(s), process.alpha(s))
    kept /= jnp.where(noisy, process.sigma(t), process.alpha(t))
    return kept * x_t + (process.alpha(s) - kept * process.alpha(t)) * x0_hat
