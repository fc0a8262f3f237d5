"""Frameworks that wrap DDP: each with its recipe from the README, on two processes; `frameworks_job.py` is the job."""

import importlib.util
import json

import pytest
from jobs import ROOT, ended, read, torchrun


def run(what, package, folder):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: tests/engines.sh")
    ended(torchrun(ROOT / "tests" / "frameworks_job.py", folder, what))
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("what", "package", "steps"),
    [
        ("lightning", "lightning", 8),
        ("fabric", "lightning", 4),
        ("accelerate", "accelerate", 4),
        ("trainer", "transformers", 8),
    ],
)
def test_the_hook_is_called_once_for_what_is_accumulated(what, package, steps, tmp_path):
    for found in run(what, package, tmp_path):
        assert found["steps"] == steps
        assert found["coded_numel"] == steps * 32 * 64, "one layer has 1024 elements or more"
        assert found["same"]
        if "resumed" in found:
            assert found["resumed"] == {"lightning": 11, "trainer": 9}[what]
            assert found["again"] == {"lightning": 15, "trainer": 11}[what]
            assert [each["step"] for each in read(tmp_path / "steps")][:steps] == list(range(steps))
