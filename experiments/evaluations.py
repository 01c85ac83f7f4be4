"""What a run was found to be worth: evaluation.json, and which step and average it is of."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.command import REPORT
from jaxdiff import files

EVALUATION = "evaluation.json"


def write(directory: Path, results: Mapping[str, Any], report: str) -> None:
    """Write evaluation.json and, last, report.md, each whole or not at all.

    Args:
        directory: of the run.
        results: by name; numbers that are not finite are left out.
        report: for readers.
    """
    kept = {name: value for name, value in results.items() if is_finite(value)}
    files.write_text(directory / EVALUATION, json.dumps(kept, indent=2) + "\n")
    files.write_text(directory / REPORT, report)


def is_finite(value: Any) -> bool:
    """Tell whether a result can stand in evaluation.json; text and settings can."""
    return not isinstance(value, float) or math.isfinite(value)


def read(directory: Path) -> dict[str, Any]:
    """Return what evaluation.json says; nothing where there is no report, or none to be read."""
    if not (directory / REPORT).exists():
        return {}
    try:
        found = json.loads((directory / EVALUATION).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_of(directory: Path, *, step: int, average: str, **settings: Any) -> bool:
    """Tell whether there is a report, and it is of this step, this average and these settings."""
    found = read(directory)
    wanted = {"step": step, "average": average, **settings}
    return bool(found) and all(found.get(name) == value for name, value in wanted.items())


def steps(step: int, num_steps: int) -> str:
    """Say which step a report is of: that of a whole run, or one on its way."""
    return f"{num_steps} steps" if step == num_steps else f"step {step} of {num_steps}"
