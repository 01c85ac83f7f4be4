"""How a run is carried out: devices, processes, logs. None of it changes the mathematics."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from experiments.common.command import Refusal, refusing
from jaxdiff import training
from jaxdiff.training import distributed
from jaxdiff.training.parallel import (
    Mode,
    make_mesh,
    mode_of_mesh,
    mode_of_one_device,
    mode_of_pmap,
)


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
    accumulate: int = 1
    """Parts that the gradient of a batch is taken in, one after the other, to save memory."""
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
        for name in ("fsdp", "accumulate", "steps_per_call", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
        if self.keep_last < 3:
            raise Refusal(f"--keep-last must be at least 3; got {self.keep_last}.")
        if self.profile_steps < 0:
            raise Refusal(f"--profile-steps must be at least 0; got {self.profile_steps}.")
        if self.fsdp > 1 and self.parallel != "mesh":
            raise Refusal(f"--fsdp {self.fsdp} needs --parallel mesh; got {self.parallel}.")
        if self.distributed and self.parallel == "jit":
            raise Refusal("--distributed needs --parallel pmap or mesh; jit uses one device.")
        super().start()

    def mode(self, batch_size: int) -> Mode:
        """Return the parallel mode of batches of a size, or refuse."""
        mode = self._mode()._replace(accumulate=self.accumulate, steps_per_call=self.steps_per_call)
        parts = mode.num_shards * self.accumulate
        if batch_size % parts:
            shares = f" in {self.accumulate} parts" if self.accumulate > 1 else ""
            raise Refusal(
                f"--batch-size must be a multiple of {parts}, for {mode.num_shards} devices"
                f"{shares}; got {batch_size}."
            )
        return mode

    def _mode(self) -> Mode:
        if self.parallel == "jit":
            return mode_of_one_device()
        if self.parallel == "pmap":
            return mode_of_pmap()
        count = jax.device_count()
        if count % self.fsdp:
            raise Refusal(f"--fsdp must divide the {count} devices; got {self.fsdp}.")
        mesh = make_mesh(count // self.fsdp, self.fsdp)
        return mode_of_mesh(mesh, fsdp=self.fsdp > 1)

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
