r"""The sampler protocol and the one loop that runs every sampler.

A sampler is a tuple of pure functions, as an optimizer of optax is: `init` makes a state of
x_T, `step` moves it from time t to s <= t, `value` reads x off it. Whatever a method must
remember, the history of a multistep solver say, lives in its state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff import numerics, predictions, timesteps
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, Key, PyTree


def _identity(state: Any) -> Any:
    return state


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
    """

    init: Callable[[Array], Any]
    step: Callable[[Key, Any, Array, Array], Any]
    value: Callable[[Any], Array] = _identity
    replace: Callable[[Any, Array], Any] = lambda state, x: x
    check: Callable[[Array], None] = lambda ts: None


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
        x_T: noise (B, ...), as `process.prior_sample` draws it; computed with in float32 at least.
        ts: decreasing times (N + 1,), as `jaxdiff.timesteps` makes them; equal neighbours are
            steps that a solver stands still in.
        index: the rows' numbers in the global batch (B,), by default 0..B-1.
        collect: state -> pytree, applied after each step.

    Returns:
        x0 (B, ...), or (x0, collected) with the N collected values stacked on a leading axis.

    Raises:
        TypeError: if `x_T` or `ts` holds integers.
        ValueError: if the shapes do not fit, the known grid increases or holds NaN, or the
            sampler refuses the grid.
    """
    x_T = numerics.as_float(x_T, "x_T")  # noqa: N806
    if x_T.ndim == 0:
        raise ValueError("`x_T` must have a leading batch axis; got shape ().")
    ts = timesteps.check_grid(ts)
    sampler.check(ts)
    ts = ts.astype(x_T.dtype)
    keys = jax.random.split(key, ts.shape[0] - 1)
    if index is not None:
        index = jnp.asarray(index)
        if index.shape != x_T.shape[:1]:
            raise ValueError(f"`index` must have shape {x_T.shape[:1]}; got {index.shape}.")

    def body(state: Any, inputs: tuple[Key, Array, Array]) -> tuple[Any, PyTree]:
        step_key, t, s = inputs
        if index is not None:
            step_key = jax.vmap(jax.random.fold_in, (None, 0))(step_key, index)
        moved = sampler.step(step_key, state, t, s)
        moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state)
        return moved, None if collect is None else collect(moved)

    state, collected = jax.lax.scan(body, sampler.init(x_T), (keys, ts[:-1], ts[1:]))
    x0 = sampler.value(state)
    return x0 if collect is None else (x0, collected)


def check_start(process: Process, denoise: Denoiser) -> Callable[[Array], None]:
    """Return a `Sampler.check`: ValueError unless a grid starts where the denoiser can."""
    needs_signal = getattr(denoise, "needs_signal", None)

    def check(ts: Array) -> None:
        start, t_max = numerics.concrete(ts[0]), numerics.concrete(process.t_max)
        if start is None or t_max is None:
            return
        if start > t_max * (1 + 1e-6):
            raise ValueError(f"`ts` must lie in [0, t_max] = [0, {t_max:g}]; got ts[0]={start:g}.")
        if needs_signal is not None:
            predictions.require_signal(process, ts[0], needs_signal)

    return check
