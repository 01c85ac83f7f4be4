"""Run a grid of choices and compare them, so that anyone gets the same table byte for byte.

    python -m experiments.ablate losses --run-dir runs/ablations/losses
    python -m experiments.ablate losses --only loss=sliced --run-dir runs/ablations/losses
    python -m experiments.ablate losses --shard 1/4 --run-dir SHARED    # on one of four machines
    python -m experiments.ablate my_package.my_module:ABLATION --run-dir runs/mine
    python -m experiments.ablate status | report | verify runs/ablations/losses

The same command goes on with what a folder lacks. Rows are trained, stored, sharded and verified in
groups that the definition fixes; see experiments/ablations.
"""

import contextlib
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import command
from experiments.ablations import judging, report, statistics, store
from experiments.ablations.catalogue import MAKERS, find
from experiments.ablations.definition import SEED, Ablation, Group, groups, near, record, show
from experiments.command import Refusal, refusing
from jaxdiff.training import loop

Folder = Annotated[str, tyro.conf.Positional]


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
            preset: How much.
            only: Run the groups that hold AXIS=VALUE; several of one axis are alternatives.
            shard: i/n: every n-th group, from the i-th on; i counts from 0, or from 1.
            quiet: Show no progress bar.
        """
        ablation = resolve(name, preset, seeds, seed)
        chosen = store.chosen(ablation, parse_only(ablation, only), parse_shard(shard))
        resolved, tag = record(name, preset, ablation), shard.replace("/", "of")
        run_groups(Path(run_dir), resolved, ablation, chosen, tag, quiet)

    if name in MAKERS:
        question, what = MAKERS[name]()["full"].question, (run.__doc__ or "").partition("\n")
        run.__doc__ = f"{question}\n{what[2]}"
    return run


def run_groups(
    directory: Path,
    resolved: Mapping[str, Any],
    ablation: Ablation,
    chosen: Sequence[Group],
    tag: str = "",
    quiet: bool = True,
) -> None:
    """Run what is left of chosen groups and report all that is done.

    Args:
        directory: of the results.
        resolved: the record of the ablation.
        ablation: what to run.
        chosen: its groups, or some of them.
        tag: tells machines that write to one directory from each other.
        quiet: show no progress bar.
    """
    store.claim(directory, resolved, tag)
    left = [g for g in chosen if not store.group_path(directory, g.index).exists()]
    if not left and report.is_finished(directory, ablation):
        print(f"Report: {directory / command.REPORT}")
        return
    with stopping() as check, command.compiling_for(resolved["preset"]):
        for group in left:
            if store.group_path(directory, group.index).exists():  # done elsewhere meanwhile
                continue
            with bar(group, quiet, check) as tick:
                result = judging.run_group(ablation, group, tick)
            store.write_group(directory, group, result, tag)
            seconds = sum(result["seconds"].values())
            print(f"group {group.index}, {group.title}: {seconds:.1f} s", flush=True)
        count = report.write(directory, resolved, ablation, tag)
    total = len(groups(ablation))
    if count < total:
        print(f"{count} of {total} groups are done.")
    if count:
        print(f"Report: {directory / command.REPORT}")


def status(directory: Folder) -> None:
    """Say what is done in a folder and what is missing.

    Args:
        directory: Of an ablation.
    """
    resolved, ablation = reopen(Path(directory))
    done, made = store.read_groups(Path(directory), ablation), groups(ablation)
    rows = sum(len(result["rows"]) for result in done.values())
    total = sum(len(group.members) * len(group.samplings) for group in made)
    print(
        f"{resolved['name']}, preset {resolved['preset']}, {len(ablation.seed_values)} seeds: "
        f"{len(done)} of {len(made)} groups done, {rows} of {total} rows"
    )
    for group in made:
        result = done.get(group.index)
        state = "missing" if result is None else f"{sum(result['seconds'].values()):.1f} s"
        print(f"{group.index:4d}  {state:>9}  {group.title}")


def report_command(directory: Folder) -> None:
    """Make the tables, figures and report of what is done.

    Args:
        directory: Of an ablation.
    """
    resolved, ablation = reopen(Path(directory))
    if not report.write(Path(directory), resolved, ablation):
        raise Refusal(f"{directory} has no finished group yet. Run the ablation first.")
    print(f"Report: {Path(directory) / command.REPORT}")


def verify(directory: Folder, num: int = 1, seed: int = 0, quiet: bool = False) -> None:
    """Run a random sample of groups again and say whether each row reproduces exactly.

    Args:
        directory: Of an ablation.
        num: How many groups.
        seed: Of the choice.
        quiet: Show no progress bar.
    """
    if num < 1:
        raise Refusal(f"--num must be at least 1; got {num}.")
    path = Path(directory)
    resolved, ablation = reopen(path)
    done = store.read_groups(path, ablation)
    if not done:
        raise Refusal(f"{directory} has no finished group yet. Run the ablation first.")
    again = dict(done)
    sampled = sorted(random.Random(seed).sample(sorted(done), min(num, len(done))))
    made, here = groups(ablation), judging.environment()
    with stopping() as check, command.compiling_for(resolved["preset"]):
        for index in sampled:
            there = done[index]["environment"]
            if there != here:
                names = [k for k in here if here[k] != there.get(k)]
                print(f"group {index} was made elsewhere: {', '.join(names)} differ")
            with bar(made[index], quiet, check) as tick:
                again[index] = judging.run_group(ablation, made[index], tick)
    wrong = 0
    for index in sampled:
        for old, new in zip(done[index]["rows"], again[index]["rows"], strict=False):
            names = [k for k in {**old, **new} if old.get(k) != new.get(k)]
            wrong += bool(names)
            told = "; ".join(f"{k}: there {old.get(k)}, again {new.get(k)}" for k in names)
            fields = [*ablation.varied, SEED]
            title = ", ".join(f"{f}={show(new[f])}" for f in fields)
            print(f"{'DIFFERS' if names else 'reproduces':>10}  {title}  {told}".rstrip())
        if len(done[index]["rows"]) != len(again[index]["rows"]):
            wrong += 1
            print(f"   DIFFERS  group {index} has {len(done[index]['rows'])} rows")
    wrong += table_differs(path, ablation, again)
    if wrong:
        raise Refusal(f"{wrong} of what was checked in {directory} does not reproduce.")
    print(f"{len(sampled)} of {len(done)} groups ran again: every row reproduces exactly.")


def table_differs(path: Path, ablation: Ablation, results: dict[int, Any]) -> int:
    """Count and print the lines of results.csv that are not those of the results."""
    rows = store.ordered_rows(ablation, results)
    summary = statistics.summarize(statistics.tabulate(ablation, rows))
    wanted = store.results_csv(ablation, rows, summary).splitlines()
    try:
        found = (path / store.RESULTS).read_text().splitlines()
    except OSError as error:
        raise Refusal(f"{path / store.RESULTS} cannot be read: {error.strerror}.") from error
    wrong = [
        i for i in range(max(len(wanted), len(found))) if wanted[i : i + 1] != found[i : i + 1]
    ]
    for i in wrong:
        print(f"   DIFFERS  {store.RESULTS} line {i + 1}: {''.join(found[i : i + 1]) or 'missing'}")
    return len(wrong)


# --- What was asked for ---------------------------------------------------------------------


def resolve(name: str, preset: str, seeds: int | None, seed: int | None) -> Ablation:
    """Return the ablation that is asked for, or refuse it before anything trains."""
    with refusing(ValueError, TypeError):
        ablation = find(name, preset)
        if seeds is not None and seeds < 1:
            raise Refusal(f"--seeds must be at least 1; got {seeds}.")
        if seed is not None and seed < 0:
            raise Refusal(f"--seed must be at least 0; got {seed}.")
        if seeds is not None or seed is not None:
            axes = {f: v for f, v in ablation.axes.items() if f != SEED}
            first = ablation.base.seed if seed is None else seed
            ablation = dataclasses.replace(
                ablation,
                base=dataclasses.replace(ablation.base, seed=first),
                axes=axes,
                seeds=seeds or len(ablation.seed_values),
            )
    ablation.check()
    return ablation


def reopen(directory: Path) -> tuple[dict[str, Any], Ablation]:
    """Return what a folder is locked for, as a record and as an ablation of today's code."""
    resolved = store.require_lock(directory)
    ablation = find(resolved["name"], resolved["preset"])
    seeds, axes = resolved["seeds"], {f: v for f, v in ablation.axes.items() if f != SEED}
    ablation = dataclasses.replace(
        ablation,
        base=dataclasses.replace(ablation.base, seed=seeds[0]),
        axes=axes | {SEED: seeds},
        seeds=len(seeds),
    )
    store.check_same(directory, resolved, record(resolved["name"], resolved["preset"], ablation))
    return resolved, ablation


def parse_only(ablation: Ablation, only: Sequence[str]) -> dict[str, list[Any]]:
    """Return the asked values by axis; refuse an axis or a value that there is not."""
    axes = {**ablation.varied, SEED: ablation.seed_values}
    asked: dict[str, list[Any]] = {}
    for each in only:
        field, equals, text = each.partition("=")
        if not equals:
            raise Refusal(f"--only takes AXIS=VALUE; got {each}.")
        if field not in axes:
            raise Refusal(
                f"--only {each}: there is no axis {field}; nearest: {near(field, axes)}. "
                f"Axes: {', '.join(axes)}."
            )
        matching = [value for value in axes[field] if text in (show(value), str(value))]
        if not matching:
            values = [show(value) for value in axes[field]]
            raise Refusal(
                f"--only {each}: axis {field} has no value {text}; nearest: {near(text, values)}. "
                f"Values: {', '.join(values)}."
            )
        asked.setdefault(field, []).extend(matching)
    return asked


def parse_shard(text: str) -> tuple[int, int]:
    """Return (i, n) of i/n."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 0 < int(count) >= int(index)):
        raise Refusal(f"--shard must be i/n with i in 0..n-1 or in 1..n; got {text}.")
    return int(index), int(count)


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
