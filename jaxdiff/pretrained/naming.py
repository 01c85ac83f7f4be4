r"""From the names and layouts of a weights file to the parameters of a network.

One table a model says it all. Each rule is a regular expression over whole source keys, the path of
the parameter it becomes, and how its axes are laid out there:

    TABLE = (
        Rule(r"blocks\.(\d+)\.mlp\.fc1\.weight", "block_{0:02d}.mlp_in.kernel", "linear"),
        Rule(r"blocks\.(\d+)\.mlp\.fc1\.bias", "block_{0:02d}.mlp_in.bias"),
        Rule(r"position_ids", None),
    )

A load is complete and one to one: every tensor of the file is some rule's, every parameter gets
exactly what it needs in its shape, or :class:`NamingError` lists everything that does not fit and
nothing is read. Tensors are then read, cast and placed one by one.
"""

import collections
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.pretrained.errors import WeightsError
from jaxdiff.pretrained.layouts import LAYOUTS, side_by_side
from jaxdiff.typing import PyTree

__all__ = [
    "NamingError",
    "Plan",
    "Rule",
    "Source",
    "Table",
    "fill",
    "judged_dtype",
    "plan",
]

_READERS = 2
"""How many tensors are read at once."""
_SHOWN = 5
"""How many lines of each kind a refusal shows; its attributes have all."""


class Rule(NamedTuple):
    r"""What becomes of the source keys that match a pattern.

    Attributes:
        pattern: regular expression that matches a source key as a whole.
        path: the parameter's, with dots; ``{0}`` is the first group as it is, ``{0:02d}`` that
            number zero-padded. None: known, and not needed.
        layout: one of :data:`jaxdiff.pretrained.layouts.LAYOUTS`.
        part: (i, n) where n tensors lie side by side along the parameter's last axis, this being
            the i-th: (0, 3), (1, 3), (2, 3) for query, key and value of one qkv.
        same_as: of a rule without path: the source key, with groups as in `path`, that such a
            tensor must be equal to.
        constant: of a rule without path: what makes, of the shape of such a tensor, the numbers
            that it must hold, to 1e-6 or the precision of its dtype; a ValueError refuses a shape.
    """

    pattern: str
    path: str | None
    layout: str = "same"
    part: tuple[int, int] | None = None
    same_as: str | None = None
    constant: Callable[[tuple[int, ...]], np.ndarray] | None = None


Table: TypeAlias = tuple[Rule, ...]
"""The rules of one model; the first that matches a key counts."""


class NamingError(WeightsError):
    """Tensors that are not those of the network.

    Attributes:
        missing: parameters that nothing gives.
        left_over: source keys that no rule knows.
        unfitting: a line on each tensor of a wrong shape, or given twice.
        by_values: whether all names and shapes fit, and what tensors hold does not.
    """

    def __init__(
        self,
        missing: list[str],
        left_over: list[str],
        unfitting: list[str],
        *,
        by_values: bool = False,
    ) -> None:
        self.missing, self.left_over, self.unfitting = missing, left_over, unfitting
        self.by_values = by_values
        kinds = (
            (missing, "parameters are missing", "parameter is missing"),
            (left_over, "tensors are left over", "tensor is left over"),
            (unfitting, "tensors do not fit", "tensor does not fit"),
        )
        parts = [
            _listed(f"{len(names)} {plural if len(names) > 1 else singular}", names)
            for names, plural, singular in kinds
            if names
        ]
        super().__init__("The weights are not those of this network. " + "\n".join(parts))


def _listed(title: str, names: list[str]) -> str:
    more = [f"... and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "\n  ".join([f"{title}:", *names[:_SHOWN], *more])


class Source(NamedTuple):
    """A tensor of the file that a parameter is made of.

    Attributes:
        key: in the file.
        layout: one of :data:`jaxdiff.pretrained.layouts.LAYOUTS`.
    """

    key: str
    layout: str


class Plan(NamedTuple):
    """What goes where, all of it fitting.

    Attributes:
        sources: of each parameter by its path, side by side along its last axis.
        copies: (key, the key of the tensor that it must be equal to).
        constants: (key, the numbers that it must hold).
    """

    sources: dict[str, tuple[Source, ...]]
    copies: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, np.ndarray], ...]


def plan(table: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]], like: PyTree) -> Plan:
    """Find what each parameter is made of.

    Args:
        table: of the model.
        shapes: of the file's tensors by their keys.
        like: the parameters, or their `jax.ShapeDtypeStruct`, as nested dicts.

    Raises:
        NamingError: if a parameter is missing, a tensor is left over or does not fit.
        ValueError: if a rule is none: an unknown layout, a path that its groups do not fill.
    """
    wanted = _by_path(like)
    left_over: list[str] = []
    unfitting: list[str] = []
    copies: list[tuple[str, str]] = []
    constants: list[tuple[str, np.ndarray]] = []
    found: dict[str, dict[int, Source]] = {}
    counts: dict[str, int] = {}
    for key, shape in shapes.items():
        rule, groups = _matching(table, key)
        if rule is None:
            left_over.append(key)
        elif rule.path is None:
            if rule.same_as is not None:
                copies.append((key, _filled(rule, rule.same_as, groups)))
            if rule.constant is not None:
                try:
                    constants.append((key, rule.constant(tuple(shape))))
                except ValueError as error:
                    unfitting.append(f"{key} {list(shape)}: {error}")
        else:
            path = _filled(rule, rule.path, groups)
            if path not in wanted:
                left_over.append(f"{key} (for {path}, which this network does not have)")
                continue
            index, counts[path] = rule.part or (0, 1)
            parts = found.setdefault(path, {})
            if index in parts:
                unfitting.append(f"{key} {list(shape)}: {path} is given by {parts[index].key} too")
            else:
                parts[index] = Source(key, rule.layout)
    missing = []
    for path, leaf in wanted.items():
        parts = found.get(path, {})
        absent = [i for i in range(counts.get(path, 1)) if i not in parts]
        if absent and parts:
            numbers = ", ".join(str(i) for i in absent)
            missing.append(f"{path} {list(leaf.shape)}, part {numbers} of {counts[path]}")
        elif absent:
            missing.append(f"{path} {list(leaf.shape)}")
        else:
            sources = [parts[i] for i in range(counts[path])]
            unfitting += _misfits(path, leaf.shape, sources, shapes)
    for key, first in copies:
        if first not in shapes:
            missing.append(f"{first}, of which {key} is a copy")
        elif shapes[first] != shapes[key]:
            unfitting.append(f"{key} {list(shapes[key])}: must be equal to {first}")
    if missing or left_over or unfitting:
        raise NamingError(missing, left_over, unfitting)
    made_of = {path: tuple(found[path][i] for i in range(counts[path])) for path in wanted}
    return Plan(made_of, tuple(copies), tuple(constants))


def fill(table: Iterable[Rule], tensors: Mapping[str, Any], like: PyTree, dtype: Any) -> PyTree:
    """Make the parameters of a network of the tensors of a file, one by one.

    Args:
        table: of the model.
        tensors: arrays by their keys, read when asked for. What has a method ``spec(key)`` that
            gives shape and dtype is not asked for more than it is read.
        like: a `jax.ShapeDtypeStruct` a parameter, in nested dicts; one that has a `sharding` is
            made there, each device getting its own share.
        dtype: of the parameters, floating point.

    Returns:
        Nested dicts like `like`.

    Raises:
        NamingError: as :func:`plan`, or if a copy differs from its first, or a constant from what
            it must be; nothing is made then.
        WeightsError: if a tensor that is needed is not floating point.
        TypeError: if `dtype` is not.
        ValueError: as :func:`plan`.
    """
    dtype = judged_dtype(dtype)
    spec = getattr(tensors, "spec", tensors.__getitem__)
    specs = {key: spec(key) for key in tensors}
    sources, copies, constants = plan(
        table, {key: tuple(s.shape) for key, s in specs.items()}, like
    )
    _judge_floating({source.key: specs[source.key] for many in sources.values() for source in many})
    _judge_copies(copies, tensors)
    _judge_constants(constants, tensors)

    wanted = _by_path(like)

    def read(path: str) -> np.ndarray:
        parts = [LAYOUTS[source.layout](tensors[source.key]) for source in sources[path]]
        return side_by_side(parts, tuple(wanted[path].shape), dtype)

    made = {}
    # In the order of the file, one tensor being read while the one before is laid out.
    order = {key: i for i, key in enumerate(specs)}
    paths = sorted(wanted, key=lambda path: order[sources[path][0].key])
    with futures.ThreadPoolExecutor(_READERS) as pool:
        waiting = collections.deque[futures.Future[np.ndarray]]()
        ahead = iter(paths)
        for path in paths:
            waiting += [
                pool.submit(read, p) for p in itertools.islice(ahead, _READERS - len(waiting))
            ]
            made[path] = _placed(waiting.popleft().result(), wanted[path])
    leaves = [made[path] for path in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _by_path(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _matching(table: Iterable[Rule], key: str) -> tuple[Rule | None, tuple[str | None, ...]]:
    for rule in table:
        match = re.fullmatch(rule.pattern, key)
        if match is not None:
            return rule, match.groups()
    return None, ()


def _filled(rule: Rule, template: str, groups: tuple[str | None, ...]) -> str:
    known = [group or "" for group in groups]
    values = [int(group) if group.isdecimal() else group for group in known]
    try:
        return template.format(*values)
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"The groups {groups} do not fill the path of {rule}.") from error


def _misfits(
    path: str,
    wanted: tuple[int, ...],
    sources: list[Source],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Say which of a parameter's tensors are not of its shape, or all if it is their sum."""
    laid = []
    for key, layout in sources:
        if layout not in LAYOUTS:
            raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}; got {layout!r}.")
        try:
            laid.append(LAYOUTS[layout](np.broadcast_to(np.float32(0), shapes[key])).shape)
        except ValueError as error:
            return [f"{key} {list(shapes[key])}: must have {error}, to be {path} {list(wanted)}"]
    if len(laid) == 1:
        fits = laid[0] == tuple(wanted)
    else:
        fits = all(shape[:-1] == tuple(wanted[:-1]) and shape for shape in laid)
        fits = fits and sum(shape[-1] for shape in laid) == wanted[-1]
    if fits:
        return []
    return [
        f"{source.key} {list(shapes[source.key])}: gives {list(shape)}"
        f"{f' of {len(laid)} parts' if len(laid) > 1 else ''}, {path} is {list(wanted)}"
        for source, shape in zip(sources, laid, strict=True)
    ]


def judged_dtype(dtype: Any) -> np.dtype:
    """Return the dtype that parameters are to have.

    Raises:
        TypeError: if it is not floating point.
        ValueError: if it is float64, and JAX has it not.
    """
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"`dtype` must be a floating-point one; got {dtype!r}.") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be a floating-point one; got {dtype}.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError("`dtype` must not be float64 unless jax_enable_x64 is set.")
    return dtype


_READABLE = tuple(jnp.dtype(name) for name in ("float16", "bfloat16", "float32", "float64"))


def _judge_floating(specs: Mapping[str, Any]) -> None:
    odd = [f"{key} ({s.dtype})" for key, s in specs.items() if jnp.dtype(s.dtype) not in _READABLE]
    if odd:
        raise WeightsError(
            "The weights must be float16, bfloat16, float32 or float64; "
            + _listed(f"{len(odd)} of {len(specs)} tensors are not", odd)
            + "\nQuantised weights are not supported: load a file that is not quantised."
        )


def _judge_copies(copies: Iterable[tuple[str, str]], tensors: Mapping[str, Any]) -> None:
    of_first: dict[str, list[str]] = {}
    for key, first in copies:
        of_first.setdefault(first, []).append(key)
    unequal = []
    for first, keys in of_first.items():
        value = np.asarray(tensors[first])
        unequal += [
            f"{key}: must be equal to {first}, and is not"
            for key in keys
            if not np.array_equal(np.asarray(tensors[key]), value)
        ]
    if unequal:
        raise NamingError([], [], unequal, by_values=True)


def _judge_constants(
    constants: Iterable[tuple[str, np.ndarray]], tensors: Mapping[str, Any]
) -> None:
    unequal = []
    for key, wanted in constants:
        value = np.asarray(tensors[key])
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        tolerance = max(1e-6, float(jnp.finfo(value.dtype).eps)) if floating else 0.0
        # Not a comparison of greater: it would let NaN pass.
        if not (np.abs(value.astype(np.float64) - wanted) <= tolerance).all():
            unequal.append(f"{key}: must hold the constants of its shape, and does not")
    if unequal:
        raise NamingError([], [], unequal, by_values=True)


def _placed(made: np.ndarray, leaf: Any) -> jax.Array:
    """Put an array that is nobody else's on its devices."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jax.device_put(made)
    return jax.make_array_from_callback(made.shape, sharding, made.__getitem__)
