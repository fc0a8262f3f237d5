"""The hook takes at most 1.25 times the largest bucket, at W = 8."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs, as on Linux")
def test_peak_memory_beside_the_bucket():
    # The greediest cases: uncompressed gradients, and 8-bit codes of 16-bit ones. test_path.py has the other types.
    options = ["--json", "--megabytes", "16", "--dtypes", "bfloat16", "--codecs", "int8", "exact"]
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "memory.py"), *options],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["codec"] for row in rows] == ["int8", "exact"]
    for row in rows:
        assert row["world_size"] == 8
        assert row["bucket_mb"] > 15
        assert 0.1 < row["times_bucket"] <= 1.25, row
