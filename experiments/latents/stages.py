"""The stages of a run, each in a folder of its own below the run's, each trained by the trainer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.common import command, optimization, options
from experiments.common.averages import NO_CHOICE, Average
from experiments.common.batches import batches_of, repeating
from experiments.common.command import Refusal
from experiments.common.devices import Running
from experiments.images import sources as image_sources
from jaxdiff import files, training
from jaxdiff.data import Records
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import Restored
from jaxdiff.training.trainer import open_checkpoints
from jaxdiff.typing import PyTree

FREE = ("num_steps", "data_dir", "checkpoint_every", "log_every", "remat", "eval_examples")
"""Fields of the stages' configs that stand outside their hash."""


class Stage(NamedTuple):
    """One of the stages.

    Attributes:
        name: of its subcommand.
        folder: below that of the run; what it writes is there.
        config: the type of its config, a dataclass.
    """

    name: str
    folder: str
    config: Any

    def at(self, run_dir: str | files.Path) -> files.Path:
        """Return its folder in a run."""
        return command.path_of(run_dir) / self.folder

    def remedy(self, run_dir: str | files.Path) -> str:
        """Say what makes it."""
        said = f"python -m experiments.latents {self.name} --run-dir {run_dir}"
        return f" Make it first:\n  {said}"

    def record_of(self, config: Any) -> dict[str, Any]:
        """Return a config as JSON holds it."""
        return options.as_json(options.without_later(config))

    def config_of(self, record: Mapping[str, Any]) -> Any:
        """Return the config of what :meth:`record_of` gave.

        Raises:
            Refusal: if it has a field that is none of a config, or its values cannot be meant.
        """
        known = self.defaults()
        unknown = record.keys() - known.keys()
        if unknown:
            raise Refusal(
                "This run was written by another version of the experiment: its config has "
                f"{', '.join(sorted(unknown))}."
            )
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in (known | dict(record)).items()
        }
        config = self.config(**values)
        options.judge(config)
        return config

    def defaults(self) -> dict[str, Any]:
        """Return the values of fields that a record lacks, as JSON holds them."""
        return options.as_json(vars(self.config()))

    def reconcile(self, directory: files.Path, config: Any) -> Any:
        """Return the config of a run that goes on, or of a new one; refuse another's folder."""
        asked = self.record_of(config)
        found = runs.reconcile(
            directory, asked, free=FREE, grows="num_steps", defaults=self.defaults()
        )
        config = self.config_of(found)
        return dataclasses.replace(config, decay_steps=config.decay_steps or config.num_steps)

    def asked_again(self, record: Mapping[str, Any]) -> Any:
        """Return the config by which a command line would ask for the run of a record again.

        Raises:
            Refusal: if it has a field that is none of a config, or a value that its field never
                takes.
        """
        config = self.config_of(record)
        if getattr(config, "data_dir", None) is None:
            return config
        given = {"data_dir": None}
        if config.data == image_sources.FOLDER:
            given["data"] = config.data_dir
        return dataclasses.replace(config, **given)

    def asked(self, argv: Sequence[str], presets: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return what options that are not given say: see `command.defaults_of`."""
        return command.defaults_of(argv, presets, self.asked_again, within=self.folder)

    def recorded(self, run_dir: str | files.Path) -> dict[str, Any]:
        """Return all that its folder says of its first start."""
        return runs.read_record(self.at(run_dir)) or {}

    def hash_of(self, config: Mapping[str, Any]) -> str:
        """Return what names a config, as JSON holds it."""
        return runs.config_hash(config, free=FREE)

    def restore(
        self, run_dir: str | files.Path, average: Average = NO_CHOICE
    ) -> tuple[Any, Restored, PyTree]:
        """Return the config, the newest sound checkpoint and an average of what was trained.

        Raises:
            Refusal: if it was not, naming what does it.
        """
        folder, remedy = self.at(run_dir), self.remedy(run_dir)
        record = runs.read_record(command.existing(folder, remedy=remedy))
        with open_checkpoints(folder) as checkpoints:
            restored = None if record is None else checkpoints.restore()
            if record is None or restored is None:
                raise Refusal(f"--run-dir {folder} holds no checkpoint yet.{remedy}")
            config = self.config_of(record["config"])
            return config, restored, average.of(config, restored.state["ema"], checkpoints)


class Training(NamedTuple):
    """What is trained in a stage.

    Attributes:
        update: of its state.
        init_params: makes the parameters; may be traced.
        records: what batches are drawn from.
        frozen: what nothing changes.
    """

    update: Any
    init_params: Callable[[], PyTree]
    records: Records
    frozen: PyTree = ()


def fit(
    stage: Stage,
    directory: files.Path,
    config: Any,
    trained: Training,
    running: Running,
    *,
    also: Mapping[str, Any],
    progress: bool,
) -> training.TrainState:
    """Train what is left of a stage; return its state.

    Args:
        stage: which.
        directory: its folder.
        config: of the stage.
        trained: what is trained.
        running: how.
        also: what else its record says.
        progress: show a progress bar.

    Raises:
        Refusal: if the batches cannot be as the config says.
    """
    record, records = stage.record_of(config), trained.records
    mode = running.mode(config.batch_size, directory)

    running.agree(record)
    return training.fit(
        directory,
        lambda: trained.update.init(trained.init_params()),
        trained.update,
        batches_of(records, config),
        key=jax.random.key(config.seed),
        num_steps=config.num_steps,
        cadence=optimization.cadence(config),
        mode=mode,
        frozen=trained.frozen,
        record=training.Record(
            record,
            FREE,
            stage.defaults(),
            {"running": running.began(config.batch_size, mode), **also},
        ),
        keep=running.keep(),
        report=running.report(
            progress=progress,
            begun=lambda: optimization.warn_of_config(config),
            repeat=repeating(records, config),
        ),
    )
