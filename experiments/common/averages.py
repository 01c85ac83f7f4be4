"""Which average of the parameters samples and is judged: one that was kept, or one made of them."""

import dataclasses
from collections.abc import Mapping

from experiments.common.command import Refusal, refusing
from experiments.common.evaluations import MAIN
from experiments.common.optimization import TrainingConfig, ema_decays, main_average
from jaxdiff.training import ema
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints
from jaxdiff.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Average:
    """The choice of an average; by default that of the config's `ema_decay`."""

    ema: str | None = None
    """Another average that was kept: a decay such as 0.999, or a width such as std_0.1."""
    ema_std: float | None = None
    """Width of a power-function average made of those kept in the checkpoints."""

    @property
    def name(self) -> str:
        """What reports call it."""
        return (self.ema or MAIN) if self.ema_std is None else f"std {self.ema_std:g}, made"

    def of(self, config: TrainingConfig, averages: PyTree, checkpoints: Checkpoints) -> PyTree:
        """Return the chosen average of a run, or refuse."""
        decays = ema_decays(config)
        names = list(decays) if isinstance(decays, Mapping) else [MAIN]
        if self.ema is not None and self.ema_std is not None:
            raise Refusal("--ema and --ema-std choose one average each; give one of them.")
        if self.ema_std is not None:
            return self._made(checkpoints)
        if self.ema is None or self.ema == MAIN:
            return main_average(config, averages)
        if self.ema not in names:
            raise Refusal(
                f"--ema must be one of {', '.join(names)}; got {self.ema}. Training keeps others "
                "by --more-ema-decays and --ema-stds."
            )
        return averages[self.ema]

    def _made(self, checkpoints: Checkpoints) -> PyTree:
        assert self.ema_std is not None
        found, trees = [], []
        for step in checkpoints.sound_steps():
            try:
                restored = checkpoints.restore(step=step)
            except CheckpointError:
                if step in checkpoints.steps():
                    raise
                continue  # a run at work has saved newer ones and deleted it
            assert restored is not None
            for name, tree in restored.state["ema"].items():
                if name.startswith("std_"):
                    found.append((step, name))
                    trees.append(tree)
        if not found:
            raise Refusal("--ema-std needs a run trained with --ema-stds, such as 0.05 0.1.")
        with refusing(ValueError, say="--ema-std: "):
            weights = ema.post_hoc_weights(
                [step for step, _ in found],
                [float(name.removeprefix("std_")) for _, name in found],
                found[-1][0],
                self.ema_std,
            )
        return ema.combine(weights, trees)


NO_CHOICE = Average()
