"""Results as files: CSV for programs, Markdown for readers."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdiff import files

Row = Mapping[str, Any]


def write_csv(path: files.Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Write rows, numbers to six digits and what a row lacks left empty; whole or not at all."""
    files.write_text(path, csv_text(rows, columns))


def csv_text(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return what `write_csv` writes."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = [row.get(column, "") for column in columns]
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])
    return file.getvalue()


def markdown(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [[str(cell) for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return [f"| {' | '.join(line)} |" for line in lines]
