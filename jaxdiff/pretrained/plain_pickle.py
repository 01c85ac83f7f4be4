"""A pickle machine that can make tensors and plain containers, and nothing else.

The instructions of a pickle name functions and have them called: whoever wrote the file decides
which. This machine has no way to look a name up, to make an instance, or to set a state. It
knows the few names that a PyTorch state dict needs as mere words, each with what is made in its
place; the first other name ends the reading. Instructions are decoded by `pickletools`, which
runs none of them.

What is made can be no larger than what is read: no instruction copies, and numbers in the pickle
are never sizes to allocate.
"""

import io
import math
import pickletools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

__all__ = ["LIMIT", "RefusedError", "Storage", "View", "read"]

LIMIT = 16 * 2**20
"""The most bytes of a pickle: those of a hundred thousand tensors."""
_KEY_LIMIT = 1000

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}


class RefusedError(Exception):
    """What a pickle has that is not made here: in a few words, whatever it says itself."""

    def __init__(self, what: str) -> None:
        super().__init__(what if len(what) <= 200 else f"{what[:200]}...")


class Storage(NamedTuple):
    """A run of numbers in the archive.

    Attributes:
        key: its name there.
        dtype: of the numbers.
        size: how many they are.
    """

    key: str
    dtype: np.dtype
    size: int


class View(NamedTuple):
    """A tensor: where its numbers lie in a storage, counted in numbers.

    Attributes:
        storage: whose numbers they are.
        offset: of the first.
        shape: of the tensor.
        strides: from one to the next along each axis.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(NamedTuple):
    """A name that is known: a word, which nothing is looked up by."""

    text: str


class _Ordered(dict[Any, Any]):
    """An OrderedDict: the only thing of which a state is given, and ignored."""


_MARK = object()


def _storage(value: Any) -> Storage:
    if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
        raise RefusedError("a reference that is not to a storage")
    _, kind, key, _, size = value
    name = kind.text.rpartition(".")[2] if isinstance(kind, _Name) else ""
    if name not in _STORAGES or not isinstance(key, str) or not _is_count(size):
        raise RefusedError("a reference to a storage of no known kind")
    return Storage(key, np.dtype(_STORAGES[name]), size)


def _tensor(*args: Any) -> View:
    if len(args) not in (6, 7):
        raise RefusedError("a tensor that is not made of six or seven things")
    storage, offset, shape, strides = args[:4]
    counts = all(isinstance(x, tuple) and all(map(_is_count, x)) for x in (shape, strides))
    if not (isinstance(storage, Storage) and _is_count(offset) and counts):
        raise RefusedError("a tensor that is not made of a storage and whole numbers")
    if len(shape) != len(strides) or len(shape) > 32:
        raise RefusedError(f"a tensor of {len(shape)} axes and {len(strides)} strides")
    if not _is_count(math.prod(max(length, 1) for length in shape)):
        raise RefusedError("a tensor that is too large")
    size = math.prod(shape)
    if size > storage.size:
        raise RefusedError(f"a tensor of {size} numbers in a storage of {storage.size}")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if size and last >= storage.size:
        raise RefusedError(f"a tensor that goes beyond the end of its storage, {storage.key}")
    return View(storage, offset, shape, strides)


def _parameter(*args: Any) -> View:
    if len(args) != 3 or not isinstance(args[0], View):
        raise RefusedError("a parameter that is not made of a tensor")
    return args[0]


def _ordered(*args: Any) -> _Ordered:
    if not args:
        return _Ordered()
    if len(args) > 1 or not isinstance(args[0], list | tuple):
        raise RefusedError("an OrderedDict that is not made of pairs")
    pairs = args[0]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise RefusedError("an OrderedDict that is not made of pairs")
    return _Ordered((_key(key), value) for key, value in pairs)


def _size(*args: Any) -> tuple[int, ...]:
    if len(args) != 1 or not isinstance(args[0], tuple) or not all(map(_is_count, args[0])):
        raise RefusedError("a size that is not made of whole numbers")
    return args[0]


_CALLED: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
}
"""What is made where the pickle has a name called."""
_NAMES = {*_CALLED, *(f"torch.{kind}" for kind in _STORAGES)}


def read(pickle: bytes) -> Any:
    """Make what a pickle says of tensors, plain containers, numbers and text.

    Args:
        pickle: the instructions, at most :data:`LIMIT` bytes.

    Returns:
        Nested dicts, lists and tuples of :class:`View`, numbers, text, bytes and None. They may
        hold themselves.

    Raises:
        RefusedError: if it says anything else, naming it, or is damaged.
    """
    if len(pickle) > LIMIT:
        raise RefusedError(f"instructions of {len(pickle)} bytes, more than {LIMIT}")
    machine = _Machine()
    with warnings.catch_warnings(action="ignore"):  # of escapes in names
        try:
            for opcode, argument in _decoded(pickle):
                if opcode == "STOP":
                    return machine.result()
                machine.run(opcode, argument)
        except IndexError:
            raise RefusedError("instructions that take more than there is") from None
    raise RefusedError("instructions without an end")


def _decoded(pickle: bytes) -> Iterator[tuple[str, Any]]:
    instructions = pickletools.genops(io.BytesIO(pickle))
    while True:
        try:
            opcode, argument, _ = next(instructions)
        except StopIteration:
            return
        except (ValueError, OverflowError, MemoryError) as error:
            raise RefusedError(f"instructions that are none: {error}") from None
        yield opcode.name, argument


class _Machine:
    """A stack, and a memory of what was made."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def run(self, opcode: str, argument: Any) -> None:
        """Follow one instruction.

        Raises:
            RefusedError: if it is none that is followed.
        """
        if opcode in _IGNORED:
            return
        if opcode in _PUSHED:
            self.stack.append(argument)
        elif opcode in _MADE:
            self.stack.append(_MADE[opcode]())
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            self.stack.append(tuple(self._pop() for _ in range(count))[::-1])
        elif opcode in _MEMORY:
            getattr(self, _MEMORY[opcode])(argument)
        elif opcode in _OTHERS:
            getattr(self, _OTHERS[opcode])()
        elif opcode == "GLOBAL":
            self._name(argument.replace(" ", ".", 1))
        else:
            raise RefusedError(f"the instruction {opcode}")

    def result(self) -> Any:
        """Return what was made, all else being gone.

        Raises:
            RefusedError: if something else is left.
        """
        result = self._pop()
        if self.stack:
            raise RefusedError("instructions that leave something over")
        return result

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise RefusedError("a mark in place of a value")
        return value

    def _top(self) -> Any:
        value = self.stack[-1]
        if value is _MARK:
            raise RefusedError("a mark in place of a value")
        return value

    def _marked(self) -> list[Any]:
        """Take off what lies above the last mark, and the mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise RefusedError("a mark that is missing")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _put(self, index: Any) -> None:
        self.memory[index] = self._top()

    def _memoize(self, _: Any) -> None:
        self.memory[len(self.memory)] = self._top()

    def _get(self, index: Any) -> None:
        if index not in self.memory:
            raise RefusedError("a memory that is empty")
        self.stack.append(self.memory[index])

    def _name(self, text: str) -> None:
        if text not in _NAMES:
            raise RefusedError(text if re.fullmatch(r"[\w.]{1,200}", text) else ascii(text))
        self.stack.append(_Name(text))

    def _named_by_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise RefusedError("a name that is no text")
        self._name(f"{module}.{name}")

    def _refer(self) -> None:
        self.stack.append(_storage(self._pop()))

    def _call(self) -> None:
        args, name = self._pop(), self._pop()
        made = _CALLED.get(name.text) if isinstance(name, _Name) else None
        if made is None or not isinstance(args, tuple):
            raise RefusedError("a call of what cannot be called")
        self.stack.append(made(*args))

    def _set_state(self) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, _Ordered) or not isinstance(state, dict):
            raise RefusedError("a state of what has none")

    def _tuple(self) -> None:
        self.stack.append(tuple(self._marked()))

    def _append(self) -> None:
        self._extend([self._pop()])

    def _appends(self) -> None:
        self._extend(self._marked())

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise RefusedError("a list that is none")
        target.extend(values)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self._marked())

    def _update(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(values) % 2:
            raise RefusedError("a dict that is none")
        for key, value in zip(values[::2], values[1::2], strict=True):
            key = _key(key)
            if key in target:
                raise RefusedError(f"the key {key!r} twice")
            target[key] = value


def _key(key: Any) -> str | int:
    if isinstance(key, str) and len(key) <= _KEY_LIMIT:
        return key
    if isinstance(key, int) and abs(key) < 2**63:
        return key
    raise RefusedError(f"a key that is neither text of up to {_KEY_LIMIT} letters nor a number")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


_IGNORED = {"PROTO", "FRAME"}
_PUSHED = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MEMORY = {
    "BINPUT": "_put",
    "LONG_BINPUT": "_put",
    "MEMOIZE": "_memoize",
    "BINGET": "_get",
    "LONG_BINGET": "_get",
}
_OTHERS = {
    "STACK_GLOBAL": "_named_by_stack",
    "BINPERSID": "_refer",
    "REDUCE": "_call",
    "BUILD": "_set_state",
    "TUPLE": "_tuple",
    "APPEND": "_append",
    "APPENDS": "_appends",
    "SETITEM": "_set_item",
    "SETITEMS": "_set_items",
}
