r"""What a network may be conditioned on: labels, vectors, sequences, and several at once.

    nn.DiT(shape, conditioning=nn.Labels(10), rngs=rngs)  # num_classes=10 for short
    nn.DiT(shape, conditioning=nn.Sequences(768), rngs=rngs)
    nn.DiT(shape, conditioning={"label": nn.Labels(10), "text": nn.Sequences(768)}, rngs=rngs)
    nn.DiT(shape, conditioning=nn.Texts(512, length=20), rngs=rngs)    # see jaxdiff.nn.texts

A condition turns its value for a batch, `cond`, into a vector (B, C), which is added to that of
log-SNR, or into tokens (B, L, C) with a mask, which the network attends to. Several conditions are
a mapping of names to them, and `cond` is a mapping of the same names to their values; vectors are
added up then, tokens stand in one row.

**None.** Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) takes a network that
knows a value for "no condition" beside all others: the label `num_classes`, the vector of zeros,
the sequence that is masked altogether. What the network makes of it is learned, from the rows of
which the loss drops the conditioning; :func:`null_cond` is what replaces it there. In evaluation
``cond=None``, or None for one of several, means the same; in training it is refused, since there it
would be conditioning that got lost.

    losses.denoising(apply, process, drop_cond=0.1, null_cond=nn.null_cond(conditioning))

Another kind is a subclass of :class:`Condition`.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff import checks, numerics
from jaxdiff.nn.layers import Linear
from jaxdiff.nn.sequences import check_mask, sequence_parts
from jaxdiff.typing import Array, PyTree

__all__ = [
    "Condition",
    "Conditions",
    "Context",
    "Embedding",
    "Labels",
    "Sequences",
    "Vectors",
    "choose",
    "named",
    "null_cond",
]


class Context(NamedTuple):
    """What a network attends to.

    Attributes:
        tokens: shape (B, L, C).
        mask: shape (B, L), True where there is a token.
    """

    tokens: Array
    mask: Array


class Embedding(NamedTuple):
    """What a network takes of its conditioning.

    Attributes:
        vector: shape (B, C), or None.
        context: tokens and their mask, or None.
    """

    vector: Array | None = None
    context: Context | None = None


class Condition(abc.ABC):
    """One kind of conditioning. Subclasses are frozen dataclasses; parameters lie elsewhere."""

    holds: ClassVar[str] = "conditioning"
    """What its value holds, as refusals say it."""
    has_context: ClassVar[bool] = False
    """Whether it gives tokens, for which a network then has cross-attention."""

    @abc.abstractmethod
    def make(self, width: int, **options: Any) -> nnx.Module | nnx.Param:
        """Make its parameters.

        Args:
            width: C, the size of the vector and of the tokens.
            options: the dtype, param_dtype and rngs of :class:`jaxdiff.nn.layers.Linear`.
        """

    @abc.abstractmethod
    def embed(self, made: Any, value: PyTree, name: str, num_rows: int) -> Embedding:
        """Turn a batch's value into what the network takes.

        Args:
            made: what :meth:`make` returned.
            value: a pytree of (B, ...).
            name: what refusals call it.
            num_rows: B.
        """

    @abc.abstractmethod
    def null(self) -> PyTree:
        """Return the value of one example, without batch axis, that stands for none."""


Conditions: TypeAlias = Condition | Mapping[str, Condition]
"""One condition, or several by name."""


@dataclasses.dataclass(frozen=True)
class Labels(Condition):
    """Integer labels (B,) in 0..num_classes, the last of which stands for none; a vector.

    A label that is out of range where it cannot be seen (under jit) gives NaN.

    Raises:
        TypeError: if `num_classes` is no whole number.
        ValueError: if it is below 1.
    """

    num_classes: int
    holds: ClassVar[str] = "labels"

    def __post_init__(self) -> None:
        checks.count("num_classes", self.num_classes)

    def make(self, width: int, **options: Any) -> nnx.Param:
        """Make a table (num_classes + 1, width)."""
        shape = (self.num_classes + 1, width)
        initial = nnx.initializers.normal(0.02)
        return nnx.Param(initial(options["rngs"].params(), shape, options["param_dtype"]))

    def embed(self, made: Any, value: PyTree, name: str, num_rows: int) -> Embedding:
        """Look labels up.

        Raises:
            TypeError: if they are not integers.
            ValueError: if their shape is not (B,), or a known one is out of range.
        """
        labels = _check_labels(value, self.num_classes, name, num_rows)
        # A negative index would count from the end, so send it out of range on the other side.
        labels = jnp.where(labels < 0, self.num_classes + 1, labels)
        return Embedding(jnp.take(made[...], labels, axis=0, mode="fill", fill_value=jnp.nan))

    def null(self) -> np.ndarray:
        """Return the label `num_classes`."""
        return np.asarray(self.num_classes, np.int32)


@dataclasses.dataclass(frozen=True)
class Vectors(Condition):
    """Real vectors (B, dim) of about unit scale; a vector, by a perceptron of two layers.

    Zeros stand for none: what else the data hold should not be exactly 0 in every entry.

    Raises:
        TypeError: if `dim` is no whole number.
        ValueError: if it is below 1.
    """

    dim: int
    holds: ClassVar[str] = "vectors"

    def __post_init__(self) -> None:
        checks.count("dim", self.dim)

    def make(self, width: int, **options: Any) -> nnx.Module:
        """Make a perceptron from `dim` to `width`."""
        return Perceptron(self.dim, width, **options)

    def embed(self, made: Any, value: PyTree, name: str, num_rows: int) -> Embedding:
        """Embed vectors.

        Raises:
            TypeError: if they hold no real numbers.
            ValueError: if their shape is not (B, dim).
        """
        return Embedding(made(_check_real(value, name, (num_rows, self.dim))))

    def null(self) -> np.ndarray:
        """Return zeros (dim,)."""
        return np.zeros(self.dim, np.float32)


@dataclasses.dataclass(frozen=True)
class Sequences(Condition):
    """Sequences such as a text encoder's output: real tokens (B, L, dim) and a mask (B, L).

    The value is a mapping or a named tuple of `tokens` and `mask`; the mask, of booleans or of 0
    and 1, is true where there is a token. L may differ between calls. Tokens say themselves where
    they stand, as an encoder's do: no positions are added. Each is taken to the network's width by
    a dense layer. What stands behind the mask has no influence, whatever it is; a sequence that is
    masked altogether stands for none.

    Raises:
        TypeError: if `dim` is no whole number.
        ValueError: if it is below 1.
    """

    dim: int
    holds: ClassVar[str] = "sequences"
    has_context: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.count("dim", self.dim)

    def make(self, width: int, **options: Any) -> nnx.Module:
        """Make a dense layer from `dim` to `width`."""
        xavier = nnx.initializers.xavier_uniform()
        return Linear(self.dim, width, kernel_init=xavier, **options)

    def embed(self, made: Any, value: PyTree, name: str, num_rows: int) -> Embedding:
        """Embed tokens; those behind the mask as zeros.

        Raises:
            TypeError: if there are not tokens of real numbers and a mask of truth values.
            ValueError: if a shape is another, or there are no tokens at all.
        """
        tokens, mask = _check_sequence(value, name, num_rows, self.dim)
        return Embedding(context=Context(made(jnp.where(mask[..., jnp.newaxis], tokens, 0)), mask))

    def null(self) -> dict[str, np.ndarray]:
        """Return one masked token, which serves in the place of any number of them."""
        return {"tokens": np.zeros((1, self.dim), np.float32), "mask": np.zeros(1, bool)}


class Perceptron(nnx.Module):
    """Two dense layers with silu between; `options` go to them."""

    def __init__(self, in_features: int, width: int, **options: Any) -> None:
        xavier = nnx.initializers.xavier_uniform()
        self.inner = Linear(in_features, width, kernel_init=xavier, **options)
        self.outer = Linear(width, width, kernel_init=xavier, **options)

    def __call__(self, x: Array) -> Array:
        """Map (B, in_features) to (B, width)."""
        return self.outer(jax.nn.silu(self.inner(x)))


def choose(conditioning: Conditions | None, num_classes: int | None) -> Conditions | None:
    """Return the conditioning of a network that was given either; None of neither.

    Raises:
        TypeError: if `num_classes` is no whole number.
        ValueError: if it is negative, or both are given.
    """
    if num_classes is None or checks.count("num_classes", num_classes, 0) == 0:
        return conditioning
    if conditioning is not None:
        raise ValueError(
            "`num_classes` is short for conditioning=nn.Labels(num_classes): give one of the two; "
            f"got {num_classes} and {conditioning}."
        )
    return Labels(num_classes)


def null_cond(conditioning: Conditions) -> PyTree:
    """Return one example's worth of no conditioning: what replaces `cond` where it is dropped.

    Raises:
        TypeError: if `conditioning` is neither a condition nor a mapping of names to conditions.
        ValueError: if it is an empty mapping, or a name is no identifier.
    """
    conditions = named(conditioning)
    if isinstance(conditioning, Condition):
        return conditioning.null()
    return {name: condition.null() for name, condition in conditions.items()}


def named(conditioning: Conditions) -> dict[str, Condition]:
    """Return conditions by the name of their parameters; that of a single one is of its kind.

    Raises:
        TypeError: if it is neither a condition nor a mapping of names to conditions.
        ValueError: if it is an empty mapping, or a name is no identifier.
    """
    kinds = "nn.Labels(num_classes), nn.Vectors(dim), nn.Sequences(dim) or nn.Texts(num_tokens)"
    if isinstance(conditioning, Condition):
        return {type(conditioning).__name__.lower(): conditioning}
    if not isinstance(conditioning, Mapping):
        raise TypeError(
            f"`conditioning` must be {kinds}, or a mapping of names to them; "
            f"got {checks.shown(conditioning)}."
        )
    if not conditioning:
        raise ValueError("`conditioning` must name at least one condition; got none. Give None.")
    for name, condition in conditioning.items():
        if not isinstance(condition, Condition):
            raise TypeError(
                f"`conditioning[{name!r}]` must be {kinds}; got {checks.shown(condition)}."
            )
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"`conditioning` must have names such as label; got {name!r}.")
    return dict(conditioning)


def _check_labels(cond: Any, num_classes: int, name: str, num_rows: int) -> Array:
    """Return labels (B,)."""
    dtype = getattr(cond, "dtype", None)
    if dtype is None:
        dtype = np.asarray(cond).dtype if isinstance(cond, list | tuple | int) else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        got = checks.shown(cond) if dtype is None else dtype
        raise TypeError(f"`{name}` must hold integer labels; got {got}.")
    labels = jnp.asarray(cond)
    if labels.shape != (num_rows,):
        raise ValueError(f"`{name}` must have shape ({num_rows},); got {labels.shape}.")
    known = numerics.concrete(cond)
    if known is not None and known.size and (known.min() < 0 or known.max() > num_classes):
        raise ValueError(
            f"`{name}` must hold labels in 0..{num_classes}, {num_classes} being the null label; "
            f"got {known.min()}..{known.max()}."
        )
    return labels


def _check_real(value: Any, name: str, shape: tuple[int | str, ...]) -> Array:
    """Return real numbers of a shape, in which a text stands for any size but 0."""
    checks.real(name, value)
    array = jnp.asarray(value)
    fits = array.ndim == len(shape) and all(
        size == wanted or (isinstance(wanted, str) and size > 0)
        for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"`{name}` must have shape ({wanted}); got {array.shape}.")
    return array


def _check_sequence(value: Any, name: str, num_rows: int, dim: int) -> tuple[Array, Array]:
    """Return tokens (B, L, dim) and a mask of booleans (B, L)."""
    tokens, mask = sequence_parts(value, name, f"({num_rows}, L, {dim})", num_rows)
    tokens = _check_real(tokens, f"{name}.tokens", (num_rows, "L", dim))
    return tokens, check_mask(mask, name, tokens.shape[:2])
