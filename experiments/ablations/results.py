"""The tables that the groups' files become: rows in order, and what does not reproduce beside."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.ablations.definition import SEED, Ablation, cells, groups
from experiments.ablations.judging import Result
from experiments.common.tables import Row, csv_text

RESULTS, TIMINGS, ENVIRONMENT = "results.csv", "timings.csv", "environment.json"
COSTS = ("nfe", "train_flops", "sample_flops")


def ordered_rows(ablation: Ablation, done: Mapping[int, Result]) -> list[Row]:
    """Return the rows that are done, in the order of the axes, seeds last; tuples for lists."""
    fields = list(ablation.varied)
    places = {tuple(cell[field] for field in fields): i for i, cell in enumerate(cells(ablation))}
    seeds = ablation.seed_values

    def place(row: Row) -> tuple[int, int]:
        return places[tuple(row[field] for field in fields)], seeds.index(row[SEED])

    rows = [
        {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
        for result in done.values()
        for row in result["rows"]
    ]
    return sorted(rows, key=place)


def results_csv(ablation: Ablation, rows: Sequence[Row], summary: Sequence[Row]) -> str:
    """Return results.csv: a line a row, its measures beside their mean and error over seeds."""
    names = list(ablation.measures)
    spread = [f"{name}_{part}" for name in names for part in ("mean", "stderr")]
    columns = [*ablation.varied, SEED, "hash", *names, *spread, *COSTS]
    of_cell = {tuple(cell[f] for f in ablation.varied): cell for cell in summary}
    lines = [
        {**{k: of_cell[tuple(row[f] for f in ablation.varied)][k] for k in spread}, **row}
        for row in rows
    ]
    return csv_text(lines, columns)


def timings_csv(ablation: Ablation, done: Mapping[int, Result]) -> str:
    """Return timings.csv: the seconds of each group that is done."""
    made = {group.index: group for group in groups(ablation)}
    fixed = list(made[0].fixed)
    lines = [
        {
            "group": index,
            **made[index].fixed,
            "runs": len(made[index].members),
            **{f"{name}_seconds": value for name, value in result["seconds"].items()},
            "train_seconds_a_run": result["seconds"]["train"] / len(made[index].members),
        }
        for index, result in done.items()
    ]
    seconds = ("compile_seconds", "train_seconds", "judge_seconds", "train_seconds_a_run")
    return csv_text(lines, ["group", *fixed, "runs", *seconds])


def environments(done: Mapping[int, Result]) -> str:
    """Return environment.json: each environment once, with the groups that ran in it."""
    found: list[dict[str, Any]] = []
    for index, result in done.items():
        same = next((e for e in found if e["environment"] == result["environment"]), None)
        if same is None:
            same = {"groups": [], "environment": result["environment"]}
            found.append(same)
        same["groups"].append(index)
    return json.dumps(found, indent=2) + "\n"
