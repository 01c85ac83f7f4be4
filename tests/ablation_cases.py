"""What the tests of ablations read of a folder."""

import csv
import json


def rows_of(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def snapshot(folder):
    """Return the bytes of all that reproduces: no seconds among them."""
    kept = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".csv", ".png")}
    kept.pop("timings.csv")
    kept["results.json"] = (folder / "results.json").read_bytes()
    groups_ = [json.loads(p.read_text())["rows"] for p in sorted(folder.glob("groups/*"))]
    return kept | {"groups": groups_}
