"""What every experiment's command line shares: subcommands, presets, refusals."""

import contextlib
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxdiff.data import NotPreparedError
from jaxdiff.training import distributed
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import CheckpointError
from jaxdiff.training.loop import STOPPED_EXIT_CODE, NotFinite, Stopped
from jaxdiff.training.run import RunError

REPORT = "report.md"


class Refusal(Exception):
    """A command cannot be carried out as asked; the message says what would do."""


@contextlib.contextmanager
def refusing(*errors: type[Exception], say: str = "") -> Iterator[None]:
    """Turn errors of what the user asked for into refusals; others keep their traceback."""
    try:
        yield
    except errors as error:
        raise Refusal(f"{say}{error}") from error


def open_run(run_dir: str, config: Mapping[str, Any]) -> Path | None:
    """Claim a folder for what a config says; return it, or None where that is done already.

    The report is what a command writes last, so a folder that holds it is finished. A folder of
    another config is refused.
    """
    directory = Path(run_dir)
    runs.reconcile(directory, config)
    runs.write_record(directory, config)
    if (directory / REPORT).exists():
        print(f"Report: {directory / REPORT}")
        return None
    return directory


@contextlib.contextmanager
def compiling_for(preset: str) -> Iterator[None]:
    """Compile fast rather than well in the smoke preset, which compiles more than it runs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before or preset == "smoke")
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def preset_of(argv: Sequence[str], presets: Mapping[str, Any]) -> Any:
    """Return the preset that `--preset` names, whose values the other options then change."""
    name = next(iter(presets))
    for i, word in enumerate(argv):
        if word == "--preset" and i + 1 < len(argv):
            name = argv[i + 1]
        elif word.startswith("--preset="):
            name = word.removeprefix("--preset=")
    return presets.get(name, next(iter(presets.values())))


def check_bounds(config: Any, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Refuse a config with a number outside its bounds, or one that is not finite."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not (low <= value <= high and math.isfinite(value)):
            limits = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g}"
            raise Refusal(f"--{name.replace('_', '-')} must be {limits}; got {value}.")
    decay_steps = getattr(config, "decay_steps", None)
    if decay_steps is not None and decay_steps < 1:
        raise Refusal(f"--decay-steps must be at least 1; got {decay_steps}.")


def run(
    name: str,
    commands: Callable[..., None] | Mapping[str, Callable[..., None]],
    argv: Sequence[str],
) -> int:
    """Run a command, or the subcommand that `argv` asks for; return the exit code.

    A refusal prints a few lines and gives 1, a stop by a signal gives `STOPPED_EXIT_CODE`;
    an internal error keeps its traceback.
    """
    import tyro

    warnings.filterwarnings("ignore", module="tyro")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C does; the loop saves instead
        prog = f"python -m experiments.{name}"
        if callable(commands):
            tyro.cli(commands, prog=prog, args=list(argv))
        else:
            tyro.extras.subcommand_cli_from_dict(dict(commands), prog=prog, args=list(argv))
    except Stopped as stopped:
        print(f"{stopped} Run the same command to go on.", file=sys.stderr)
        distributed.wait_for_all()
        return STOPPED_EXIT_CODE
    except KeyboardInterrupt:
        print("Interrupted. Run the same command to go on.", file=sys.stderr)
        return _alone(STOPPED_EXIT_CODE)
    except (Refusal, RunError, CheckpointError, NotPreparedError, NotFinite) as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return _alone(1)
    except Exception:
        if not distributed.is_started():
            raise
        traceback.print_exc()
        return _alone(1)
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)
    distributed.wait_for_all()
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _alone(code: int) -> int:
    """Return the exit code; of several processes, end here and now.

    The others would wait for this one at JAX's own end, where it would say that all is well.
    """
    if distributed.is_started():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
