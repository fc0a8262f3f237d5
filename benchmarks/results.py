"""Result rows as CSV files, each row with what it needs to be believed: machine, versions, commit, date."""

import csv
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import terncomm

FOLDER = Path(__file__).parent / "results"


def machine() -> str:
    """Processor and cores, in words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), model)
        flags = next((line.split() for line in cpuinfo.open() if line.startswith("flags")), [])
        model += next((f" ({flag})" for flag in ("avx512f", "avx2") if flag in flags), "")
    return f"{model}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit that is measured, with a mark if the library differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=FOLDER.parent, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "../terncomm") else "")


def write(name: str, rows: list[dict[str, object]]) -> Path:
    """Write rows to results/<name>.csv, replacing what was there."""
    told = {
        "machine": machine(),
        "torch": torch.__version__,
        "terncomm": terncomm.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    path = FOLDER / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *told])
        writer.writeheader()
        writer.writerows({**row, **told} for row in rows)
    print(f"wrote {path}")
    return path
