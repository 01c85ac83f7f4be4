"""What a run was found to be worth: evaluation.json, and which step and average it is of."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.command import REPORT
from experiments.fitting import EVALUATION
from jaxdiff import files


def write(directory: Path, results: Mapping[str, Any], report: str) -> None:
    """Write report.md and, last, evaluation.json, which says what both are of.

    Args:
        directory: of the run.
        results: by name; numbers that are not finite are left out.
        report: for readers.
    """
    kept = {name: value for name, value in results.items() if is_finite(value)}
    files.write_text(directory / REPORT, report)
    files.write_text(directory / EVALUATION, json.dumps(kept, indent=2) + "\n")


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


def differing(directory: Path, settings: Mapping[str, Any]) -> list[str]:
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
