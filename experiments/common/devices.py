"""How a run is carried out: devices, processes, logs. None of it changes the mathematics."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from experiments.common import options
from experiments.common.command import Refusal, refusing
from jaxdiff import files, training
from jaxdiff.training import distributed
from jaxdiff.training import run as runs
from jaxdiff.training.parallel import (
    Mode,
    make_mesh,
    mode_of_mesh,
    mode_of_one_device,
    mode_of_pmap,
)

ROWS = "rows_per_device"
"""What config.json calls the rows of a batch that a device took at a time at the first start."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Which devices and processes take part."""

    parallel: Literal["jit", "pmap", "mesh"] = "jit"
    """One device; all by jax.pmap; all as a mesh."""
    compilation_cache: str | None = None
    """Folder in which compiled programs are kept for the next start."""
    distributed: bool = False
    """Be one of several processes; the three below are left out where the cluster tells."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which one this is, from 0."""

    def start(self) -> None:
        """Check the options; join the other processes; before anything else of JAX."""
        if self.compilation_cache is not None:
            jax.config.update("jax_compilation_cache_dir", self.compilation_cache)
        of_processes = self.coordinator_address, self.num_processes, self.process_id
        if self.distributed:
            with refusing(ValueError, RuntimeError, say="--distributed: "):
                distributed.start(*of_processes)
        elif any(value is not None for value in of_processes):
            raise Refusal(
                "--coordinator-address, --num-processes and --process-id need --distributed."
            )

    def local(self) -> list[jax.Device]:
        """Return the devices of this process that sampling and evaluation use."""
        local = jax.local_devices()
        return local[:1] if self.parallel == "jit" else local


@dataclasses.dataclass(frozen=True)
class Running(Devices):
    """How a run is carried out; it may differ from one start to the next."""

    fsdp: int = 1
    """Devices that a state is split over; with mesh. 2 of 8 devices are a 4 x 2 mesh."""
    slices: int | None = None
    """Equal slices that a mesh takes the devices to be of, in their order, which the state is not
    split across; by default those of TPUs and GPUs that JAX finds. 1 splits it across all."""
    accumulate: int | None = None
    """Parts that the gradient of a batch is taken in, one after the other, to save memory; by
    default 1 or, where a run began on more devices, as many as keep its rows a device."""
    steps_per_call: int = 1
    """Updates in one dispatch: for accelerators; on a CPU a scanned convolution is slow."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do where a loss or gradient is NaN or infinite."""
    keep_last: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are kept for good."""
    keep_best: bool = False
    """Keep the checkpoint of the smallest mean loss too."""
    tensorboard: bool = False
    """Also log for TensorBoard."""
    profile_steps: int = 0
    """Steps of a profiler trace, after the first; its folder is `profile`."""

    def start(self) -> None:
        """Check the options; join the other processes; before anything else of JAX."""
        for name in ("fsdp", "slices", "accumulate", "steps_per_call", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
        if self.keep_last < 3:
            raise Refusal(f"--keep-last must be at least 3; got {self.keep_last}.")
        if self.profile_steps < 0:
            raise Refusal(f"--profile-steps must be at least 0; got {self.profile_steps}.")
        if self.fsdp > 1 and self.parallel != "mesh":
            raise Refusal(f"--fsdp {self.fsdp} needs --parallel mesh; got {self.parallel}.")
        if self.slices is not None and self.parallel != "mesh":
            raise Refusal(f"--slices {self.slices} needs --parallel mesh; got {self.parallel}.")
        if self.distributed and self.parallel == "jit":
            raise Refusal("--distributed needs --parallel pmap or mesh; jit uses one device.")
        super().start()

    def mode(self, batch_size: int, directory: files.Path | None = None) -> Mode:
        """Return the parallel mode of batches of a size, or refuse.

        Args:
            batch_size: of the global batch.
            directory: of the run. Where more devices began it and nothing is said of parts, the
                batch is taken in as few as keep the rows of a device as few as they were.
        """
        mode = self._mode()._replace(steps_per_call=self.steps_per_call)
        parts = mode.num_shards * (self.accumulate or 1)
        if batch_size % parts:
            shares = f" in {self.accumulate} parts" if (self.accumulate or 1) > 1 else ""
            raise Refusal(
                f"--batch-size must be a multiple of {parts}, for {mode.num_shards} devices"
                f"{shares}; got {batch_size}.{sharing(batch_size, mode.num_shards)}"
            )
        if self.accumulate is not None:
            return mode._replace(accumulate=self.accumulate)
        rows, before = batch_size // mode.num_shards, _rows_before(directory)
        accumulate = parts_for(rows, before)
        if accumulate > 1 and distributed.is_main():
            print(
                f"The batch is taken in {accumulate} parts, for {rows // accumulate} rows a device "
                f"at a time: the run began with {before}. --accumulate 1 takes all {rows} at once.",
                file=sys.stderr,
            )
        return mode._replace(accumulate=accumulate)

    def _mode(self) -> Mode:
        if self.parallel == "jit":
            return mode_of_one_device()
        if self.parallel == "pmap":
            return mode_of_pmap()
        return mode_of_mesh(self.mesh(), fsdp=self.fsdp > 1)

    def mesh(self) -> jax.sharding.Mesh:
        """Return the mesh of all devices, or refuse."""
        count = jax.device_count()
        if count % self.fsdp:
            raise Refusal(f"--fsdp must divide the {count} devices; got {self.fsdp}.")
        with options.naming(("fsdp", "slices")):
            return make_mesh(count // self.fsdp, self.fsdp, slices=self.slices)

    def keep(self) -> training.Keep:
        """Return which checkpoints stay."""
        return training.Keep(self.keep_last, self.keep_every, "loss" if self.keep_best else None)

    def report(
        self,
        *,
        progress: bool,
        begun: Callable[[], object],
        repeat: Callable[[int], Mapping[str, Any]],
    ) -> training.Report:
        """Return what a run says of itself; for the arguments see `training.Report`."""
        return training.Report(progress, self.tensorboard, self.profile_steps, repeat, begun)

    def agree(self, config: Mapping[str, Any]) -> None:
        """Refuse processes that were started for other runs, or otherwise; all must ask together.

        Args:
            config: as JSON holds it; each host has a `data_dir` of its own.
        """
        own = ("process_id", "compilation_cache", "coordinator_address")
        shared = {name: value for name, value in self.record().items() if name not in own}
        with refusing(ValueError, say="--distributed: "):
            distributed.agree(
                config=json.dumps({**config, "data_dir": None}, sort_keys=True),
                running=json.dumps(shared),
            )

    def record(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return dataclasses.asdict(self)

    def began(self, batch_size: int, mode: Mode) -> dict[str, Any]:
        """Return what the record of a run says of its first start, that of `mode`.

        It has the rows of a batch that a device takes at a time, for starts on fewer devices.
        """
        parts = mode.num_shards * (mode.accumulate or 1)
        return {**self.record(), ROWS: batch_size // parts}


def parts_for(rows: int, most: int | None) -> int:
    """Return the fewest equal parts of the rows of a device that have at most so many each.

    Args:
        rows: of a device, in a batch.
        most: None for any number.
    """
    fitting = (n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= (most or rows))
    return next(fitting)


def sharing(batch_size: int, count: int) -> str:
    """Say which numbers of devices next to `count` share a batch equally."""
    fewer = next(n for n in range(count, 0, -1) if batch_size % n == 0)
    more = next((n for n in range(count, batch_size + 1) if batch_size % n == 0), fewer)
    if count in (fewer, more):
        return ""
    return f" {f'{fewer} or {more}' if more != fewer else fewer} devices would share it."


def _rows_before(directory: files.Path | None) -> int | None:
    """Return how many rows a device took when a run began; None where no record says it."""
    record = None if directory is None else runs.read_record(directory)
    running = (record or {}).get("running")
    rows = running.get(ROWS) if isinstance(running, dict) else None
    return rows if isinstance(rows, int) and rows > 0 else None
