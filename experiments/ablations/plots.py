"""The figures of an ablation: means with errors, quality by network calls, the Pareto front."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.ablations.fields import show
from experiments.ablations.statistics import Cell, Table, best_of, mean_and_error
from jaxdiff import files, plotting

COLORS = ("#2f6db5", "#c8553d", "#3f8f5f", "#8a63a8", "#b58a2f", "#4aa3a8", "#6b7480", "#b04a7a")
"""As many lines as one panel may have."""
FAINT = "#a9b8cb"
SEEDS: dict[str, Any] = {"marker": ".", "linestyle": "", "markersize": 3, "color": plotting.INK}


def draw(table: Table, directory: files.Path) -> list[str]:
    """Draw what there is to draw; return the files' names."""
    names = []
    for name in table.ablation.measures:
        if len(table.cells_of(name)) > 1:
            names.append(_points(table, name, directory))
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


def _points(table: Table, name: str, directory: files.Path) -> str:
    """One line a cell, in the order of the axes: mean, error, seeds.

    Points and not bars: where the axis leaves out 0 or is logarithmic, a bar's length says nothing.
    """
    cells = table.cells_of(name)
    base, (best, ties) = table.baseline_of(name), best_of(table, name)
    figure, axis = plotting.new_figure(7.6, 1.5 + 0.26 * len(cells))
    kinds = {"best": plotting.SECOND, "within error of it": plotting.ACCENT, "worse": FAINT}
    for i, (cell, values) in enumerate(cells.items()):
        mean, error = mean_and_error(values)
        if mean is None:
            axis.annotate(
                " diverged",
                (0.0, i),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                color=plotting.MUTED,
            )
            continue
        kind = "best" if cell == best else "within error of it" if cell in ties else "worse"
        style = {"marker": "s" if cell == base else "o", "markersize": 7, "capsize": 3}
        axis.errorbar(mean, i, xerr=error, color=kinds[kind], linestyle="", zorder=3, **style)
        axis.plot(values, np.full(len(values), i), **SEEDS, zorder=4)
    fields = [field for field in table.ablation.varied if field not in table.repeats(name)]
    axis.set_yticks(
        range(len(cells)),
        [", ".join(map(show, table.seen(name, cell))) for cell in cells],
        fontsize=8,
    )
    axis.set_ylim(len(cells) - 0.4, -0.6)
    flat = np.concatenate([v for v in cells.values() if np.isfinite(v).all()] or [np.ones(1)])
    if _spread(flat, 30.0):
        axis.set_xscale("log")
        _plain_logarithm(axis.xaxis)
    _finish(axis, table.ablation.world.measures[name].label, ", ".join(fields))
    marks = [_mark(label, color=color, marker="o") for label, color in kinds.items()]
    marks += [_mark("base", color=plotting.INK, marker="s", markerfacecolor="none")]
    marks += [_mark("a seed", **SEEDS)]
    _legend(figure, marks, "outside lower center", ncols=len(marks))
    plotting.save(figure, directory / f"{name}.png")
    return f"{name}.png"


def _by_calls(table: Table, name: str, directory: files.Path) -> str:
    """Quality by network calls: a color each value of one axis, a panel each of the others'."""
    colored, panels = _layout(table)
    fields = list(table.ablation.varied)
    lines: dict[Cell, dict[Cell, list[tuple[Any, float, float]]]] = {}
    for cell, values in table.values[name].items():
        mean, error = mean_and_error(values)
        panel = tuple(cell[fields.index(f)] for f in panels)
        line = tuple(cell[fields.index(f)] for f in colored)
        points = lines.setdefault(panel, {}).setdefault(line, [])
        if mean is not None:
            points.append((table.costs[cell]["nfe"], mean, error or 0.0))
    keys = list(dict.fromkeys(key for each in lines.values() for key in each))
    parts = [  # no panel has more lines than there are colors
        (panel, keys[i : i + len(COLORS)])
        for panel in lines
        for i in range(0, len(keys), len(COLORS))
    ]
    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    size = (6.0, 4.2) if len(parts) == 1 else (3.0 * columns, 2.6 * rows)
    figure, axes = plotting.new_figure(
        size[0] + 1.8, size[1], nrows=rows, ncols=columns, sharex=True, sharey=True, squeeze=False
    )
    everything = [
        mean for each in lines.values() for points in each.values() for _, mean, _ in points
    ]
    ticks = sorted({row["nfe"] for row in table.costs.values()})
    label = table.ablation.world.measures[name].label
    for k, axis in enumerate(axes.flat):
        if k >= len(parts):
            axis.set_visible(False)
            continue
        panel, shown = parts[k]
        for key in shown:
            if not (points := sorted(lines[panel].get(key, []))):
                continue
            calls, means, errors = zip(*points, strict=True)
            color = COLORS[keys.index(key) % len(COLORS)]
            axis.errorbar(calls, means, errors, color=color, marker="o", markersize=4, capsize=2.5)
        axis.set_xscale("log")
        if _spread(everything, 10.0):
            axis.set_yscale("log")
            _plain_logarithm(axis.yaxis)
        _log_ticks(axis.xaxis, ticks, 1.15 if len(parts) == 1 else 1.6)
        _finish(axis, "", "")
        pairs = [f"{f} {show(v)}" for f, v in zip(panels, panel, strict=True)]
        axis.set_title("\n".join(pairs), fontsize=8, color=plotting.INK)
        if len(parts) > len(lines):  # one legend does not tell lines of several panels apart
            axis.legend(
                handles=_lines_of(shown, keys), fontsize=7, frameon=False, loc="upper right"
            )
    figure.supxlabel("network calls a sample", fontsize=10, color=plotting.INK)
    figure.supylabel(label, fontsize=10, color=plotting.INK)
    if len(parts) == len(lines):
        _legend(figure, _lines_of(keys, keys), "outside right upper", title=", ".join(colored))
    plotting.save(figure, directory / f"{name}_by_calls.png")
    return f"{name}_by_calls.png"


def _layout(table: Table) -> tuple[list[str], list[str]]:
    """Return the axes that colors tell apart, and those that panels do."""
    sizes = {f: len(v) for f, v in table.ablation.varied.items() if f != "sample_steps"}
    if math.prod(sizes.values()) <= len(COLORS):
        return list(sizes), []
    fitting = {f: n for f, n in sizes.items() if n <= len(COLORS)} or sizes
    chosen = "sampler" if "sampler" in fitting else max(fitting, key=lambda f: fitting[f])
    return [chosen], [f for f in sizes if f != chosen]


def _lines_of(shown: Sequence[Cell], keys: Sequence[Cell]) -> list[Any]:
    return [
        _mark(
            ", ".join(map(show, key)) or "all",
            color=COLORS[keys.index(key) % len(COLORS)],
            marker="o",
            linestyle="-",
        )
        for key in shown
    ]


def _pareto(table: Table, name: str, directory: files.Path) -> str:
    """All cells by cost, and the line of those that no other beats in both, by number."""
    higher = table.ablation.world.measures[name].higher_is_better
    cells = {}
    for cell, values in table.cells_of(name).items():
        mean, error = mean_and_error(values)
        cost = cost_of(table, cell)
        if mean is not None and cost is not None:
            cells[cell] = (cost, mean, error or 0.0)
    figure, axis = plotting.new_figure(7.6, 4.2)
    front = pareto_front({cell: (c, -m if higher else m) for cell, (c, m, _) in cells.items()})
    for cell, (cost, mean, error) in cells.items():
        on_it = cell in front
        style = {"color": plotting.SECOND if on_it else FAINT, "zorder": 4 if on_it else 3}
        axis.errorbar(cost, mean, error, marker="o", markersize=5, capsize=2.5, **style)
    axis.step(
        [cells[c][0] for c in front],
        [cells[c][1] for c in front],
        where="post",
        color=plotting.SECOND,
        linewidth=1,
    )
    for i, cell in enumerate(front):
        axis.annotate(
            str(i + 1),
            cells[cell][:2],
            (6, 6),
            textcoords="offset points",
            fontsize=9,
            color=plotting.SECOND,
            zorder=5,
        )
    axis.set_xscale("log")
    by_calls = len({row["nfe"] for row in table.costs.values()}) > 1
    if by_calls:
        _log_ticks(axis.xaxis, sorted({cost for cost, _, _ in cells.values()}), 1.15)
    else:
        _plain_logarithm(axis.xaxis)
    if _spread([mean for _, mean, _ in cells.values()], 10.0):
        axis.set_yscale("log")
        _plain_logarithm(axis.yaxis)
    cost_name = "network calls a sample" if by_calls else "operations of training, G = 10^9"
    _finish(axis, cost_name, table.ablation.world.measures[name].label)
    marks = [
        _mark(f"{i + 1}  {', '.join(map(show, cell))}", color=plotting.SECOND, marker="o")
        for i, cell in enumerate(front)
    ]
    marks += [_mark("beaten in both", color=FAINT, marker="o")]
    _legend(figure, marks, "outside right upper", title=", ".join(table.ablation.varied))
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


def _mark(label: str, **style: Any) -> Any:
    """Return an entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **{"linestyle": "", **style})


def _legend(figure: Any, marks: Sequence[Any], place: str, **options: Any) -> None:
    """Put a legend beside the axes, where it hides nothing."""
    style = {"frameon": False, "fontsize": 8, "title_fontsize": 8, "labelcolor": plotting.INK}
    figure.legend(handles=marks, loc=place, **style, **options)


def _log_ticks(axis: Any, ticks: Sequence[float], apart: float) -> None:
    """Put ticks on a logarithmic axis, but for those that would run into the one before."""
    from matplotlib.ticker import NullLocator

    kept: list[float] = []
    for tick in ticks:
        if not kept or tick > apart * kept[-1]:
            kept.append(tick)
    axis.set_ticks(kept, [f"{tick:g}" for tick in kept], fontsize=8)
    axis.set_minor_locator(NullLocator())


def _spread(values: Sequence[float] | np.ndarray, factor: float) -> bool:
    """Whether values ask for a logarithmic axis."""
    return len(values) > 0 and 0.0 < factor * min(values) < max(values)


def _plain_logarithm(axis: Any) -> None:
    """Give a logarithmic axis ticks at 1, 2 and 5, without powers."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    wide = high > 1e3 * max(low, 1e-300)
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_minor_formatter(NullFormatter())
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(EngFormatter() if high > 1e6 else plain)
    axis.set_tick_params(which="both", labelsize=8)


def _finish(axis: Any, xlabel: str, ylabel: str) -> None:
    axis.set_xlabel(xlabel, color=plotting.INK)
    axis.set_ylabel(ylabel, color=plotting.INK)
    axis.grid(color="#e4e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
