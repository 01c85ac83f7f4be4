"""An update as every parallel mode compiles it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxdiff.training.state import frozen_of, with_frozen, without_frozen
from jaxdiff.training.update import Gather, Transferable, Update, scan_steps
from jaxdiff.typing import Batch, Key, PyTree


class Steps(NamedTuple):
    """How the steps of a run are carried out.

    Attributes:
        one: the compiled update.
        several: the compiled update of several batches in one call; for `per_call` > 1.
        per_call: updates a call.
        place: (batch, scanned) -> the batch on its devices.
        skip_nonfinite: whether the update leaves a state as it was where a step is not finite, so
            that a run may go on.
    """

    one: Update
    several: Update | None = None
    per_call: int = 1
    place: Callable[..., Batch] = lambda batch, scanned: batch
    skip_nonfinite: bool = False


class Program:
    """An update as it is compiled: told where it runs, what is frozen apart from the rest.

    A plain function may change what it likes, and is given and gives its state whole.
    """

    def __init__(
        self,
        update: Update,
        *,
        axis_name: str | None = None,
        scanned: bool = False,
        gather: Gather | None = None,
    ) -> None:
        self._apart = isinstance(update, Transferable)
        if isinstance(update, Transferable):
            update = update.over(axis_name)
            update = update if gather is None else update.gathered(gather)
        self._update = scan_steps(update) if scanned else update
        self.__name__ = "update"

    def __call__(self, state: PyTree, frozen: PyTree, key: Key, batch: Batch) -> Any:
        """Make the step, to be compiled; of a state without what is frozen, unless plain."""
        if self._apart:
            state = with_frozen(state, frozen)
        new, metrics = self._update(state, key, batch)
        return without_frozen(new) if self._apart else new, metrics

    def compiled(self, call: Callable[..., Any]) -> Update:
        """Return the update that calls what was compiled of it."""

        def step(state: PyTree, key: Key, batch: Batch) -> Any:
            if not self._apart:
                return call(state, (), key, batch)
            new, metrics = call(without_frozen(state), frozen_of(state), key, batch)
            return with_frozen(new, frozen_of(state)), metrics

        return step
