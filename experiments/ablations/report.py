"""Make the tables, figures and the report of what is done in an ablation's folder."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.ablations import judging, plots, results, statistics, store
from experiments.ablations.definition import Ablation, groups, left_out
from experiments.ablations.fields import show
from experiments.ablations.judging import Result
from experiments.ablations.statistics import Difference, Table, mean_and_error
from experiments.common.command import REPORT, refusing
from experiments.common.tables import markdown
from jaxdiff import files


def write(directory: files.Path, record: Mapping[str, Any], ablation: Ablation) -> int:
    """Write all that is made of the groups that are done, the report last; return how many.

    Where another machine finishes a group meanwhile, all is made again, so that the last to write
    has seen every group.
    """
    done = store.read_groups(directory, ablation)
    while done:
        with refusing(OSError, say=f"the report in {directory} cannot be written: "):
            _assemble(directory, record, ablation, done)
        again = store.read_groups(directory, ablation)
        if again.keys() == done.keys():
            break
        done = again
    return len(done)


def _assemble(
    directory: files.Path,
    record: Mapping[str, Any],
    ablation: Ablation,
    done: Mapping[int, Result],
) -> None:
    (directory / REPORT).unlink(missing_ok=True)  # what is written last says that all is there
    rows = results.ordered_rows(ablation, done)
    table = statistics.tabulate(ablation, rows)
    summary = statistics.summarize(table)
    comparisons = {name: statistics.compare(table, name) for name in ablation.measures}
    effects = {name: statistics.effects(table, name) for name in ablation.measures}
    whole = {
        "ablation": dict(record),
        "rows": rows,
        "summary": summary,
        "against_base": statistics.as_json(comparisons),
        "effects": statistics.as_json(effects),
    }
    texts = {
        results.RESULTS: results.results_csv(ablation, rows, summary),
        results.TIMINGS: results.timings_csv(ablation, done),
        results.ENVIRONMENT: results.environments(done),
        "results.json": json.dumps(whole, indent=1) + "\n",
    }
    for name, text in texts.items():
        files.write_text(directory / name, text)
    figures = plots.draw(table, directory)
    text = report(record, table, done, comparisons, effects, figures)
    files.write_text(directory / REPORT, text)


def is_finished(directory: files.Path, ablation: Ablation) -> bool:
    """Whether all groups are done and the report is made of them."""
    if not (directory / REPORT).exists():
        return False
    done = store.read_groups(directory, ablation)
    if len(done) < len(groups(ablation)):
        return False
    rows = results.ordered_rows(ablation, done)
    summary = statistics.summarize(statistics.tabulate(ablation, rows))
    table = directory / results.RESULTS
    made = results.results_csv(ablation, rows, summary)
    return table.exists() and table.read_bytes() == made.encode()


def report(
    record: Mapping[str, Any],
    table: Table,
    done: Mapping[int, Result],
    comparisons: Mapping[str, list[Difference]],
    effects: Mapping[str, list[Difference]],
    figures: list[str],
) -> str:
    """Return the report for readers."""
    ablation, total = table.ablation, len(groups(table.ablation))
    seeds = len(ablation.seed_values)
    missing = "" if len(done) == total else f" **{total - len(done)} of {total} groups missing.**"
    axes = [[f"`{f}`", ", ".join(show(v) for v in values)] for f, values in ablation.varied.items()]
    pictures = "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in figures)
    learned = f"\n## What was learned\n\n{ablation.learned}\n" if ablation.learned else ""
    steps, batch = ablation.base.num_steps, ablation.base.batch_size
    return f"""\
# {ablation.question}

Preset `{record["preset"]}` of `{record["name"]}`: {steps} steps of batch {batch}, \
{seeds} seed{"s" * (seeds > 1)}, network of width {ablation.base.width} and depth \
{ablation.base.depth}.{missing}

{_lines(markdown(["axis", "values"], axes))}

{_left_out(ablation)}{_verdict(table, comparisons)}
{learned}
## Results

{_results(table)}

± is the standard error over seeds. **Bold**: best mean. ≈: within two standard errors of the \
difference from the best, paired by seed.{_cases(table)} Compared with the base, {_base(table)}.

{pictures}

{_compared("## Each axis, averaged over the others", effects, table)}
{_compared("## Each row against the base", comparisons, table)}
## What produced it

{_timings(table.ablation, done)}

{_reproduces(done)} All of it: \
[results.csv]({results.RESULTS}), [results.json](results.json), [timings.csv]({results.TIMINGS}), \
[environment.json]({results.ENVIRONMENT}), [{store.LOCK}]({store.LOCK}).
"""


def _lines(lines: list[str]) -> str:
    return "\n".join(lines)


def _base(table: Table) -> str:
    return ", ".join(f"{f}={show(v)}" for f, v in table.ablation.baseline.items())


def _left_out(ablation: Ablation) -> str:
    """Say which combinations are not run because they would be others again."""
    said = [
        f"`{field}` other than {show(ablation.baseline[field])}, {count} combination"
        f"{'s' * (count > 1)}: {why}."
        for (field, why), count in left_out(ablation).items()
    ]
    if not said:
        return ""
    return "Not run, since a run would not read it:\n\n" + _lines([f"- {s}" for s in said]) + "\n\n"


def _cases(table: Table) -> str:
    """Explain what of the table below is no plain number, where it is there."""
    ablation, said = table.ablation, ""
    if any(not np.isfinite(v).all() for values in table.values.values() for v in values.values()):
        said += " *Diverged*: a run did, or its measure is not finite."
    repeated = [n for n in ablation.measures if len(table.cells_of(n)) < len(table.values[n])]
    if repeated:
        labels = "; ".join(ablation.world.measures[name].label for name in repeated)
        fields = [f"`{f}`" for f in ablation.varied if f in table.repeats(repeated[0])]
        said += f" In brackets: as in a line above, since it is of the model ({labels}) and not of "
        said += f"how the model is sampled ({', '.join(fields)})."
    return said


def _results(table: Table) -> str:
    """One line a cell: axes, measures with errors, costs; best bold, ties marked."""
    ablation, rows = table.ablation, []
    best = {name: statistics.best_of(table, name) for name in ablation.measures}
    labels = [ablation.world.measures[name].label for name in ablation.measures]
    costs = {"nfe": "network calls a sample", "train_flops": "training FLOPs"}
    costs = {k: v for k, v in costs.items() if any(row[k] for row in table.costs.values())}
    shown = {name: table.cells_of(name) for name in ablation.measures}
    for cell, first in table.costs.items():
        row = [show(value) for value in cell]
        for name in ablation.measures:
            text = number(table.values[name][cell])
            if cell not in shown[name]:  # the same as in the line of another sampling
                row.append(f"({text})")
                continue
            winner, ties = best[name]
            row.append(f"**{text}**" if cell == winner else f"{text} ≈" if cell in ties else text)
        row += [f"{first[k]:.3g}" if first[k] else "" for k in costs]
        rows.append(row)
    header = [*(f"`{f}`" for f in ablation.varied), *labels, *costs.values()]
    return _lines(markdown(header, rows))


def number(values: np.ndarray) -> str:
    """Return the mean over seeds with its standard error, to the digits that the error leaves."""
    mean, error = mean_and_error(values)
    if mean is None:
        count = int((~np.isfinite(values)).sum())
        return "*diverged*" if count == len(values) else f"*{count} of {len(values)} diverged*"
    return f"{mean:.4g}" if error is None else f"{mean:.4g} ± {error:.2g}"


def _compared(title: str, found: Mapping[str, list[Difference]], table: Table) -> str:
    """A table of differences for each measure that has any."""
    parts = []
    for name, differences in found.items():
        if not differences:
            continue
        rows = [
            [
                each.name,
                f"{each.mean:+.4g}",
                "" if each.low is None else f"{each.low:+.3g} to {each.high:+.3g}",
                "" if each.p is None else f"{each.p:.2g}",
                _corrected(each),
            ]
            for each in differences
        ]
        label = table.ablation.world.measures[name].label
        header = ["", "difference", "95% interval", "p", "p after Holm"]
        parts.append(f"{label}:\n\n{_lines(markdown(header, rows))}\n")
    note = "Paired by seed, t intervals; Holm's correction is over the lines of each table."
    return f"{title}\n\n{note}\n\n" + "\n".join(parts) if parts else ""


def _corrected(each: Difference) -> str:
    if each.corrected is None:
        return ""
    text = f"{each.corrected:.2g}"
    return f"**{text}**" if each.corrected < statistics.LEVEL else text


def _verdict(table: Table, comparisons: Mapping[str, list[Difference]]) -> str:
    """Say what the numbers say, whatever they are."""
    sentences = []
    for name in table.ablation.measures:
        best, ties = statistics.best_of(table, name)
        cells = table.cells_of(name)
        if best is None or len(cells) < 2:
            continue
        label = table.ablation.world.measures[name].label
        finite = [bool(np.isfinite(values).all()) for values in cells.values()]
        text = f"Best {label}: {number(cells[best])} with "
        text += f"{table.name_of(best, name)}"
        text += f". {_tied(len(ties), sum(finite) - 1)}"
        if not all(finite):
            text += f"; {len(finite) - sum(finite)} diverged"
        found = [each for each in comparisons[name] if each.corrected is not None]
        if found:
            real = sum(each.corrected < statistics.LEVEL for each in found if each.corrected)
            text += (
                f". After Holm's correction {real} of {len(found)} differ from the base"
                f"{' (p < 0.05)' if real else ''}"
            )
        sentences.append(text + ".")
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _tied(ties: int, others: int) -> str:
    """Say how many of the others cannot be told from the best."""
    if others == 0:
        return "There is no other"
    if others == 1:
        return "The other cannot be told from it" if ties else "The other is worse beyond error"
    if not ties:
        return f"All {others} others are worse beyond error"
    return f"Of the {others} others {ties} cannot be told from it (≈)"


def _reproduces(done: Mapping[int, Result]) -> str:
    """Say what another run of the same gives again."""
    if all(judging.is_repeatable(result["environment"]) for result in done.values()):
        return (
            "Seconds, and what ran them, do not reproduce; the rest does, byte for byte on one "
            "kind of machine: `python -m experiments.ablate verify` runs a part of it again."
        )
    return (
        f"A GPU ran this without XLA_FLAGS={judging.DETERMINISTIC}, so no number reproduces byte "
        "for byte: XLA chose kernels by their time."
    )


def _timings(ablation: Ablation, done: Mapping[int, Result]) -> str:
    made = groups(ablation)
    rows = [
        [
            made[index].title,
            len(made[index].members),
            *(f"{result['seconds'][k]:.1f}" for k in ("compile", "train", "judge")),
        ]
        for index, result in done.items()
    ]
    header = ["group", "runs side by side", "compiling, s", "training, s", "judging, s"]
    return _lines(markdown(header, rows))
