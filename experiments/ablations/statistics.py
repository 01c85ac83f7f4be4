"""Means, standard errors and paired comparisons over seeds.

Rows of one seed share their initial parameters, data order and evaluation noise where they can, so
differences are taken seed by seed: a t interval of their mean, and Holm's correction of the
p-values of all that are compared at once (statsmodels).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.ablations.definition import Ablation
from experiments.ablations.definition import cells as all_cells
from experiments.ablations.fields import show
from experiments.common.tables import Row

LEVEL = 0.05
"""One minus the confidence of intervals, and the rate of false findings that Holm's keeps to."""

Cell = tuple[Any, ...]
"""A value on each axis, in order."""


class Difference(NamedTuple):
    """What a cell's mean is above another's, over the seeds that both have.

    Attributes:
        name: of the cell.
        mean: of the differences.
        low: end of the 95% interval; None with one seed or where all are equal.
        high: its other end.
        p: of no difference, None likewise.
        corrected: the same after Holm's correction.
    """

    name: str
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    corrected: float | None = None


class Table(NamedTuple):
    """The values of an ablation's rows.

    Attributes:
        ablation: what it is of.
        values: by measure, then by cell, one a seed, (S,); NaN where a run diverged.
        costs: by cell, the costs of its first row.
    """

    ablation: Ablation
    values: dict[str, dict[Cell, np.ndarray]]
    costs: dict[Cell, Row]

    def cells_of(self, name: str) -> dict[Cell, np.ndarray]:
        """Return the values of a measure where they can differ: not by how a run is sampled."""
        first: dict[Cell, Cell] = {}
        for cell in self.values[name]:
            first.setdefault(self.seen(name, cell), cell)
        return {cell: self.values[name][cell] for cell in first.values()}

    def seen(self, name: str, cell: Cell) -> Cell:
        """Return what of a cell a measure sees."""
        repeats = self.repeats(name)
        pairs = zip(self.ablation.varied, cell, strict=True)
        return tuple(value for field, value in pairs if field not in repeats)

    def repeats(self, name: str) -> frozenset[str]:
        """Return the fields that a measure does not see: those that a run is sampled by."""
        world = self.ablation.world
        return frozenset() if world.measures[name].sampled else world.sampling

    def name_of(self, cell: Cell, measure: str | None = None) -> str:
        """Return what tells a cell from others, for readers."""
        repeats = frozenset() if measure is None else self.repeats(measure)
        pairs = zip(self.ablation.varied, cell, strict=True)
        return ", ".join(f"{f}={show(v)}" for f, v in pairs if f not in repeats)

    def baseline_of(self, name: str) -> Cell | None:
        """Return the cell that the others are compared with, None where it is not done."""
        base, repeats = self.ablation.baseline, self.repeats(name)
        for cell in self.cells_of(name):
            pairs = zip(self.ablation.varied, cell, strict=True)
            if all(f in repeats or v == base[f] for f, v in pairs):
                return cell
        return None


def tabulate(ablation: Ablation, rows: Sequence[Row]) -> Table:
    """Collect rows that are in order, seeds changing fastest, into a table."""
    fields = list(ablation.varied)
    by_cell: dict[Cell, list[Row]] = {}
    for row in rows:
        cell = tuple(tuple(v) if isinstance(v := row[f], list) else v for f in fields)
        by_cell.setdefault(cell, []).append(row)
    values = {
        name: {
            cell: np.array([math.nan if r[name] is None else r[name] for r in members])
            for cell, members in by_cell.items()
        }
        for name in ablation.measures
    }
    return Table(ablation, values, {cell: members[0] for cell, members in by_cell.items()})


def mean_and_error(values: np.ndarray) -> tuple[float | None, float | None]:
    """Return mean and standard error over seeds; None where a run diverged, or of one seed."""
    mean = float(values.mean())
    if not math.isfinite(mean):
        return None, None
    if len(values) < 2:
        return mean, None
    return mean, float(values.std(ddof=1) / math.sqrt(len(values)))


def summarize(table: Table) -> list[Row]:
    """Return a row a cell: its axes, mean and standard error of each measure, and costs."""
    summary: list[Row] = []
    for cell, first in table.costs.items():
        row: dict[str, Any] = dict(zip(table.ablation.varied, cell, strict=True))
        for name, values in table.values.items():
            row[f"{name}_mean"], row[f"{name}_stderr"] = mean_and_error(values[cell])
        row |= {k: first[k] for k in ("nfe", "train_flops", "sample_flops")}
        summary.append(row)
    return summary


def best_of(table: Table, name: str) -> tuple[Cell | None, set[Cell]]:
    """Return the best cell of a measure, and those within two standard errors of it, paired."""
    cells = {c: v for c, v in table.cells_of(name).items() if np.isfinite(v).all()}
    if not cells:
        return None, set()
    sign = -1.0 if table.ablation.world.measures[name].higher_is_better else 1.0
    best = min(cells, key=lambda cell: sign * float(cells[cell].mean()))
    ties = {cell for cell, v in cells.items() if cell != best and _is_near(v - cells[best])}
    return best, ties


def _is_near(gaps: np.ndarray) -> bool:
    mean, error = mean_and_error(gaps)
    return abs(mean or 0.0) <= 2.0 * (error or 0.0)


def compare(table: Table, name: str) -> list[Difference]:
    """Compare each cell of a measure with the base's, corrected together."""
    base, cells = table.baseline_of(name), table.cells_of(name)
    if base is None:
        return []
    found = [
        difference(table.name_of(cell, name), values, cells[base])
        for cell, values in cells.items()
        if cell != base and np.isfinite(values).all() and np.isfinite(cells[base]).all()
    ]
    return corrected(found)


def effects(table: Table, name: str) -> list[Difference]:
    """Compare each value of an axis with the base's, all other axes averaged over, together.

    A value is compared where both it and the base's are run, the other axes being equal. There is
    nothing to average over with one axis, nor fairly where some of the grid is missing.
    """
    cells, found = {table.seen(name, c): v for c, v in table.cells_of(name).items()}, []
    fields = [field for field in table.ablation.varied if field not in table.repeats(name)]
    present = [{cell[i] for cell in cells} for i in range(len(fields))]
    wanted = {table.seen(name, tuple(cell.values())) for cell in all_cells(table.ablation)}
    wanted = {w for w in wanted if all(v in p for v, p in zip(w, present, strict=True))}
    if cells.keys() != wanted or sum(len(values) > 1 for values in present) < 2:
        return []
    for i, field in enumerate(fields):
        base = table.ablation.baseline[field]
        for value in dict.fromkeys(cell[i] for cell in cells):
            there = [cell for cell in cells if cell[i] == value]
            pairs = [(cell, (*cell[:i], base, *cell[i + 1 :])) for cell in there]
            pairs = [(cell, other) for cell, other in pairs if other in cells]
            if value == base or not pairs:
                continue
            values = np.mean([cells[cell] for cell, _ in pairs], axis=0)
            bases = np.mean([cells[other] for _, other in pairs], axis=0)
            if np.isfinite(values).all() and np.isfinite(bases).all():
                found.append(difference(f"{field}={show(value)}", values, bases))
    return corrected(found)


def difference(name: str, values: np.ndarray, base: np.ndarray) -> Difference:
    """Return the paired difference of two cells over seeds (S,)."""
    from statsmodels.stats.weightstats import DescrStatsW

    gaps = values - base
    mean = float(gaps.mean())
    if len(gaps) < 2 or np.ptp(gaps) == 0.0:
        return Difference(name, mean)
    described = DescrStatsW(gaps)
    low, high = described.tconfint_mean(LEVEL)
    return Difference(name, mean, float(low), float(high), float(described.ttest_mean()[1]))


def corrected(found: Sequence[Difference]) -> list[Difference]:
    """Return differences with Holm's correction of the p-values that there are."""
    from statsmodels.stats.multitest import multipletests

    with_p = [each.p for each in found if each.p is not None]
    if not with_p:
        return list(found)
    values = iter(multipletests(with_p, LEVEL, method="holm")[1])
    return [
        each if each.p is None else each._replace(corrected=float(next(values))) for each in found
    ]


def as_json(differences: Mapping[str, Sequence[Difference]]) -> dict[str, Any]:
    """Return differences by measure as JSON holds them."""
    return {name: [each._asdict() for each in all_] for name, all_ in differences.items()}
