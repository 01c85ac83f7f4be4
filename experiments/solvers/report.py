"""Tables and figures of the comparison of samplers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.common.command import REPORT
from experiments.common.tables import markdown
from jaxdiff import files, plotting

Row = Mapping[str, Any]
STYLES, MARKERS = ("-", "--", "-.", ":"), "osD^v<>pXP"


class Panel(NamedTuple):
    """One picture: a column of rows against network calls, a line a sampler.

    Attributes:
        title: above it.
        rows: what is drawn.
        column: on the vertical axis.
        ylabel: of that axis.
        floor: mean and spread of the same of real data, drawn as a band.
        of_floor: what its line is called.
    """

    title: str
    rows: Sequence[Row]
    column: str
    ylabel: str
    floor: tuple[float, float] | None = None
    of_floor: str = "as many real draws"


def write_mixture(
    directory: files.Path,
    rows: Sequence[Row],
    expected: Mapping[str, int | None],
    floor: tuple[float, float],
) -> None:
    """Write the two figures of the mixture and, last, report.md."""
    processes = list(dict.fromkeys(row["process"] for row in rows))
    orders = {(row["process"], row["sampler"]): row["order"] for row in rows if "order" in row}
    finest = sorted({row["steps"] for row in rows if "error" in row})[-2:]
    of_orders = [
        [name, order, *(f"{orders[p, name]:.2f}" if (p, name) in orders else "" for p in processes)]
        for name, order in expected.items()
        if order is not None
    ]
    measured = [row for row in rows if "distance" in row]
    lines = [
        "# Samplers on a mixture",
        "",
        f"Orders of convergence, from {finest[0]} to {finest[1]} steps, of the largest error",
        "against the exact flow (log-SNR grids from t_max to log-SNR 2, float64, exact denoiser).",
        "",
        *markdown(["sampler", "expected", *processes], of_orders),
        "",
        "UniPC of order p shows p + 1: its corrector adds one. DPM-Solver++(3M) as published:",
        "its second-difference term is half of what the quadratic interpolant needs. From",
        "alpha = 0 (flow) the first step is infinite in log-SNR; its error does not fall with the",
        "number of steps on this grid, and stays visible in the solvers without a corrector.",
        "",
        "![error by network calls](orders.png)",
        "",
        "## Quality by network calls",
        "",
        "Wasserstein-1 distance of samples from the data by number of steps, vp, quadratic grids",
        "down to t = 0, from evenly spaced quantiles of the prior. As many independent exact draws",
        f"are {floor[0]:.4f} +- {floor[1]:.4f} away: below that only the deterministic samplers",
        "can be told apart, whose last digits are the prior's mismatch and the grid's end.",
        "",
        *table(measured, "distance", "{:.4f}"),
        "",
        "![quality by network calls](quality.png)",
        "",
    ]
    titles = {p: f"{p}: error against the exact flow (order)" for p in processes}
    draw(
        directory / "orders.png",
        [
            Panel(titles[p], [row for row in rows if row["process"] == p], "error", "largest error")
            for p in processes
        ],
    )
    title = "vp: samples of the mixture from the data"
    draw(
        directory / "quality.png",
        [Panel(title, measured, "distance", "Wasserstein-1 distance", floor)],
    )
    files.write_text(directory / REPORT, "\n".join(lines))


def write_digits(
    directory: files.Path,
    rows: Sequence[Row],
    limits: Mapping[str, float],
    num_steps: int,
    num: int,
) -> None:
    """Write the figure of a trained run and, last, report.md."""
    lines = [
        "# Samplers on a trained digits run",
        "",
        f"A run of {num_steps} training steps; {num} images a sampler and number of steps, all",
        "from the same noise, in equal steps of t.",
        "",
        "- readable: the share that a support vector machine, trained on the real images,",
        f"  reads as the digit asked for; of held-out images it reads {limits['readable']:.3f}.",
        "- frechet: the Frechet distance of raw pixels to the held-out images; that of as many",
        f"  training images is {limits['frechet']:.2f}.",
        "- error: root mean square difference a pixel from the flow's solution in many steps, of",
        "  solvers of the probability flow from the same start.",
        "",
        "The adaptive solver chooses its steps itself (relative and absolute tolerance 1e-3).",
        "",
    ]
    for column, form in (("readable", "{:.3f}"), ("frechet", "{:.2f}"), ("error", "{:.4f}")):
        lines += [f"## {column}, by steps", "", *table(rows, column, form), ""]
    lines += ["![quality by network calls](quality.png)", ""]
    counted = [row for row in rows if "calls" in row]
    draw(
        directory / "quality.png",
        [
            Panel(
                "distance of samples from held-out digits",
                counted,
                "frechet",
                "Frechet distance of pixels",
                (limits["frechet"], 0.0),
            ),
            Panel("distance from the exact flow", counted, "error", "r.m.s. error a pixel"),
        ],
    )
    files.write_text(directory / REPORT, "\n".join(lines))


def write_imported(
    directory: files.Path, name: str, rows: Sequence[Row], said: Mapping[str, str], floor: float
) -> None:
    """Write the figure of published weights and, last, report.md.

    Args:
        directory: of both.
        name: of the weights.
        rows: of samplers and steps.
        said: phrases on how they were found.
        floor: how far a looser tolerance moves the answer.
    """
    lines = [
        f"# Samplers on {name}",
        "",
        f"{said['what']}, all from the same noise, in equal steps",
        f"of {said['grid']} down to {said['t_end']}: the cleanest time that the network was",
        "trained at. x0_hat is not clipped. A call of a guided network counts once.",
        "",
        "The error is the root mean square distance from the network's own adaptive solution,",
        f"over the root mean square of that. It is Tsit5's in {said['dtype']} to a relative and",
        f"absolute tolerance of {said['tolerance']}, of each image by itself, in at most",
        f"{said['calls']} calls. A tolerance ten times larger moves it by {floor:.2g}: errors near",
        "that cannot be told apart.",
        *FLOAT32 * (said["dtype"] == "float32"),
        "",
        "The adaptive sampler of the table has a tolerance of 1e-3. Samplers that draw noise",
        "follow no flow and are left out.",
        "",
        *table(rows, "error", "{:.2e}"),
        "",
        "![error by network calls](error.png)",
        "",
    ]
    title = "distance from the adaptive solution"
    band = None if floor == 0.0 else (floor, 0.0)
    of_floor = "the solution's own uncertainty"
    draw(
        directory / "error.png",
        [Panel(title, rows, "error", "relative r.m.s. error", band, of_floor)],
    )
    files.write_text(directory / REPORT, "\n".join(lines))


FLOAT32 = (
    "In float32 the numbers themselves are rounded to 6e-8 and a network's output to about 1e-6.",
    "A tolerance below that asks for shorter steps than the formula needs, and what is left is",
    "rounding; --dtype float64 takes it away.",
)
"""What a small tolerance means where numbers are short."""


def table(rows: Sequence[Row], column: str, form: str) -> list[str]:
    """Return a Markdown table of a column by number of steps, a sampler a line."""
    rows = [row for row in rows if column in row]
    sizes = sorted({row["steps"] for row in rows if "steps" in row})
    headings: list[Any] = [*sizes, *(["own"] if any("steps" not in row for row in rows) else [])]
    found = {(row["sampler"], row.get("steps", "own")): row[column] for row in rows}
    body = [
        [name, *(form.format(found[name, n]) if (name, n) in found else "" for n in headings)]
        for name in dict.fromkeys(row["sampler"] for row in rows)
    ]
    return markdown(["sampler", *headings], body)


def draw(path: files.Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side on logarithmic axes, each with its legend below.

    Samplers whose curves coincide share a line. A sampler keeps its look from panel to panel.
    """
    names = list(dict.fromkeys(row["sampler"] for panel in panels for row in panel.rows))
    figure, (places,) = plotting.new_figure(
        6.4 * len(panels), 7.0, ncols=len(panels), squeeze=False
    )
    for axes, panel in zip(places, panels, strict=True):
        curves: dict[tuple[Any, ...], list[str]] = {}
        for name in names:
            rows = [row for row in panel.rows if row["sampler"] == name and panel.column in row]
            points = tuple((row["calls"], float(f"{row[panel.column]:.4g}")) for row in rows)
            order = f" ({rows[-1]['order']:.2f})" if rows and "order" in rows[-1] else ""
            if rows:
                curves.setdefault(points, []).append(name + order)
        for points, labels in curves.items():
            i = names.index(labels[0].split(" (")[0])
            axes.loglog(
                *zip(*points, strict=True),
                color=f"C{i % 10}",
                linestyle=STYLES[i // 10 % len(STYLES)],
                marker=MARKERS[i % 7],
                markersize=4,
                label=" = ".join(labels),
            )
        if panel.floor is not None:
            mean, spread = panel.floor
            axes.axhline(mean, color="black", linewidth=0.8, label=panel.of_floor)
            axes.axhspan(max(mean - spread, 0.2 * mean), mean + spread, color="black", alpha=0.12)
        axes.set_title(panel.title)
        axes.set_xlabel("network calls")
        axes.set_ylabel(panel.ylabel)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    plotting.save(figure, path, dpi=110)
