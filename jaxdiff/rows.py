r"""Row numbers and noise, as arguments: noise that is the same everywhere.

The noise of example ``i`` depends on (key, ``i``) only, ``i`` being the example's number in the
*global* batch: its own key is ``fold_in(key, i)``. Wherever this library draws per-example noise it
takes one key, from which rows ``0..B-1`` follow, or ``(B,)`` row keys. So the first 7 rows of a
batch of 64 are the batch of 7.

Where a batch is a part of a larger one, its rows' numbers travel as data, in one of two ways:

- in the key. :func:`part_key` makes one that knows which part it is of. Split or folded it still
  does, so every draw of a loss that an update runs on parts of a batch finds its rows, however
  the loss was compiled, vmapped or recomputed before: nothing reaches it but its arguments.
- in the batch: ``batch["rows"]``, a :class:`Rows`, numbers its rows by any numbers, and is cut and
  spread over devices as the rest of the batch is.

Keys of every kind of generator may be given; the rows' own are always threefry's, since what
``rbg`` and ``unsafe_rbg`` draw under `jax.vmap` depends on the other rows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl

from jaxdiff.typing import Array, Key

__all__ = [
    "Rows",
    "THREEFRY",
    "as_key",
    "is_row_keys",
    "keys",
    "normal",
    "of_batch",
    "of_key",
    "one_key",
    "part_key",
    "rademacher",
    "split",
    "uniform",
    "whole",
]

THREEFRY = "threefry2x32"


class Rows(NamedTuple):
    """Which rows of the global batch a batch holds; both fields have one entry a row.

    Attributes:
        numbers: (B,), from 0.
        total: the size of the global batch, B times, (B,).
    """

    numbers: Array
    total: Array


# --- Keys that know their rows --------------------------------------------------------------


def _threefry(words: Array) -> Key:
    return jax.random.wrap_key_data(words[:2], impl=THREEFRY)


def _like(words: Array, keys: Key) -> Array:
    """Return the words of keys that know the rows of `words`."""
    data = jax.random.key_data(keys)
    return jnp.concatenate([data, jnp.broadcast_to(words[2:], (*data.shape[:-1], 3))], axis=-1)


def _seed(seed: Array) -> Array:
    whole = jnp.asarray([0, 1, 0], jnp.uint32)
    return jnp.concatenate([jax.random.key_data(jax.random.key(seed, impl=THREEFRY)), whole])


_PART = define_prng_impl(
    key_shape=(5,),  # two words of threefry's; the first row, the stride, the size of the whole
    seed=_seed,
    split=lambda words, shape: _like(words, jax.random.split(_threefry(words), shape)),
    fold_in=lambda words, data: _like(words, jax.random.fold_in(_threefry(words), data)),
    # Drawn from directly, not by row, the parts differ at least.
    random_bits=lambda words, width, shape: jax.random.bits(
        jax.random.fold_in(_threefry(words), words[2]), shape, f"uint{width}"
    ),
    name="threefry2x32 of a part",
    tag="part",
)


def part_key(key: Key, first: Any, stride: Any, total: Any) -> Key:
    """Return a key whose rows are numbers first, first + stride, ... of a global batch.

    Its draws by row are those that `key` draws for these rows of the whole.

    Args:
        key: one key.
        first: the number of the part's first row.
        stride: from one row's number to the next.
        total: how many rows the whole has.
    """
    rest = jnp.stack([jnp.asarray(value).astype(jnp.uint32) for value in (first, stride, total)])
    words = jnp.concatenate([jax.random.key_data(as_key(key))[:2], rest])
    return jax.random.wrap_key_data(words, impl=_PART)


def whole(key: Key) -> Key:
    """Return a key that has forgotten its rows, for a draw that is one for the global batch."""
    return jax.random.wrap_key_data(jax.random.key_data(as_key(key))[..., :2], impl=THREEFRY)


def of_key(key: Key, num_rows: int) -> Rows:
    """Return which rows a batch of B holds by its key: 0..B-1 unless it is of a part."""
    if jax.random.key_impl(key) != _PART:
        numbers, total = jnp.arange(num_rows), num_rows
    else:
        first, stride, total = jax.random.key_data(key)[2:].astype(int)
        numbers = first + stride * jnp.arange(num_rows)
    return Rows(numbers, jnp.full(num_rows, total))


def as_key(key: Any, name: str = "key") -> Key:
    """Return a key whose noise by row is right: one of threefry, made of those of other kinds.

    Args:
        key: a typed key: one, or `(B,)` row keys.
        name: of the argument.

    Raises:
        TypeError: if it is no typed key.
        ValueError: if it has more than one axis.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        legacy = getattr(dtype, "name", None) == "uint32" and np.shape(key)[-1:] in ((2,), (4,))
        remedy = " It looks like a legacy one: jax.random.wrap_key_data makes it typed." * legacy
        kind = "an array" if isinstance(key, jax.Array) else type(key).__name__
        raise TypeError(f"`{name}` must be a typed key from jax.random.key; got {kind}.{remedy}")
    if key.ndim > 1:
        raise ValueError(f"`{name}` must be one key or (B,) row keys; got shape {key.shape}.")
    impl = jax.random.key_impl(key)
    if impl == _PART or str(impl) == THREEFRY:
        return key
    words = jax.random.key_data(key)
    converted = jax.random.wrap_key_data(words[..., :2], impl=THREEFRY)
    for i in range(2, words.shape[-1]):
        fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in)
        converted = fold(converted, words[..., i])
    return converted


def one_key(key: Any, name: str = "key") -> Key:
    """Return what :func:`as_key` does of one key.

    Raises:
        TypeError: if it is no typed key.
        ValueError: if it has an axis.
    """
    key = as_key(key, name)
    if key.ndim:
        raise ValueError(f"`{name}` must be one key; got {key.shape[0]} of them.")
    return key


# --- Draws by row ---------------------------------------------------------------------------


def is_row_keys(key: Key) -> bool:
    """Tell `(B,)` row keys from one key.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: if it has more than one axis.
    """
    return as_key(key).ndim == 1


def keys(key: Key, rows: Rows | int) -> Key:
    """Return one key a row, shape (B,): ``fold_in(key, i)`` for each global row number i.

    Args:
        key: one key, or `(B,)` row keys, which stay what they are.
        rows: how many rows, B, numbered as the key says; or the rows.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: if row keys are given and are not B.
    """
    key = as_key(key)
    num_rows = rows.numbers.shape[0] if isinstance(rows, Rows) else rows
    if key.ndim == 1:
        if key.shape[0] != num_rows:
            raise ValueError(f"`key` holds {key.shape[0]} row keys for {num_rows} rows.")
        return key
    numbers = rows.numbers if isinstance(rows, Rows) else of_key(key, rows).numbers
    return jax.vmap(jax.random.fold_in, (None, 0))(whole(key), numbers)


def of_batch(batch: Mapping[str, Any], num_rows: int) -> Rows | None:
    """Return the rows that ``batch["rows"]`` says a batch holds; None where it says nothing.

    Args:
        batch: a dictionary, possibly with "rows".
        num_rows: B.

    Raises:
        TypeError: if ``batch["rows"]`` is no `Rows`.
        ValueError: if it numbers another count of rows.
    """
    rows = batch.get("rows")
    if rows is None:
        return None
    if not isinstance(rows, Rows):
        raise TypeError(f'batch["rows"] must be a jaxdiff.rows.Rows; got {type(rows).__name__}.')
    for name, field in zip(Rows._fields, rows, strict=True):
        if jnp.shape(field) != (num_rows,):
            raise ValueError(
                f'batch["rows"].{name} must have one entry for each of the {num_rows} rows; '
                f"got shape {jnp.shape(field)}."
            )
        if not jnp.issubdtype(jnp.result_type(field), jnp.integer):
            raise TypeError(
                f'batch["rows"].{name} must hold integers; got {jnp.result_type(field)}.'
            )
    return rows


def split(key: Key, num: int = 2) -> Key:
    """Split one key, or each of `(B,)` row keys, into `num`; the new axis leads."""
    key = as_key(key)
    if key.ndim == 1:
        return jnp.moveaxis(jax.vmap(lambda row: jax.random.split(row, num))(key), 0, 1)
    return jax.random.split(key, num)


def normal(key: Key, x: Array) -> Array:
    """Draw standard normal noise with the shape and dtype of `x`, (B, ...), row by row."""
    draw = jax.vmap(lambda row: jax.random.normal(row, x.shape[1:], x.dtype))
    return draw(keys(key, x.shape[0]))


def rademacher(key: Key, x: Array) -> Array:
    """Draw signs with the shape and dtype of `x`, (B, ...), row by row."""
    draw = jax.vmap(lambda row: jax.random.rademacher(row, x.shape[1:], x.dtype))
    return draw(keys(key, x.shape[0]))


def uniform(key: Key, num_rows: int, dtype: Any = float) -> Array:
    """Draw one number in [0, 1) a row, shape (B,)."""
    return jax.vmap(lambda row: jax.random.uniform(row, (), dtype))(keys(key, num_rows))
