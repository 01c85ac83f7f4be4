"""What is judged at the public edge: each kind of argument by one function.

A refusal names the argument, says what is wanted, what was got and, where it is not obvious, what
would do. Types and shapes are always judged; values where they are known, so that whatever a
check guards may be traced. (Keys and rows are judged by `jaxdiff.rows`.)
"""

import dataclasses
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import numerics
from jaxdiff.typing import Array

__all__ = [
    "CONDITIONAL_DENOISER",
    "DENOISER",
    "Judged",
    "batch",
    "choice",
    "conditioning",
    "count",
    "function",
    "judged",
    "number",
    "output",
    "process",
    "real",
    "shown",
    "texts",
    "whole_numbers",
]

DENOISER = "(x_t, t) -> x0_hat, in the shape of x_t"
"""How a denoiser is called, as refusals say it."""
CONDITIONAL_DENOISER = "(x_t, t, cond) -> x0_hat, in the shape of x_t"
"""How one is called that takes the conditioning of its rows."""


def count(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number of at least `least`.

    Raises:
        TypeError: if it is no whole number: floats and booleans are none.
        ValueError: if it is smaller.
    """
    try:
        if isinstance(value, bool | np.bool_) or np.ndim(value) != 0:
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be a whole number; got {shown(value)}.") from None
    if number < least:
        raise ValueError(f"`{name}` must be at least {least}; got {number}.")
    return number


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    infinite: bool = False,
) -> Any:
    """Return one real number, as it was given, after judging what is known of it.

    Args:
        name: of the argument.
        value: a number or an array of shape (), possibly traced.
        low: the least allowed.
        high: the most allowed.
        above: whether it must lie above `low` itself.
        below: whether it must lie below `high` itself.
        infinite: whether it may be infinite.

    Raises:
        TypeError: if it is no real number.
        ValueError: if it is an array of other shape, NaN, or out of range.
    """
    if isinstance(value, list | tuple):
        raise TypeError(f"`{name}` must be one number; got {shown(value)}.")
    real(name, value, "be a real number")
    if np.shape(value) != ():
        raise ValueError(f"`{name}` must be one number; got shape {np.shape(value)}.")
    known = numerics.concrete(value)
    if known is None:
        return value
    found = float(known)
    at_least = found > low if above else found >= low
    at_most = found < high if below else found <= high
    if not (at_least and at_most) or (math.isinf(found) and not infinite):
        raise ValueError(f"`{name}` must {_range(low, high, above, below, infinite)}; got {value}.")
    return value


def real(name: str, value: Any, wanted: str = "hold real numbers") -> None:
    """Refuse what does not hold real numbers: text, None, booleans, complex numbers, objects.

    `wanted` is what the refusal says must be.

    Raises:
        TypeError: if it does not.
        ValueError: if it is an empty list.
    """
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"`{name}` must {wanted}; got none.")
        for each in value:  # one by one: some may be traced
            real(name, each, wanted)
        return
    dtype = value.dtype if isinstance(value, jax.Array | np.ndarray | np.generic) else None
    if dtype is None:
        try:
            dtype = np.asarray(value).dtype
        except (TypeError, ValueError):
            raise TypeError(f"`{name}` must {wanted}; got {shown(value)}.") from None
    if not any(jnp.issubdtype(dtype, k) for k in (jnp.integer, jnp.floating)):
        raise TypeError(f"`{name}` must {wanted}; got {shown(value)}.")


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a value that is not one of those allowed.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not any(type(value) is type(a) and value == a for a in allowed):
        raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}; got {value!r}.")


def function(name: str, value: Any, form: str, takes: int | None = None) -> None:
    """Refuse what cannot be called, and a type where an object of it is meant.

    Args:
        name: of the argument.
        value: what was given.
        form: how it is called and what it returns, as the refusal says it.
        takes: how many arguments it is called with, if that tells it from what makes one.

    Raises:
        TypeError: if it is neither, or cannot take so many arguments.
    """
    if not callable(value) or inspect.isclass(value):
        raise TypeError(f"`{name}` must be a function {form}; got {shown(value)}.")
    if takes is None:
        return
    try:
        inspect.signature(value).bind(*[None] * takes)
    except TypeError:
        raise TypeError(
            f"`{name}` must be a function {form}; got {shown(value)}, which does not take "
            f"{takes} arguments. Is it to be called first?"
        ) from None
    except ValueError:  # it does not tell its arguments
        return


def process(value: Any, name: str = "process") -> Any:
    """Return a forward process, or say what was given in place of one.

    Raises:
        TypeError: if it has not what every process has; a factory must be called.
    """
    needed = ("alpha", "variance", "sigma", "log_snr", "t_max")
    if inspect.isclass(value) or not all(hasattr(value, each) for each in needed):
        remedy = (
            f" Call it: {value.__name__}()."
            if callable(value) and hasattr(value, "__name__")
            else ""
        )
        raise TypeError(
            f"`{name}` must be a process, as jaxdiff.processes makes them; "
            f"got {shown(value)}.{remedy}"
        )
    return value


def output(name: str, value: Any, like: Array, of: str = "x_t", *, cast: bool = True) -> Array:
    """Return what a function of `like` gave, in its dtype, if it has its shape.

    Nothing broadcasts: (B, 1) for (B, D) would be another model, silently.

    Args:
        name: of the function.
        value: what it returned.
        like: what its result must be like, (B, ...).
        of: what `like` is called.
        cast: whether the result takes the dtype of `like`.

    Raises:
        TypeError: if it is no array of real numbers.
        ValueError: if its shape differs.
    """
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(
            f"`{name}` must return one array of the shape of {of}, {like.shape}; "
            f"got {shown(value)}."
        )
    if value.shape != like.shape:
        raise ValueError(
            f"`{name}` must return the shape of {of}, {like.shape}; got {value.shape}."
        )
    real(f"{name}(...)", value)
    return value.astype(like.dtype) if cast else value


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """A denoiser, score or network whose output is held to the shape of its input.

    Attributes:
        name: of the argument that it was.
        fn: (x_t (B, ...), t) -> (B, ...).
    """

    name: str
    fn: Callable[..., Any]

    @property
    def needs_signal(self) -> str | None:
        """What it was made of says, if it says it: see `typing.Denoiser`."""
        return getattr(self.fn, "needs_signal", None)

    @property
    def v(self) -> Callable[..., Array] | None:
        """Likewise."""
        return getattr(self.fn, "v", None)

    def __call__(self, x_t: Array, t: Array, *cond: Any) -> Array:
        """Return the output in the dtype of x_t."""
        return output(self.name, self.fn(x_t, t, *cond), x_t)


def judged(name: str, fn: Callable[..., Any], form: str, takes: int = 2) -> Judged:
    """Return a denoiser, score or network whose every output is held to the shape of its input.

    Args:
        name: of the argument.
        fn: (x_t (B, ...), t) -> (B, ...).
        form: as in :func:`function`.
        takes: likewise.

    Raises:
        TypeError: if it is no function.
    """
    function(name, fn, form, takes)
    return Judged(name, fn)


def batch(name: str, value: Any) -> Array:
    """Return floating-point numbers of at least float32, with one row or more.

    Raises:
        TypeError: if it holds no floating-point numbers.
        ValueError: if it has no batch axis, or no rows.
    """
    array = numerics.as_float(value, name)
    if array.ndim == 0:
        raise ValueError(f"`{name}` must have a leading batch axis; got shape ().")
    if array.shape[0] == 0:
        raise ValueError(f"`{name}` must hold at least one row; got shape {array.shape}.")
    return array


def finite(name: str, value: Any) -> None:
    """Refuse NaN and infinity where they are known: for what a solver would never end with.

    Raises:
        ValueError: if a known number is not finite.
    """
    known = numerics.concrete(value)
    if known is not None and not (good := np.isfinite(known)).all():
        raise ValueError(f"`{name}` must be finite; {known.size - good.sum()} numbers are not.")


def conditioning(cond: Any, num_rows: int) -> None:
    """Refuse conditioning whose leaves have not a row for each row of the data.

    Raises:
        ValueError: if a leaf has not.
    """
    for path, leaf in jax.tree.leaves_with_path(cond):
        if np.shape(leaf)[:1] != (num_rows,):
            raise ValueError(
                f"`cond{jax.tree_util.keystr(path)}` must hold {num_rows} rows, as the data do; "
                f"got shape {np.shape(leaf)}."
            )


def whole_numbers(name: str, value: Any, high: int | None = None) -> Array:
    """Return an array of whole numbers in 0..high - 1, as far as they are known.

    Raises:
        TypeError: if it holds anything else, booleans too.
        ValueError: if a known one is out of range.
    """
    given = numerics.concrete(value)  # as it was: JAX would wrap 2^32 around to 0
    traced_or_placed = given is None or isinstance(value, jax.Array)
    array = numerics.as_array(value if traced_or_placed else given, name)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"`{name}` must hold integers; got {array.dtype}.")
    if given is None or given.size == 0:
        return array
    least, most = given.min(), given.max()
    if high is None and most > jnp.iinfo(array.dtype).max:
        high = jnp.iinfo(array.dtype).max + 1
    if least < 0 or (high is not None and most >= high):
        wanted = "at least 0" if high is None else f"in 0..{high - 1}"
        raise ValueError(f"`{name}` must be {wanted}; got values from {least} to {most}.")
    return array


def texts(name: str, value: Any) -> list[str]:
    """Return texts as a list; one alone may be given.

    Raises:
        TypeError: if one is no text.
    """
    given = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    for each in given:
        if not isinstance(each, str):
            raise TypeError(f"`{name}` must be texts; got {each!r}.")
    return given


def shown(value: Any) -> str:
    """Describe a value in a few words: its type, and its shape or its short text."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of {value.dtype}{list(value.shape)}"
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', value)}"
    text = repr(value)
    if len(text) > 60 or "\n" in text:
        return f"a {type(value).__name__}"
    return f"{text} ({type(value).__name__})" if value is not None else "None"


def _range(low: float, high: float, above: bool, below: bool, infinite: bool) -> str:
    finite = "" if infinite else " and be finite"
    if math.isinf(low) and math.isinf(high):
        return "not be NaN" if infinite else "be finite"
    if math.isinf(high):
        bound = f"be {'above' if above else 'at least'} {low:g}"
        if low == 0.0:
            bound = "be positive" if above else "be at least 0"
        return bound + finite
    if math.isinf(low):
        return f"be {'below' if below else 'at most'} {high:g}{finite}"
    return f"lie in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
