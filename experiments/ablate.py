"""Run a grid of choices and compare them, so that anyone gets the same table byte for byte.

    python -m experiments.ablate losses --run-dir runs/ablations/losses
    python -m experiments.ablate losses --only loss=sliced --run-dir runs/ablations/losses
    python -m experiments.ablate losses --shard 1/4 --run-dir SHARED    # on one of four machines
    python -m experiments.ablate my_package.my_module:ABLATION --run-dir runs/mine
    python -m experiments.ablate status | report | verify runs/ablations/losses
    python -m experiments.ablate status runs/mine --definition my_package.my_module:ABLATION

The same command goes on with what a folder lacks. Rows are trained, stored, sharded and verified in
groups that the definition fixes; see experiments/ablations.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import tyro

from experiments.ablations import judging, report, results, statistics, store
from experiments.ablations.catalogue import MAKERS
from experiments.ablations.definition import SEED, Ablation, Group, groups, record
from experiments.ablations.fields import replaced, show
from experiments.ablations.request import parse_only, parse_shard, reopen, resolve
from experiments.common import command, optimization
from experiments.common.command import Refusal
from jaxdiff import files
from jaxdiff.training import loop

Folder = Annotated[str, tyro.conf.Positional]
Definition = str | None


def command_of(name: str) -> Callable[..., None]:
    """Return the command of an ablation of the catalogue, or of `module:attribute`."""

    def run(
        run_dir: str,
        seeds: int | None = None,
        seed: int | None = None,
        preset: Literal["full", "smoke"] = "full",
        only: tuple[str, ...] = (),
        shard: str = "0/1",
        quiet: bool = False,
    ) -> None:
        """Run an ablation, or go on with it, and report what is done.

        Args:
            run_dir: Folder of the results; the same command on it goes on.
            seeds: How many seeds; as many as the preset has unless given.
            seed: The first of them.
            preset: smoke runs every part in seconds; your own has it if it is a mapping of both.
            only: Run the groups that hold AXIS=VALUE; several of one axis are alternatives.
            shard: i/n: every n-th group, from the i-th on; i counts from 0, or from 1.
            quiet: Show no progress bar.
        """
        ablation = resolve(name, preset, seeds, seed)
        chosen = store.chosen(ablation, parse_only(ablation, only), parse_shard(shard))
        if preset == "full":
            configs = [replaced(g.config, row) for g in chosen for row in g.rows()]
            judged = [(c.ema_decay if c.average is None else c.average, c) for c in configs]
            optimization.warn_of_start((decay, c.num_steps) for decay, c in judged)
        run_groups(
            command.path_of(run_dir), record(name, preset, ablation), ablation, chosen, quiet
        )

    if name in MAKERS:
        question, what = MAKERS[name]()["full"].question, (run.__doc__ or "").partition("\n")
        run.__doc__ = f"{question}\n{what[2]}"
    return run


def run_groups(
    directory: files.Path,
    resolved: dict[str, Any],
    ablation: Ablation,
    chosen: Sequence[Group],
    quiet: bool = True,
) -> None:
    """Run what is left of chosen groups and report all that is done.

    Args:
        directory: of the results.
        resolved: the record of the ablation.
        ablation: what to run.
        chosen: its groups, or some of them.
        quiet: show no progress bar.
    """
    ablation = store.claim(directory, resolved, ablation)
    resolved = store.require_lock(directory)
    left = [g for g in chosen if store.read_group(directory, ablation, g) is None]
    if not left and report.is_finished(directory, ablation):
        print(f"Report: {directory / command.REPORT}")
        return
    with stopping() as check, command.compiling_for(resolved["preset"]):
        for group in left:
            if store.read_group(directory, ablation, group) is not None:
                continue  # done elsewhere meanwhile
            with bar(group, quiet, check) as tick:
                result = judging.run_group(ablation, group, tick)
            store.write_group(directory, group, result)
            seconds = sum(result["seconds"].values())
            print(f"group {group.index}, {group.title}: {seconds:.1f} s", flush=True)
        count = report.write(directory, resolved, ablation)
    total = len(groups(ablation))
    if count < total:
        print(f"{count} of {total} groups are done.")
    if count:
        print(f"Report: {directory / command.REPORT}")


def status(directory: Folder, definition: Definition = None) -> None:
    """Say what is done in a folder and what is missing.

    Args:
        directory: Of an ablation.
        definition: module:NAME of the ablation, where it is one of your own.
    """
    path = command.path_of(directory, "the folder")
    resolved, ablation = reopen(path, definition)
    lines, corrupt, done, made = [], [], [], groups(ablation)
    for group in made:
        try:
            result = store.read_group(path, ablation, group)
            state = "missing" if result is None else f"{sum(result['seconds'].values()):.1f} s"
            done += [] if result is None else [group]
        except store.Corrupt as error:
            state = "corrupt"
            corrupt.append(str(error))
        lines.append(f"{group.index:4d}  {state:>9}  {group.title}")
    rows, total = (sum(len(group.pairs) for group in each) for each in (done, made))
    print(
        f"{resolved['name']}, preset {resolved['preset']}, {len(ablation.seed_values)} seeds: "
        f"{len(done)} of {len(made)} groups done, {rows} of {total} rows"
    )
    print("\n".join(lines))
    if corrupt:
        raise store.Corrupt("\n".join(corrupt))


def report_command(directory: Folder, definition: Definition = None) -> None:
    """Make the tables, figures and report of what is done.

    Args:
        directory: Of an ablation.
        definition: module:NAME of the ablation, where it is one of your own.
    """
    path = command.path_of(directory, "the folder")
    resolved, ablation = reopen(path, definition)
    if not report.write(path, resolved, ablation):
        raise Refusal(f"{directory} has no finished group yet. Run the ablation first.")
    print(f"Report: {path / command.REPORT}")


def verify(
    directory: Folder,
    num: int = 1,
    seed: int = 0,
    definition: Definition = None,
    quiet: bool = False,
) -> None:
    """Run a random sample of groups again and say whether each row reproduces exactly.

    Args:
        directory: Of an ablation.
        num: How many groups.
        seed: Of the choice.
        definition: module:NAME of the ablation, where it is one of your own.
        quiet: Show no progress bar.
    """
    if num < 1:
        raise Refusal(f"--num must be at least 1; got {num}.")
    path = command.path_of(directory, "the folder")
    resolved, ablation = reopen(path, definition)
    store.check_random(path, resolved)
    done = store.read_groups(path, ablation)
    if not done:
        raise Refusal(f"{directory} has no finished group yet. Run the ablation first.")
    again, elsewhere = dict(done), False
    sampled = sorted(random.Random(seed).sample(sorted(done), min(num, len(done))))
    made, here = groups(ablation), judging.environment()
    with stopping() as check, command.compiling_for(resolved["preset"]):
        for index in sampled:
            there = done[index]["environment"]
            if there != here:
                elsewhere = True
                names = [k for k in here if here[k] != there.get(k)]
                print(f"group {index} was made elsewhere: {', '.join(names)} differ")
            with bar(made[index], quiet, check) as tick:
                again[index] = judging.run_group(ablation, made[index], tick)
    wrong = 0
    for index in sampled:
        for old, new in zip(done[index]["rows"], again[index]["rows"], strict=True):
            names = [k for k in {**old, **new} if old.get(k) != new.get(k)]
            wrong += bool(names)
            told = "; ".join(f"{k}: there {old.get(k)}, again {new.get(k)}" for k in names)
            fields = [*ablation.varied, SEED]
            title = ", ".join(f"{f}={show(new[f])}" for f in fields)
            print(f"{'DIFFERS' if names else 'reproduces':>10}  {title}  {told}".rstrip())
    wrong += table_differs(path, ablation, again)
    if wrong:
        why = " Another machine or version rounds otherwise; see above." if elsewhere else ""
        if not judging.is_repeatable(here):
            why += f" On a GPU it needs XLA_FLAGS={judging.DETERMINISTIC}, both times."
        raise Refusal(f"{wrong} of what was checked in {directory} does not reproduce.{why}")
    print(f"{len(sampled)} of {len(done)} groups ran again: every row reproduces exactly.")


def table_differs(path: files.Path, ablation: Ablation, done: dict[int, Any]) -> int:
    """Count and print the lines of results.csv that are not those of the results."""
    rows = results.ordered_rows(ablation, done)
    summary = statistics.summarize(statistics.tabulate(ablation, rows))
    wanted = results.results_csv(ablation, rows, summary).splitlines()
    try:
        found = (path / results.RESULTS).read_bytes().decode(errors="replace").splitlines()
    except OSError as error:
        raise Refusal(f"{path / results.RESULTS} cannot be read: {error.strerror}.") from error
    wrong = [
        i for i in range(max(len(wanted), len(found))) if wanted[i : i + 1] != found[i : i + 1]
    ]
    for i in wrong:
        print(
            f"   DIFFERS  {results.RESULTS} line {i + 1}: {''.join(found[i : i + 1]) or 'missing'}"
        )
    return len(wrong)


# --- How it is carried out ------------------------------------------------------------------


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], None]]:
    """Yield a check that stops at Ctrl-C or SIGTERM, where nothing is half done.

    What is finished is stored already. A signal that broke into a compilation could crash it.
    """
    with loop.catch_signals() as stopped_by:

        def check() -> None:
            if stopped_by() is not None:
                raise KeyboardInterrupt

        yield check


@contextlib.contextmanager
def bar(group: Group, quiet: bool, check: Callable[[], None]) -> Iterator[Callable[[int], None]]:
    """Show the steps of a group on a terminal, and check between them."""
    from tqdm import tqdm

    disable = quiet or not sys.stderr.isatty()
    with tqdm(total=group.config.num_steps, disable=disable, desc=group.title, leave=False) as bar:

        def tick(count: int) -> None:
            bar.update(count)
            check()

        yield tick


def main(argv: list[str]) -> int:
    """Run the command line."""
    names = [*MAKERS, *(word for word in argv[:1] if ":" in word)]
    commands: dict[str, Callable[..., None]] = {name: command_of(name) for name in names}
    commands |= {"status": status, "report": report_command, "verify": verify}
    return command.run("ablate", commands, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
