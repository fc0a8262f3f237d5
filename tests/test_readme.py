"""The README says what the committed rows say, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_rendered_from_rows():
    check = [sys.executable, str(ROOT / "benchmarks" / "render.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_the_last_example_runs():
    """The snippet of `How it works`, as it stands."""
    snippet = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[-1]
    scope: dict[str, object] = {}
    exec(snippet.replace("LocalTransport.run(4", "result = LocalTransport.run(4"), scope)
    ranks = scope["result"]
    assert len(ranks) == 4
    assert all((ranks[0] == rank).all() for rank in ranks)
