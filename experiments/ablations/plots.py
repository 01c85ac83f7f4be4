"""The figures of an ablation: bars with errors, quality by network calls, the Pareto front."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablations.definition import show
from experiments.ablations.statistics import Cell, Table, best_of, mean_and_error
from jaxdiff import plotting

COLORS = ("#2f6db5", "#c8553d", "#3f8f5f", "#8a63a8", "#b58a2f", "#4aa3a8", "#6b7480", "#b04a7a")


def draw(table: Table, directory: Path) -> list[str]:
    """Draw what there is to draw; return the files' names."""
    names = []
    for name in table.ablation.measures:
        if len(table.cells_of(name)) > 1:
            names.append(_bars(table, name, directory))
        calls = {row["nfe"] for row in table.costs.values()}
        if table.ablation.world.measures[name].sampled and len(calls) > 1:
            names.append(_by_calls(table, name, directory))
    first = table.ablation.measures[0]
    costs = [cost_of(table, cell) or 0.0 for cell in table.cells_of(first)]
    if max(costs) > 1.05 * min(costs):
        names.append(_pareto(table, first, directory))
    return names


def cost_of(table: Table, cell: Cell) -> float | None:
    """Return what a cell costs: calls a sample where they differ, else operations of training."""
    calls = {row["nfe"] for row in table.costs.values()}
    return table.costs[cell]["nfe" if len(calls) > 1 else "train_flops"]


def _bars(table: Table, name: str, directory: Path) -> str:
    """One bar a cell, in the order of the axes; the base in grey, the best in red."""
    cells = table.cells_of(name)
    base, (best, ties) = table.baseline_of(name), best_of(table, name)
    figure, axis = plotting.new_figure(7.6, 1.2 + 0.26 * len(cells))
    for i, (cell, values) in enumerate(cells.items()):
        mean, error = mean_and_error(values)
        if mean is None:
            axis.annotate("diverged", (0.0, i), va="center", fontsize=8, color=plotting.MUTED)
            continue
        color = plotting.SECOND if cell == best else plotting.ACCENT
        axis.barh(
            i,
            mean,
            xerr=error,
            color=color,
            alpha=1.0 if cell == best or cell in ties else 0.45,
            hatch="///" if cell == base else None,
            edgecolor="white",
            ecolor=plotting.INK,
            capsize=2.5,
            height=0.74,
        )
        axis.plot(values, np.full(len(values), i), ".", color=plotting.INK, markersize=2.5)
    axis.set_yticks(range(len(cells)), [table.name_of(cell, name) for cell in cells], fontsize=8)
    axis.set_ylim(len(cells) - 0.4, -0.6)
    _zoom(axis, cells.values())
    _finish(axis, f"{table.ablation.world.measures[name].label}", "")
    axis.set_title(
        "red: best; faint: worse beyond error; hatched: base; dots: seeds",
        fontsize=9,
        color=plotting.MUTED,
    )
    plotting.save(figure, directory / f"{name}.png")
    return f"{name}.png"


def _zoom(axis: Any, values: Any) -> None:
    """Leave 0 out where all bars are far from it, or take logarithms where they differ much."""
    flat = np.concatenate([v for v in values if np.isfinite(v).all()] or [np.ones(1)])
    low, high = float(flat.min()), float(flat.max())
    if low > 0 and high > 30 * low:
        axis.set_xscale("log")
    elif low > 0 and low > 0.5 * high:
        axis.set_xlim(low - 0.25 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9)


def _by_calls(table: Table, name: str, directory: Path) -> str:
    """One line for each combination of the axes that do not set the number of calls."""
    fields = list(table.ablation.varied)
    kept = [i for i, f in enumerate(fields) if f != "sample_steps"]
    figure, axis = plotting.new_figure(6.8, 4.2)
    lines: dict[Cell, list[tuple[Any, float, float]]] = {}
    for cell, values in table.values[name].items():
        mean, error = mean_and_error(values)
        if mean is not None:
            line = lines.setdefault(tuple(cell[i] for i in kept), [])
            line.append((table.costs[cell]["nfe"], mean, error or 0.0))
    for i, (key, points) in enumerate(lines.items()):
        label = ", ".join(show(value) for value in key)
        calls, means, errors = zip(*sorted(points), strict=True)
        style = "-" if i < len(COLORS) else "--"
        axis.errorbar(
            calls,
            means,
            errors,
            label=label,
            color=COLORS[i % len(COLORS)],
            linestyle=style,
            marker="o",
            markersize=4,
            capsize=2.5,
        )
    axis.set_xscale("log")
    everything = [mean for points in lines.values() for _, mean, _ in points]
    if _spread(everything):
        _plain_logarithm(axis)
    ticks = sorted({row["nfe"] for row in table.costs.values()})
    _log_ticks(axis.xaxis, ticks)
    _finish(axis, "network calls a sample", table.ablation.world.measures[name].label)
    axis.legend(frameon=False, fontsize=8, labelcolor=plotting.INK)
    plotting.save(figure, directory / f"{name}_by_calls.png")
    return f"{name}_by_calls.png"


def _pareto(table: Table, name: str, directory: Path) -> str:
    """All cells by cost, and the line of those that no other beats in both."""
    higher = table.ablation.world.measures[name].higher_is_better
    cells = {}
    for cell, values in table.cells_of(name).items():
        mean, error = mean_and_error(values)
        cost = cost_of(table, cell)
        if mean is not None and cost is not None:
            cells[cell] = (cost, mean, error or 0.0)
    figure, axis = plotting.new_figure(6.8, 4.2)
    front = pareto_front({cell: (c, -m if higher else m) for cell, (c, m, _) in cells.items()})
    for cell, (cost, mean, error) in cells.items():
        color = plotting.SECOND if cell in front else plotting.MUTED
        axis.errorbar(cost, mean, error, marker="o", markersize=5, color=color, capsize=2.5)
    axis.step(
        [cells[c][0] for c in front],
        [cells[c][1] for c in front],
        where="post",
        color=plotting.SECOND,
        linewidth=1,
    )
    for cell in cells if len(cells) <= 12 else front:
        axis.annotate(
            ", ".join(show(value) for value in cell),
            cells[cell][:2],
            (5, 5),
            textcoords="offset points",
            rotation=20,
            fontsize=7,
            color=plotting.INK,
        )
    axis.set_xscale("log")
    by_calls = len({row["nfe"] for row in table.costs.values()}) > 1
    if by_calls:
        _log_ticks(axis.xaxis, sorted({cost for cost, _, _ in cells.values()}))
    cost_name = "network calls a sample" if by_calls else "floating-point operations of training"
    if _spread([mean for _, mean, _ in cells.values()]):
        _plain_logarithm(axis)
    _finish(axis, cost_name, table.ablation.world.measures[name].label)
    axis.margins(0.18, 0.12)
    axis.set_title("Pareto front in red", fontsize=9, color=plotting.MUTED)
    plotting.save(figure, directory / "pareto.png")
    return "pareto.png"


def pareto_front(points: dict[Cell, tuple[float, float]]) -> list[Cell]:
    """Return the cells, by rising cost, that are better than all cheaper or equally dear ones."""
    front, lowest = [], math.inf
    for cell in sorted(points, key=lambda cell: points[cell]):
        if points[cell][1] < lowest:
            front.append(cell)
            lowest = points[cell][1]
    return front


def _log_ticks(axis: Any, ticks: Sequence[float]) -> None:
    """Put ticks on a logarithmic axis, but for those that would run into the one before."""
    from matplotlib.ticker import NullLocator

    kept: list[float] = []
    for tick in ticks:
        if not kept or tick > 1.15 * kept[-1]:
            kept.append(tick)
    axis.set_ticks(kept, [f"{tick:g}" for tick in kept], fontsize=8)
    axis.set_minor_locator(NullLocator())


def _spread(means: Sequence[float]) -> bool:
    """Whether values ask for a logarithmic axis."""
    return bool(means) and 0.0 < 10 * min(means) < max(means)


def _plain_logarithm(axis: Any) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks("{x:g}")
    axis.tick_params(axis="y", which="both", labelsize=8)


def _finish(axis: Any, xlabel: str, ylabel: str) -> None:
    axis.set_xlabel(xlabel, color=plotting.INK)
    axis.set_ylabel(ylabel, color=plotting.INK)
    axis.grid(color="#e4e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
