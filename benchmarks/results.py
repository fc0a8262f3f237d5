"""Result rows as CSV files, each row with what it needs to be believed: machine, versions, commit, date."""

import csv
from pathlib import Path

from terncomm.simulator.provenance import provenance

FOLDER = Path(__file__).parent / "results"


def write(name: str, rows: list[dict[str, object]], *, beside_others: bool = False) -> Path:
    """Write rows to results/<name>.csv, replacing what was there; with `beside_others`, what this machine had there."""
    told = provenance()
    told = {name: told[name] for name in ("machine", "torch", "terncomm", "commit", "date")}
    path = FOLDER / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    kept: list[dict[str, object]] = []
    if beside_others and path.exists():
        with path.open(newline="") as file:
            kept = [dict(row) for row in csv.DictReader(file) if row["machine"] != told["machine"]]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *told])
        writer.writeheader()
        writer.writerows([*kept, *({**row, **told} for row in rows)])
    print(f"wrote {path}")
    return path
