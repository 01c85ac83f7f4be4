"""Tables and figures of the comparison of samplers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]
STYLES = ("-", "--", "-.", ":")


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Return the Frechet distance of Gaussians fitted to two sets of rows.

    Source: Dowson & Landau 1982, eq. 4, as used by Heusel et al. 2017 (arXiv:1706.08500), eq. 6.
    """
    covariances = [np.cov(rows, rowvar=False) for rows in (x, y)]
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), and that matrix is symmetric
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    values = np.linalg.eigvalsh(root @ covariances[1] @ root)
    overlap = 2.0 * np.sqrt(np.maximum(values, 0.0)).sum()
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(gap + np.trace(covariances[0]) + np.trace(covariances[1]) - overlap)


def write_mixture(
    directory: Path, rows: Sequence[Row], expected: Mapping[str, int | None], floor: float
) -> None:
    """Write report.md and the two figures of the mixture."""
    processes = list(dict.fromkeys(row["process"] for row in rows))
    orders = {(row["process"], row["sampler"]): row["order"] for row in rows if "order" in row}
    errors = [row for row in rows if "error" in row]
    lines = ["# Samplers on a mixture", ""]
    lines += [
        "Orders of convergence, from the two finest grids, of the largest error against the",
        "exact flow (log-SNR grids from t_max to log-SNR 2, float64, exact denoiser).",
        "",
        f"| sampler | expected | {' | '.join(processes)} |",
        f"|---|---|{'---|' * len(processes)}",
    ]
    for name, order in expected.items():
        if order is not None:
            cells = [orders.get((process, name)) for process in processes]
            shown = " | ".join("" if cell is None else f"{cell:.2f}" for cell in cells)
            lines.append(f"| {name} | {order} | {shown} |")
    lines += [
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
        "Wasserstein-1 distance of samples from the data, vp, quadratic grids down to t = 0;",
        f"as many exact draws are {floor:.4f} away.",
        "",
    ]
    lines += table([row for row in rows if "distance" in row], "distance", "{:.4f}")
    lines += ["", "![quality by network calls](quality.png)", ""]
    (directory / "report.md").write_text("\n".join(lines))
    panels = [(p, [row for row in errors if row["process"] == p]) for p in processes]
    draw(
        directory / "orders.png",
        [(f"{p}: error against the exact flow", panel, "error") for p, panel in panels],
        "largest error",
        label=lambda process_rows, name: f"{name} ({process_rows[-1]['order']:.2f})",
    )
    draw(
        directory / "quality.png",
        [("vp: samples of the mixture", [row for row in rows if "distance" in row], "distance")],
        "Wasserstein-1 distance",
        floor=(floor, "exact draws"),
    )


def write_digits(
    directory: Path, rows: Sequence[Row], limits: Mapping[str, float], num_steps: int, num: int
) -> None:
    """Write report.md and the figure of a trained run."""
    lines = [
        "# Samplers on a trained digits run",
        "",
        f"A run of {num_steps} training steps; {num} images a sampler and number of steps, all",
        "from the same noise, in equal steps of t.",
        "",
        "- readable: the share that a support vector machine, trained on the real images,",
        f"  reads as the digit asked for; of held-out images it reads {limits['readable']:.3f}.",
        "- frechet: the Frechet distance of raw pixels to the held-out images; that of the",
        f"  training images is {limits['frechet']:.2f}.",
        "- error: root mean square difference a pixel from the flow's solution in many steps, of",
        "  solvers of the probability flow from the same start.",
        "",
    ]
    for column, form in (("readable", "{:.3f}"), ("frechet", "{:.2f}"), ("error", "{:.4f}")):
        lines += [f"## {column}, by steps", "", *table(rows, column, form, "steps"), ""]
    lines += ["![quality by network calls](quality.png)", ""]
    (directory / "report.md").write_text("\n".join(lines))
    draw(
        directory / "quality.png",
        [
            ("distance of samples from held-out digits", rows, "frechet"),
            ("distance from the exact flow", [row for row in rows if "error" in row], "error"),
        ],
        "Frechet distance (left); error a pixel (right)",
    )


def table(rows: Sequence[Row], column: str, form: str, by: str = "steps") -> list[str]:
    """Return a Markdown table of a column, a sampler a line."""
    sizes = sorted({row[by] for row in rows if column in row})
    lines = [f"| sampler | {' | '.join(map(str, sizes))} |", f"|---|{'---|' * len(sizes)}"]
    for name in dict.fromkeys(row["sampler"] for row in rows if column in row):
        found = {row[by]: row[column] for row in rows if row["sampler"] == name and column in row}
        cells = [form.format(found[size]) if size in found else "" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw(
    path: Path,
    panels: Sequence[tuple[str, Sequence[Row], str]],
    ylabel: str,
    *,
    label: Callable[[Sequence[Row], str], str] = lambda rows, name: name,
    floor: tuple[float, str] | None = None,
) -> None:
    """Draw a column against network calls on logarithmic axes, a line a sampler."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 * len(panels), 6.2), layout="constrained")
    for place, (title, rows, column) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        for i, name in enumerate(dict.fromkeys(row["sampler"] for row in rows)):
            of_name = [row for row in rows if row["sampler"] == name]
            axes.loglog(
                [row["calls"] for row in of_name],
                [row[column] for row in of_name],
                color=f"C{i % 10}",
                linestyle=STYLES[i // 10 % len(STYLES)],
                marker="o",
                markersize=3,
                label=label(of_name, name),
            )
        if floor is not None:
            axes.axhline(floor[0], color="black", linewidth=0.8, label=floor[1])
        axes.set_title(title)
        axes.set_xlabel("network calls")
        axes.grid(alpha=0.3)
        if place == 0:
            axes.set_ylabel(ylabel)
        axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
