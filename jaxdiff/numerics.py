r"""Broadcasting, time derivatives, divergences, and noise that is the same everywhere.

**Noise.** The noise of example ``i`` depends on (key, ``i``) only, ``i`` being the example's
index in the *global* batch: its own key is ``fold_in(key, i)``. Wherever this library draws
per-example noise it takes one key, from which rows ``0..B-1`` follow, or ``(B,)`` row keys.
So the first 7 rows of a batch of 64 are the batch of 7, and a batch split over devices, inside
:func:`shard_rows`, draws the rows that the whole batch would have drawn.

**Divergences.** With J the Jacobian of f, div f = tr J = sum_d e_d^T J e_d exactly, and
E[z^T J z] for z with identity covariance (Hutchinson's estimator; Grathwohl et al. 2019,
arXiv:1810.01367, eq. 7).
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.typing import Array, Key


def concrete(value: Any) -> np.ndarray | None:
    """Return `value` as a NumPy array where its numbers are known, None while it is traced.

    Checks of values apply to concrete ones only, so that whatever they guard may be traced.
    """
    if isinstance(value, jax.core.Tracer):
        return None
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # e.g. shards held by another process
        return None


def known_value(fn: Callable[[Array], Array], t: Any) -> np.ndarray | None:
    """Return fn(t) where all it depends on is known, also while something else is traced."""
    if concrete(t) is None:
        return None
    with jax.ensure_compile_time_eval():
        return concrete(fn(as_time(t)))


def as_float(value: Any, name: str = "x") -> Array:
    """Return `value` as a floating-point array of at least float32.

    Raises:
        TypeError: if `value` holds integers, booleans or anything but real numbers.
    """
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`{name}` must hold floating-point numbers; got {array.dtype}.")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def as_time(t: Any) -> Array:
    """Return times as an array of floating-point numbers, keeping a dtype that they have."""
    t = jnp.asarray(t)
    return t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(float)


def expand_like(t: Array, x: Array) -> Array:
    """Give `t` the trailing axes that let it broadcast against `x`.

    Args:
        t: one value for the whole batch, shape (), or one an example, shape (B,).
        x: shape (B, ...).

    Returns:
        Shape () or (B, 1, ..., 1).

    Raises:
        ValueError: if `t` has neither shape.
    """
    t = jnp.asarray(t)
    if t.ndim == 0:
        return t
    if t.ndim != 1 or x.ndim == 0 or t.shape[0] != x.shape[0]:
        raise ValueError(
            f"`t` must have shape () or (B,) with B the leading axis of x; "
            f"got t {t.shape} beside x {x.shape}."
        )
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def sqrt(x: Array) -> Array:
    """Return the square root of x >= 0 with gradient 0, rather than infinite, at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def time_derivative(fn: Callable[[Array], Array], t: Array) -> Array:
    """Differentiate a function of time that acts elementwise; `t` of any shape."""
    t = as_time(t)
    return jax.jvp(fn, (t,), (jnp.ones_like(t),))[1]


T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that is a pytree of its fields.

    Rebuilt by a transformation it skips `__post_init__`: its leaves may then be anything, and
    were checked when it was made. (`jax.tree_util.register_dataclass` runs it again; and in
    jaxlib 0.10 it takes classes of equally many fields for the same structure, so that what was
    compiled for one may run on the other.)
    """
    made = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]

    def flatten_with_keys(value: Any) -> Any:
        return [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names], None

    def flatten(value: Any) -> Any:
        return [getattr(value, name) for name in names], None

    def unflatten(_: None, leaves: Any) -> Any:
        value: Any = object.__new__(made)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(value, name, leaf)
        return value

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


# --- Noise by row ---------------------------------------------------------------------------


class _Share(NamedTuple):
    """Which rows of the global batch a batch at hand holds: see `shard_rows`, `micro_rows`."""

    shard: Any = 0
    num_shards: int = 1
    micro: Any = 0
    num_micro: int = 1


_WHOLE = _Share()
_share: contextvars.ContextVar[_Share] = contextvars.ContextVar("share", default=_WHOLE)


@contextlib.contextmanager
def shard_rows(index: Any, count: int) -> Iterator[None]:
    """While tracing, say that a batch of B rows is shard `index` of `count` equal shards.

    Its rows are then numbers ``index * B .. (index + 1) * B - 1`` of a global batch of
    ``count * B``. The parallel update enters it; losses need not know.
    """
    with _sharing(shard=index, num_shards=count):
        yield


@contextlib.contextmanager
def micro_rows(index: Any, count: int) -> Iterator[None]:
    """While tracing, say that a batch holds every `count`-th row of its shard, from `index` on.

    So is a batch cut up whose gradients are accumulated: rows that lie apart, so that each part
    is spread over as many devices as the whole.
    """
    with _sharing(micro=index, num_micro=count):
        yield


@contextlib.contextmanager
def _sharing(**changes: Any) -> Iterator[None]:
    token = _share.set(_share.get()._replace(**changes))
    try:
        yield
    finally:
        _share.reset(token)


def row_numbers(num_rows: int) -> tuple[Array, int]:
    """Return the global numbers of this batch's rows, (B,), and the size of the global batch."""
    share = _share.get()
    rows = (share.shard * num_rows + jnp.arange(num_rows)) * share.num_micro + share.micro
    return rows, share.num_shards * share.num_micro * num_rows


def is_row_keys(key: Key) -> bool:
    """Tell `(B,)` row keys from one key.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: if it has more than one axis.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"`key` must be a typed key from jax.random.key; got {type(key).__name__}.")
    if key.ndim > 1:
        raise ValueError(f"`key` must be one key or (B,) row keys; got shape {key.shape}.")
    return key.ndim == 1


def row_keys(key: Key, num_rows: int) -> Key:
    """Return one key a row, shape (B,): ``fold_in(key, i)`` for each global row number i.

    Args:
        key: one key, or `(B,)` row keys, which are returned as they are.
        num_rows: B.

    Raises:
        ValueError: if row keys are given and are not B.
    """
    if is_row_keys(key):
        if key.shape[0] != num_rows:
            raise ValueError(f"`key` holds {key.shape[0]} row keys for {num_rows} rows.")
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row_numbers(num_rows)[0])


def split(key: Key, num: int = 2) -> Key:
    """Split one key, or each of `(B,)` row keys, into `num`; the new axis leads."""
    if is_row_keys(key):
        return jnp.moveaxis(jax.vmap(lambda row: jax.random.split(row, num))(key), 0, 1)
    return jax.random.split(key, num)


def normal(key: Key, x: Array) -> Array:
    """Draw standard normal noise with the shape and dtype of `x`, (B, ...), row by row."""
    draw = jax.vmap(lambda row: jax.random.normal(row, x.shape[1:], x.dtype))
    return draw(row_keys(key, x.shape[0]))


def rademacher(key: Key, x: Array) -> Array:
    """Draw signs with the shape and dtype of `x`, (B, ...), row by row."""
    draw = jax.vmap(lambda row: jax.random.rademacher(row, x.shape[1:], x.dtype))
    return draw(row_keys(key, x.shape[0]))


def uniform(key: Key, num_rows: int, dtype: Any = float) -> Array:
    """Draw one number in [0, 1) a row, shape (B,)."""
    return jax.vmap(lambda row: jax.random.uniform(row, (), dtype))(row_keys(key, num_rows))


# --- Divergences of a function of one example ----------------------------------------------


def divergence(fn: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """Evaluate f and its exact divergence at one point.

    Args:
        fn: maps x to an array of its shape.
        x: one point, any shape, D numbers in all; costs one linearisation and D tangents.

    Returns:
        (f(x), div f(x) of shape ()).
    """
    value, push = jax.linearize(fn, x)
    basis = jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)
    return value, jnp.sum(basis * jax.vmap(push)(basis))


def hutchinson_divergence(
    fn: Callable[[Array], Array], x: Array, probes: Array
) -> tuple[Array, Array]:
    """Evaluate f at one point and estimate its divergence there.

    Args:
        fn: maps x to an array of its shape.
        x: one point.
        probes: (N, *x.shape), independent with identity covariance; their estimates are averaged.

    Returns:
        (f(x), the unbiased estimate of div f(x), shape ()).
    """
    value, push = jax.linearize(fn, x)
    return value, jnp.sum(probes * jax.vmap(push)(probes)) / math.prod(probes.shape[:1])
