"""What a result needs to be believed: versions, commit, machine, date."""

import datetime
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from terncomm.version import __version__

_PACKAGE = Path(__file__).resolve().parent.parent


@cache
def machine() -> str:
    """Processor and cores, in words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
        model += next((f" ({flag})" for flag in ("avx512f", "avx2") if flag in flags), "")
    return f"{model}, {os.cpu_count()} cores"


@cache
def commit() -> str | None:
    """The commit of the checkout that terncomm runs from, with a + if the library differs from it; None elsewhere."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=_PACKAGE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        here = git("rev-parse", "--short", "HEAD") if git("ls-files", "version.py") else ""
        return here + ("+" if git("status", "--porcelain", "--", ".") else "") if here else None
    except OSError:
        return None


def provenance() -> dict[str, str | None]:
    """For a record: plain words."""
    return {
        "terncomm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
    }
