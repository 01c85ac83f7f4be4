"""What a kind of data brings to an ablation: configs, measures, and problems to train on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxdiff.typing import Array, Batch, LossFn, PyTree


class Measure(NamedTuple):
    """A figure of merit.

    Attributes:
        label: for readers.
        sampled: whether it is of samples, and so depends on the sampling fields.
        higher_is_better: otherwise the smallest is best.
    """

    label: str
    sampled: bool = False
    higher_is_better: bool = False


class Problem(NamedTuple):
    """What the members of a group share. Their configs have traced numbers and a key for a seed.

    Attributes:
        init_params: (config) -> initial parameters.
        loss: (config) -> the loss.
        table: (config, its numbers known) -> arrays of a member's own, such as its data order.
        batch: (config, table, step) -> the batch of a step.
        measure: (name, config to sample by, members, params with a leading axis of members,
            samples or None) -> values (M,).
        draw: (config to sample by, members, params) -> samples (M, N, ...).
        calls: (config to sample by) -> evaluations of the network a sample.
        call_flops: () -> operations of one evaluation for one sample, None where unknown.
    """

    init_params: Callable[[Any], PyTree]
    loss: Callable[[Any], LossFn]
    table: Callable[[Any], PyTree]
    batch: Callable[[Any, PyTree, Array], Batch]
    measure: Callable[..., Sequence[float]]
    draw: Callable[..., Any]
    calls: Callable[[Any], int]
    call_flops: Callable[[], float | None]


class World(NamedTuple):
    """What a kind of data brings to an ablation.

    Attributes:
        config: the dataclass of its configs.
        numbers: fields that may be traced.
        sampling: fields that a trained run is sampled by.
        measures: what can be measured, by name.
        check: refuses a config that cannot be meant.
        problem: makes the problem of a group's config.
        unread: (config) -> why a run of it does not read a field, by field; fields that it reads
            are left out.
        notes: names that are no fields though they might be, and what is there instead.
    """

    config: type
    numbers: frozenset[str]
    sampling: frozenset[str]
    measures: Mapping[str, Measure]
    check: Callable[[Any], None]
    problem: Callable[[Any], Problem]
    unread: Callable[[Any], Mapping[str, str]] = lambda config: {}
    notes: Mapping[str, str] = {}
