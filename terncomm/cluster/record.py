"""A run as one JSON line."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from terncomm.version import __version__


def append(path: Path, record: dict[str, object]) -> None:
    """Add a record of mode "cluster" to a file of JSON lines, with where it comes from."""
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


def provenance() -> dict[str, str | None]:
    """Versions, commit (None outside a checkout), machine and date."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        commit = None
    return {
        "terncomm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "machine": _machine(),
        "date": datetime.date.today().isoformat(),
    }


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    wide = next((f" ({flag})" for flag in ("avx512f", "avx2") if flag in flags), "")
    return f"{model}{wide}, {os.cpu_count()} cores"
