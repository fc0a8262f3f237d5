"""A run as one JSON line."""

import json
from pathlib import Path

from terncomm.simulator.provenance import provenance


def append(path: Path, record: dict[str, object]) -> None:
    """Add a record of mode "cluster" to a file of JSON lines, with where it comes from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"mode": "cluster", **record, "provenance": provenance()}) + "\n")


def history(path: Path) -> tuple[list[object], int]:
    """JSON lines that a script wrote, as they are, and how many lines are none."""
    entries: list[object] = []
    bad = 0
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            bad += 1
    return entries, bad
