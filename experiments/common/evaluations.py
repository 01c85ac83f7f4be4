"""What a run was found to be worth: evaluation.json; and what that is of: judged.json."""

import json
import math
from collections.abc import Mapping
from typing import Any

from experiments.common.command import REPORT
from jaxdiff import files, plotting
from jaxdiff.training import run as runs
from jaxdiff.training.loading import MAIN as MAIN

EVALUATION = "evaluation.json"
"""The figures of merit, finite numbers, and the step that they are of."""
JUDGED = "judged.json"
"""The step, the average and the settings that the report and the figures are of."""


def begin(directory: files.Path) -> None:
    """Say of the report there no more what it is of: its figures are about to change."""
    (directory / JUDGED).unlink(missing_ok=True)


def write(
    directory: files.Path, judged: Mapping[str, Any], results: Mapping[str, Any], report: str
) -> None:
    """Write report.md, evaluation.json and, last, judged.json: a crash between them shows.

    Args:
        directory: of the run.
        judged: what the others are of: `step`, `average`, and how by name.
        results: numbers by name; those that are not finite are left out.
        report: for readers.
    """
    begin(directory)
    files.write_text(directory / REPORT, report)
    write_numbers(directory, {"step": judged["step"], **results})
    files.write_text(directory / JUDGED, json.dumps(judged, indent=2) + "\n")


def write_numbers(directory: files.Path, results: Mapping[str, Any]) -> None:
    """Write evaluation.json alone.

    Args:
        directory: of the run.
        results: numbers by name, or by several; those that are not finite are left out.
    """
    files.write_text(directory / EVALUATION, json.dumps(finite(results), indent=2) + "\n")


def numbers(directory: files.Path) -> dict[str, Any]:
    """Return what evaluation.json says; nothing where there is none that can be read."""
    try:
        found = json.loads((directory / EVALUATION).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def draw_loss(directory: files.Path, run: files.Path, *, title: str, ylabel: str) -> None:
    """Draw the losses that a run logged: loss.png.

    Args:
        directory: where.
        run: the folder that has the log.
        title: above.
        ylabel: what the loss is.
    """
    lines = [line for line in runs.read_metrics(run / runs.METRICS) if "loss" in line]
    plotting.save_curve(
        directory / "loss.png",
        [line["step"] for line in lines],
        [line["loss"] for line in lines],
        title=title,
        ylabel=ylabel,
    )


def outdate(directory: files.Path) -> None:
    """Remove the report of a run that is to go on: it is that of fewer steps."""
    (directory / REPORT).unlink(missing_ok=True)


def finite(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results that are finite, in nests of names as they are given."""
    return {
        name: finite(value) if isinstance(value, Mapping) else value
        for name, value in results.items()
        if isinstance(value, Mapping) or math.isfinite(value)
    }


def read(directory: files.Path) -> dict[str, Any]:
    """Return what the report there is of; nothing where there is no whole one.

    Runs of before say it in evaluation.json, and the oldest ones do not: their report is of the
    last step and the main average.
    """
    if not (directory / REPORT).exists():
        return {}
    for name in (JUDGED, EVALUATION):
        try:
            found = json.loads((directory / name).read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict):
            return {}
        if "step" not in found:
            return {"average": MAIN, **found}
        return found if "average" in found else {}
    return {}


def is_judged(directory: files.Path, step: int) -> bool:
    """Tell whether the report of a run is that of a step and of its main average."""
    found = read(directory)
    return bool(found) and (found.get("step", step), found["average"]) == (step, MAIN)


def differing(directory: files.Path, settings: Mapping[str, Any]) -> list[str]:
    """Say how the report there was judged otherwise, a phrase a setting; of before, none is known.

    Args:
        directory: of the run.
        settings: as asked now, by name.
    """
    found = read(directory)
    return [
        f"{name} {found[name]} (asked {value})"
        for name, value in settings.items()
        if name in found and found[name] != value
    ]


def steps(step: int, num_steps: int) -> str:
    """Say which step a report is of: that of a whole run, or one on its way."""
    return f"{num_steps} steps" if step == num_steps else f"step {step} of {num_steps}"
