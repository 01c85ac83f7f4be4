"""What every experiment's command line shares: subcommands, presets, refusals."""

import atexit
import contextlib
import functools
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import jax

from jaxdiff import files
from jaxdiff.data import NotPreparedError, UnreadableError
from jaxdiff.training import distributed, folders, lock, signals
from jaxdiff.training import run as runs
from jaxdiff.training.checkpoint import CheckpointError
from jaxdiff.training.loop import STOPPED_EXIT_CODE, NotFinite, Stopped
from jaxdiff.training.run import RunError

REPORT = "report.md"
EXPERIMENT, PRESET = "experiment", "preset"
"""What config.json calls the command and the preset that a run was begun with."""
DATA_ERRORS = (NotPreparedError, UnreadableError)

ConfigT = TypeVar("ConfigT")
CommandT = TypeVar("CommandT", bound=Callable[..., None])


def begun_by(experiment: str, preset: str) -> dict[str, str]:
    """Return what the record of a run says of the command line that began it."""
    return {EXPERIMENT: experiment, PRESET: preset}


class Refusal(Exception):
    """A command cannot be carried out as asked; the message says what would do."""


@contextlib.contextmanager
def refusing(*errors: type[Exception], say: str = "") -> Iterator[None]:
    """Turn errors of what the user asked for into refusals; others keep their traceback."""
    try:
        yield
    except errors as error:
        raise Refusal(f"{say}{error}") from error


_claims = contextlib.ExitStack()
"""The run directories that this program writes, until its command ends."""
atexit.register(lambda: _claims.close())

_taking_over = False
_TAKE_OVER = (
    "Of a folder in a store that another process writes, or is said to until its lease ends: go on "
    "at once. That process, if it lives, stops before it writes again."
)


def path_of(text: str | files.Path, option: str = "--run-dir") -> files.Path:
    """Return the path or the URL that an option gives; refuse one of no store that can be read."""
    with refusing(ValueError, ImportError, say=f"{option} cannot be used: "):
        return files.to_path(text)


def claim(run_dir: str) -> files.Path:
    """Return the folder of a run that a command is to write, as the only process until it ends.

    To be called before anything costly, but after `Devices.start`.
    """
    return _claims.enter_context(lock.writing(run_dir, take_over=_taking_over))


def writes(command: CommandT) -> CommandT:
    """Give a command that claims its run directory the option `--take-over`."""
    import tyro

    kind = Annotated[bool, tyro.conf.arg(help=_TAKE_OVER)]
    option = inspect.Parameter(
        "take_over", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind
    )
    signature = inspect.signature(command)

    @functools.wraps(command)
    def writing(*args: Any, take_over: bool = False, **options: Any) -> None:
        global _taking_over
        before, _taking_over = _taking_over, take_over
        try:
            command(*args, **options)
        finally:
            _taking_over = before

    said: Any = writing
    said.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
    del said.__wrapped__  # where tyro would look for what it says of the option
    said.__annotations__ = {**command.__annotations__, option.name: kind}
    return said


def existing(run_dir: str | files.Path, option: str = "--run-dir", remedy: str = "") -> files.Path:
    """Return the folder of a run that a command is to read, or refuse where there is none."""
    return folders.existing_run(run_dir, option, remedy)


def check_seed(seed: int, option: str = "--seed") -> None:
    """Refuse a seed that keys cannot tell from another: they hold 32 bits of it."""
    if not 0 <= seed < 2**32:
        raise Refusal(f"{option} must lie in 0..{2**32 - 1}; got {seed}.")


def open_run(run_dir: str, config: Mapping[str, Any]) -> files.Path | None:
    """Claim a folder for what a config says; return it, or None where that is done already.

    The report is what a command writes last, so a folder that holds it is finished. A folder of
    another config is refused, and one that another process writes.
    """
    directory = claim(run_dir)
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
    name = word_of(argv, "preset")
    return presets.get(name or "", next(iter(presets.values())))


def defaults_of(
    argv: Sequence[str],
    presets: Mapping[str, ConfigT],
    asked_again: Callable[[Mapping[str, Any]], ConfigT],
    within: str = "",
) -> tuple[ConfigT, Any]:
    """Return what the options that are not given say, and the name of the preset that it is of.

    That is what `--preset` names or, without it, what the run in `--run-dir` was begun with; in a
    new folder the first preset. A record that cannot be read gives that too: the command then
    refuses it, with its reasons.

    Args:
        argv: the command line.
        presets: configs by name.
        asked_again: makes the config of a record's "config", as a command line would ask for it.
        within: the folder of the run, below that one.
    """
    name, first = word_of(argv, "preset"), next(iter(presets))
    run_dir = word_of(argv, "run-dir")
    if name is None and run_dir:
        with contextlib.suppress(RunError, Refusal, TypeError, ValueError, ImportError):
            record = runs.read_record(files.to_path(run_dir) / within)
            if record is not None:
                begun = record.get(PRESET)
                return asked_again(record["config"]), begun if begun in presets else first
    chosen = name if name is not None and name in presets else first
    return presets[chosen], chosen


def word_of(argv: Sequence[str], option: str) -> str | None:
    """Return what an option is given on a command line, None where it is not."""
    found, names = None, [f"--{option}", f"--{option.replace('-', '_')}"]
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in names and equals:
            found = value
        elif word in names and i + 1 < len(argv):
            found = argv[i + 1]
    return found


def run(
    name: str,
    commands: Callable[..., None] | Mapping[str, Callable[..., None]],
    argv: Sequence[str],
) -> int:
    """Run a command, or the subcommand that `argv` asks for; return the exit code.

    A refusal prints a few lines and gives 1, a stop by a signal gives `STOPPED_EXIT_CODE`;
    an internal error keeps its traceback.
    """
    global _claims
    outer, _claims = _claims, contextlib.ExitStack()
    with signals.interrupting():
        try:
            code, together = _run(name, commands, argv)
        except Exception:
            if not distributed.is_started():
                raise
            traceback.print_exc()
            code, together = 1, False
        finally:
            _claims.close()
            _claims = outer
        if together:
            distributed.wait_for_all()
        elif distributed.is_started():
            # The others would wait for it at JAX's own end, where it would say that all is well.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code


def _run(
    name: str,
    commands: Callable[..., None] | Mapping[str, Callable[..., None]],
    argv: Sequence[str],
) -> tuple[int, bool]:
    """Return the exit code, and whether all processes have come to the same end."""
    import tyro

    warnings.filterwarnings("ignore", module="tyro")
    prog = f"python -m experiments.{name}"
    try:
        if callable(commands):
            tyro.cli(commands, prog=prog, args=list(argv))
        else:
            tyro.extras.subcommand_cli_from_dict(dict(commands), prog=prog, args=list(argv))
        return 0, True
    except Stopped as stopped:
        print(f"{stopped} Run the same command to go on.", file=sys.stderr)
        return STOPPED_EXIT_CODE, True
    except KeyboardInterrupt:
        print("Interrupted. Run the same command to go on.", file=sys.stderr)
        return STOPPED_EXIT_CODE, False
    except (Refusal, RunError, CheckpointError, NotFinite, *DATA_ERRORS) as refusal:
        print(f"error: {refusal}", file=sys.stderr)
    except OSError as error:  # of a disk, a path, a right; without a number it is of our making
        if error.errno is None:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {where}{error.strerror or error}.", file=sys.stderr)
    return 1, False
