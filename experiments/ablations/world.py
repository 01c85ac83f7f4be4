"""What a kind of data brings to an ablation: configs, measures, and problems to train on."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from experiments.common.optimization import TrainingConfig
from experiments.common.options import Role, with_role
from jaxdiff.typing import Array, Batch, Key, LossFn, PyTree

SEED = "seed"


class RunConfig(TrainingConfig, Protocol):
    """The fields of a config that ablations read of every kind of data; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def depth(self) -> int: ...  # noqa: D102
    @property
    def process(self) -> str: ...  # noqa: D102
    @property
    def prediction(self) -> str: ...  # noqa: D102
    @property
    def times(self) -> str: ...  # noqa: D102
    @property
    def log_snr_low(self) -> float: ...  # noqa: D102
    @property
    def sampler(self) -> str: ...  # noqa: D102
    @property
    def sample_steps(self) -> int: ...  # noqa: D102
    @property
    def more_ema_decays(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def average(self) -> float | None: ...  # noqa: D102
    @property
    def beta_min(self) -> float: ...  # noqa: D102
    @property
    def beta_max(self) -> float: ...  # noqa: D102


C = TypeVar("C", bound=RunConfig, covariant=True)
R = TypeVar("R", bound=RunConfig)


class Member(NamedTuple, Generic[C]):
    """A run of a group.

    Attributes:
        config: what it shares with the others; its own numbers and seed are not there.
        numbers: every field that changes numbers alone, by name: traced where members differ.
        key: of its seed.
    """

    config: C
    numbers: Mapping[str, Any]
    key: Key


def member_of(config: R, own: Mapping[str, Any]) -> Member[R]:
    """Return the run of a config that has values of its own, its seed among them."""
    fields = with_role(type(config), Role.NUMBER)
    numbers = {field: own.get(field, getattr(config, field)) for field in fields}
    return Member(config, numbers, jax.random.key(own[SEED]))


class Shared(NamedTuple):
    """What all members' tables hold alike, such as the data: kept once, not for each of them.

    Attributes:
        arrays: a pytree of them.
    """

    arrays: PyTree


class Problem(Protocol):
    """What the members of a group share."""

    def init_params(self, member: Any) -> PyTree:
        """Return a member's initial parameters."""

    def loss(self, member: Any) -> LossFn:
        """Return a member's loss."""

    def table(self, config: Any) -> PyTree:
        """Return arrays of a member's own, such as its data order; its config is whole.

        Large data, which a program should not hold as constants, are a `Shared` of it.
        """

    def batch(self, member: Any, table: PyTree, step: Array) -> Batch:
        """Return the batch of a step."""

    def draw(self, member: Any, params: PyTree) -> Array:
        """Return samples (N, ...), drawn as the member's config says."""

    def calls(self, config: Any) -> int:
        """Return the evaluations of the network that a sample takes."""

    def call_flops(self) -> float | None:
        """Return the operations of one evaluation for one sample, None where unknown."""


class Measure(NamedTuple):
    """A figure of merit, of a model or of its samples.

    Attributes:
        label: for readers.
        of_model: (problem, member, params) -> its value, ().
        of_samples: (problem, config to sample by, seed, samples (N, ...)) -> its value.
        higher_is_better: otherwise the smallest is best.
        reads: the fields that it reads, of those that training and sampling may not.
    """

    label: str
    of_model: Callable[[Any, Any, PyTree], Array] | None = None
    of_samples: Callable[[Any, Any, int, np.ndarray], float] | None = None
    higher_is_better: bool = False
    reads: frozenset[str] = frozenset()

    @property
    def sampled(self) -> bool:
        """Whether it is of samples, and so depends on the sampling fields."""
        return self.of_samples is not None


class World(NamedTuple):
    """What a kind of data brings to an ablation.

    Attributes:
        config: the dataclass of its configs, whose fields say their `Role`.
        measures: what can be measured, by name.
        check: refuses a config that cannot be meant.
        problem: makes the problem of a group's config.
        unread: (config) -> why neither training nor sampling by it reads a field, by field; fields
            that they read are left out.
        meant: (config) -> the same with values in place of each None that stands for one.
        notes: names that are no fields though they might be, and what is there instead.
    """

    config: type
    measures: Mapping[str, Measure]
    check: Callable[[Any], None]
    problem: Callable[[Any], Problem]
    unread: Callable[[Any], Mapping[str, str]] = lambda config: {}
    meant: Callable[[Any], Any] = lambda config: config
    notes: Mapping[str, str] = {}

    @property
    def numbers(self) -> frozenset[str]:
        """Fields that may be traced."""
        return with_role(self.config, Role.NUMBER)

    @property
    def sampling(self) -> frozenset[str]:
        """Fields that a trained run is sampled by."""
        return with_role(self.config, Role.SAMPLING)

    @property
    def averages(self) -> frozenset[str]:
        """Fields that choose which average is sampled and judged."""
        return with_role(self.config, Role.AVERAGE)
