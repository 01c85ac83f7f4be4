"""Tables and figures of the comparison of families."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common.command import REPORT
from experiments.common.tables import markdown
from experiments.families.config import Config
from experiments.images.model import brightness
from jaxdiff import files, plotting
from jaxdiff.data import Images
from jaxdiff.training import run as runs

Row = Mapping[str, Any]
COLORS = {
    "Gaussian mixture": "#8a6d3b",
    "VAE": "#3c8d5a",
    "GAN": plotting.SECOND,
    "DDPM": plotting.ACCENT,
    "flow matching": "#7a4fa3",
    "training images": plotting.MUTED,
}
BITS = {
    "exact": "exact",
    "elbo": "ELBO",
    "fine": "ELBO, even log-SNR",
    "weighted": "importance-weighted bound",
}
"""Likelihoods by the name that columns of theirs start with."""
BOUNDS = {
    "elbo": " (ELBO)",
    "fine": " (ELBO, equal steps of log-SNR)",
    "weighted": " (importance-weighted)",
}
NUM_COLUMNS = 18
"""Images a family in the figure of samples."""


def write(
    config: Config,
    directory: files.Path,
    rows: Sequence[Row],
    timings: Sequence[Row],
    drawn: Mapping[str, np.ndarray],
    images: Images,
    accuracy: float,
) -> None:
    """Write the figures and, last, report.md.

    Args:
        config: of the run.
        directory: of the run.
        rows: of results.csv.
        timings: of timings.csv.
        drawn: levels (N, D) a family, real ones first.
        images: the held-out ones.
        accuracy: of the classifier whose features judge.
    """
    draw_samples(directory / "samples.png", drawn, images)
    draw_likelihood(directory / "likelihood.png", rows)
    draw_quality(directory / "quality.png", rows)
    files.write_text(directory / REPORT, report(config, directory, rows, timings, images, accuracy))


# --- Figures --------------------------------------------------------------------------------


def draw_samples(path: files.Path, drawn: Mapping[str, np.ndarray], images: Images) -> None:
    """Draw the first images of each family, a row each."""
    count = min(NUM_COLUMNS, *(len(levels) for levels in drawn.values()))
    levels = np.concatenate([levels[:count] for levels in drawn.values()])
    pictures = brightness(levels.reshape(-1, *images.shape), images.num_levels)
    height = images.shape[0] + 1
    figure, axis = plotting.new_figure(0.5 * count + 1.6, 0.5 * len(drawn) + 0.6)
    axis.imshow(plotting.tile(pictures, count), interpolation="nearest")
    axis.set_yticks([(i + 0.5) * height for i in range(len(drawn))], drawn.keys())
    axis.set_xticks([])
    axis.tick_params(length=0, labelsize=11, labelcolor=plotting.INK)
    axis.spines[:].set_visible(False)
    axis.set_title("Digits: held-out images, and the first samples of each family", fontsize=12)
    plotting.save(figure, path)


def draw_likelihood(path: files.Path, rows: Sequence[Row]) -> None:
    """Draw bits per dimension as bars, exact values filled and bounds hatched."""
    bars: list[tuple[str, float | None, float, str, bool]] = []
    for row in rows[:-1]:
        family = row["family"]
        found = [name for name in BITS if f"{name}_bits_per_dim" in row]
        for name in found:
            values = row[f"{name}_bits_per_dim"], row[f"{name}_stderr"]
            bars.append((f"{family}: {BITS[name]}", *values, COLORS[family], name == "exact"))
        if not found:
            bars.append((f"{family}: none", None, 0.0, COLORS[family], False))
    figure, axis = plotting.new_figure(8.6, 0.46 * len(bars) + 1.4)
    largest = max(value for _, value, *_ in bars if value is not None)
    for i, (_, value, stderr, color, exact) in enumerate(bars):
        if value is None:
            axis.text(0.02 * largest, i, "no likelihood", va="center", fontsize=10, color=color)
            continue
        axis.barh(
            i,
            value,
            xerr=stderr,
            height=0.7,
            color=color if exact else "white",
            edgecolor=color,
            hatch=None if exact else "///",
            capsize=3,
            ecolor=plotting.INK,
        )
        axis.text(value + stderr + 0.02 * largest, i, f"{value:.3f}", va="center", fontsize=10)
    axis.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=10)
    axis.invert_yaxis()
    axis.set_xlim(0.0, 1.12 * largest)
    axis.set_xlabel("bits per dimension of held-out images (lower is better)")
    axis.set_title("Likelihood: exact (filled), bounds (hatched); whiskers: standard errors")
    axis.spines[["top", "right"]].set_visible(False)
    plotting.save(figure, path)


def draw_quality(path: files.Path, rows: Sequence[Row]) -> None:
    """Draw precision against recall, and Frechet distances as bars."""
    figure, (left, right) = plotting.new_figure(10.6, 4.4, ncols=2)
    for row in rows:
        family = row["family"]
        real = family == "training images"
        left.scatter(
            row["recall"],
            row["precision"],
            s=90,
            color=COLORS[family],
            marker="*" if real else "o",
            label=family,
        )
    left.legend(frameon=False, fontsize=9, loc="best")
    left.set_xlabel("recall: share of held-out images near a sample")
    left.set_ylabel("precision: share of samples near a held-out image")
    left.set_title("Fidelity and diversity")
    left.grid(color="#e4e7eb", linewidth=0.8)
    left.set_axisbelow(True)
    names = [row["family"] for row in rows]
    values = [row["frechet"] for row in rows]
    right.barh(names, values, color=[COLORS[name] for name in names], height=0.7)
    for i, value in enumerate(values):
        right.text(value + 0.01 * max(values), i, f"{value:.2f}", va="center", fontsize=10)
    right.invert_yaxis()
    right.set_xlim(0.0, 1.14 * max(values))
    right.set_xlabel("squared Frechet distance of features (lower is better)")
    right.set_title("Distance from the held-out images")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    plotting.save(figure, path)


# --- Report ---------------------------------------------------------------------------------


def report(
    config: Config,
    directory: files.Path,
    rows: Sequence[Row],
    timings: Sequence[Row],
    images: Images,
    accuracy: float,
) -> str:
    """Return the report of a run; arguments as :func:`write`'s."""
    record = runs.read_record(directory) or {}
    versions = ", ".join(f"{name} {v}" for name, v in record.get("versions", {}).items())
    floor = rows[-1]
    likelihoods = markdown(
        ["bits per dimension", "exact", "bound"],
        [
            [row["family"], _measured(row, {"exact": ""}), _measured(row, BOUNDS)]
            for row in rows[:-1]
        ],
    )
    quality = markdown(
        ["", "Frechet", "precision", "recall", "density", "coverage"],
        [
            [
                row["family"],
                f"{row['frechet']:.2f}",
                *(f"{row[name]:.3f}" for name in ("precision", "recall", "density", "coverage")),
            ]
            for row in rows
        ],
    )
    by_family = {row["family"]: row for row in timings}
    costs = markdown(
        ["", "parameters", "updates", "training TFLOP", "training s", "calls a sample", "s / 1000"],
        [
            [
                row["family"],
                f"{row['parameters']:,}",
                row.get("steps", "EM"),
                f"{row['training_flops'] / 1e12:.3g}" if "training_flops" in row else "",
                f"{by_family[row['family']]['train_seconds']:.1f}",
                row.get("calls", ""),
                f"{by_family[row['family']]['sample_seconds_per_1000']:.3g}",
            ]
            for row in rows[:-1]
        ],
    )
    components = next(row["components"] for row in rows if "components" in row)
    method, num_steps = config.ddpm_sampler
    flow_method, flow_steps = config.flow_sampler
    newline = "\n"
    return f"""\
# Families of generative models on the same digits

![samples](samples.png)

None of them is told the class. The four with networks have as many parameters and as many \
floating-point operations of training, to a tenth, and their hyper-parameters were not searched \
to the same depth for each: differences of a few per cent say nothing about the families.

## Likelihood

{newline.join(likelihoods)}

![likelihood](likelihood.png)

Of {config.eval_images} held-out images, uniformly dequantised once, the same draw for all; \
{images.num_levels} levels; ± is the standard error over images.

- Gaussian mixture: {components} components of full covariance, the number chosen on a fifth of \
the training images; then fitted to all of them.
- VAE: the decoder is a Gaussian whose standard deviation is learned too, so its bound is of the \
same density. The second bound averages {config.weights} importance weights an image.
- GAN: it draws samples and assigns them no density. There is nothing to report.
- DDPM: numbers of different models. The ELBO bounds the likelihood of the reverse chain (the \
reverse SDE in {config.elbo_steps} steps), at the nodes of DDPM and in as many equal steps of \
log-SNR; the exact value is that of the probability-flow ODE. They share a network and would agree \
only if it were the exact score and the steps small: neither bounds the other. Between the two \
grids only the size of the steps next to the data differs.
- Flow matching: the probability-flow ODE, exactly. The divergences of both ODEs are estimated \
without bias by {config.num_probes} Hutchinson probes, at tolerance {config.eval_tolerance:g}, \
from log-SNR {config.log_snr_high:g}.

## Samples

{newline.join(quality)}

![quality](quality.png)

{config.num_samples} samples a family against all {len(images)} held-out images, in the \
64 features of a small classifier trained in this run, which reads {accuracy:.3f} of the held-out \
images right. Samples are rounded to the levels first. The training images are the floor: what a \
model of the true distribution would get, and also what one that memorised them would.

## Cost

{newline.join(costs)}

Operations are XLA's count of an update times the updates; seconds are of the machine below, \
compilation left out, and stand in timings.csv, since they do not reproduce. DDPM draws with \
{method} in {num_steps} steps, flow matching with {flow_method} in {flow_steps}.

## What produced it

Config hash `{record.get("hash")}`, seed {config.seed}. {record.get("device")}. {versions}. Commit \
{record.get("git_commit")}. All of it: [config.json](config.json), [results.csv](results.csv), \
[timings.csv](timings.csv). The training images lie {floor["frechet"]:.2f} from the held-out ones.
"""


def _measured(row: Row, names: Mapping[str, str]) -> str:
    found = [
        f"{row[f'{name}_bits_per_dim']:.3f} ± {row[f'{name}_stderr']:.3f}{label}"
        for name, label in names.items()
        if f"{name}_bits_per_dim" in row
    ]
    return "; ".join(found) or "none"
