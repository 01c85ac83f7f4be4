"""From a stateful NNX module to a pure function of its parameters.

A module is a graph of Python objects that hold arrays. :func:`functional` splits it once into
its structure and its parameters, a nested dict with string keys, and returns a function that
puts the two together again while it is traced. Nothing is left that a call could change, so the
result may be jitted, differentiated, and mapped over examples or over parameters.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx

from jaxdiff import checks
from jaxdiff.typing import Apply, Array, Key, PyTree

_EMPTY = inspect.Parameter.empty


def functional(
    module: nnx.Module, method: str = "__call__"
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Take a module apart into its parameters and a pure function.

    Args:
        module: its `__call__` takes and returns what it likes; that of a network takes
            ``(x_t, t, cond, key=key)``. Its parameters are shared with `params`, and the module
            itself is not used again.
        method: what `apply` calls: a module of several is taken apart once for each.

    Returns:
        (params, apply). `params` is a nest of plain dicts with string keys, whose leaves are
        the `nnx.Param` arrays. ``apply(params, *args, key=None, **kwargs)`` is pure and hands its
        arguments on; a key turns training behaviour (dropout) on. What the module calls `cond` or
        `key` is None where it is not given. Where the module says by an attribute `time`, a text,
        what its time argument is, ``apply.time`` says it too: "log_snr" for the networks of this
        package, so that whoever would hand it a time can tell.

    Raises:
        TypeError: if `module` is no nnx.Module, or cannot be called; by `apply`, if it is given a
            key that the module does not take.
        ValueError: if the module holds state other than `nnx.Param` (batch-norm statistics,
            the counters of `nnx.Dropout`), which a pure function could not update, or a list
            of sub-modules, whose integer keys do not survive a checkpoint.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"`module` must be a flax.nnx.Module, made; got {checks.shown(module)}. A function "
            "(params, x_t, t, cond, key=None) needs no taking apart: it serves as it is."
        )
    graph, state, *others = nnx.split(module, nnx.Param, ...)
    kept = [
        f"{_name(path)} ({type(leaf).__name__})"
        for other in others
        for path, leaf in nnx.to_flat_state(other)
    ]
    if kept:
        raise ValueError(
            f"`module` must hold no state but nnx.Param; got {', '.join(kept)}. Use layers "
            "without state: group or layer normalisation, and dropout that takes the key."
        )
    params = nnx.to_pure_dict(state)
    listed = list(_integer_paths(params))
    if listed:
        raise ValueError(
            f"`module` must name its parameters by strings; got integer keys at "
            f"{', '.join(listed)}. A checkpoint returns them as strings, in which order 10 "
            "precedes 2. Instead of a list, set attributes with zero-padded names: "
            'setattr(self, f"block_{i:02d}", block).'
        )

    if not callable(getattr(module, method, None)):
        raise TypeError(f"`module` must have a {method}; {type(module).__name__} has none.")
    complete = _completing(module, method)

    def apply(params: PyTree, *args: Any, key: Key | None = None, **kwargs: Any) -> Any:
        return getattr(nnx.merge(graph, params), method)(*args, **complete(args, kwargs, key))

    time = getattr(module, "time", None)
    return params, _taking(time, apply) if isinstance(time, str) else apply


def deferred(
    make: Callable[[], nnx.Module],
) -> tuple[Callable[[], dict[str, Any]], Callable[..., Any]]:
    """Take a module apart that is not made yet, so that its parameters can be made where they go.

    Args:
        make: makes the module; called twice, once for its shapes alone.

    Returns:
        (init, apply). ``init()`` returns the parameters and may be traced:
        ``jax.jit(init, out_shardings=...)`` makes each where it belongs. `apply` is that of
        :func:`functional`.

    Raises:
        TypeError: as :func:`functional`, or if `make` is no function.
        ValueError: as :func:`functional`.
    """
    checks.function("make", make, "() that makes the module")
    _, apply = functional(nnx.eval_shape(make))

    def init() -> dict[str, Any]:
        return functional(make())[0]

    return init, apply


def on_log_snr(apply: Apply, log_snr: Callable[[Array], Array]) -> Apply:
    """Let a network see the log-SNR in place of the time.

    Args:
        apply: ``apply(params, x_t, log_snr, cond, key=key)``.
        log_snr: that of the process, ``process.log_snr``; it may be infinite at the ends.

    Returns:
        A network of (x_t, t), with t of shape () or (B,); its `time` is "t".

    Raises:
        TypeError: if `log_snr` is no function.
        ValueError: if the network takes times already, or steps.

    Source: Ho and Salimans 2022 (arXiv:2207.12598), section 2, where log-SNR stands for time.
    """
    checks.function("apply", apply, "(params, x_t, log_snr, cond, key=None) -> output")
    checks.function("log_snr", log_snr, "of the time, such as process.log_snr")
    time = getattr(apply, "time", "log_snr")
    if time == "step":
        raise ValueError("`apply` takes steps, not log-SNRs: give nn.on_steps(apply, num_steps).")
    if time != "log_snr":
        raise ValueError("`apply` takes times, not log-SNRs: it went through on_log_snr already.")
    return seeing(log_snr, apply)


def on_steps(apply: Apply, num_steps: int) -> Apply:
    """Let a network see the number of a step in place of the time.

    Args:
        apply: ``apply(params, x_t, n, cond, key=key)``, n being 0 for the first of the steps that
            add noise and T - 1 for the last.
        num_steps: T, of the chain, ``process.num_steps``.

    Returns:
        A network of (x_t, t), with t of shape () or (B,) and n = t T - 1, between steps too; its
        `time` is "t".

    Raises:
        TypeError: if `num_steps` is no whole number, or `apply` no function.
        ValueError: if it is below 1, or the network takes times already, or log-SNRs.
    """
    checks.function("apply", apply, "(params, x_t, n, cond, key=None) -> output")
    checks.count("num_steps", num_steps)
    time = getattr(apply, "time", "step")
    if time == "log_snr":
        raise ValueError("`apply` takes log-SNRs, not steps: give nn.on_log_snr(apply, log_snr).")
    if time != "step":
        raise ValueError("`apply` takes times, not steps: it went through on_steps already.")
    return seeing(lambda t: t * num_steps - 1, apply)


def seeing(moment: Callable[[Array], Array], apply: Apply) -> Apply:
    """Let a network see what `moment` makes of the time."""

    def apply_at_time(
        params: PyTree, x_t: Array, t: Array, cond: PyTree = None, *, key: Key | None = None
    ) -> Array:
        return apply(params, x_t, moment(t), cond, key=key)

    return _taking("t", apply_at_time)


def _completing(
    module: nnx.Module, method: str
) -> Callable[[Any, dict[str, Any], Key | None], dict[str, Any]]:
    """Return what makes (args, kwargs, key) of `apply` into the keywords of the method's call."""
    signature = inspect.signature(getattr(module, method))
    takes = signature.parameters
    takes_key = "key" in takes or any(each.kind is each.VAR_KEYWORD for each in takes.values())
    needed = [name for name in ("cond", "key") if name in takes and takes[name].default is _EMPTY]
    name = type(module).__name__

    def complete(args: Any, kwargs: dict[str, Any], key: Key | None) -> dict[str, Any]:
        if key is not None:
            if not takes_key:
                raise TypeError(
                    f"`key` must not be given: {name}.{method} has no argument of that name. Let "
                    "it take key=None, even if it draws nothing."
                )
            kwargs = {**kwargs, "key": key}
        given = signature.bind_partial(*args, **kwargs).arguments if needed else {}
        return {**dict.fromkeys(each for each in needed if each not in given), **kwargs}

    return complete


def _taking(time: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """Say on a function what its time argument is."""
    apply.time = time  # type: ignore[attr-defined]
    return apply


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _integer_paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[str]:
    """Yield the path of each shallowest key that is not a string."""
    if not isinstance(tree, Mapping):
        return
    for key, branch in tree.items():
        if isinstance(key, str):
            yield from _integer_paths(branch, (*path, key))
        else:
            yield _name((*path, key))
