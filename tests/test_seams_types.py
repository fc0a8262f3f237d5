"""That every rank decodes the same is a matter of types: mypy refuses what no rank has agreed on."""

import subprocess
import sys

import pytest
from jobs import ROOT

pytest.importorskip("mypy")

PROGRAM = """
import torch
from terncomm.codecs.base import Agreed, IntegerCodec, Local
from terncomm.segments import Segments


def back(codec: IntegerCodec, totals: torch.Tensor, segments: Segments, mine: Local, ours: Agreed) -> torch.Tensor:
    return codec.decode(totals, segments, {name}, 2, out=torch.empty(3))
"""


@pytest.mark.parametrize(("name", "accepted"), [("ours", True), ("mine", False), ("torch.ones(3)", False)])
def test_decoding_takes_what_all_ranks_agreed_on_alone(tmp_path, name, accepted):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("{name}", name))
    cache = ROOT / ".mypy_cache"  # tests/run.sh has filled it
    command = [sys.executable, "-m", "mypy", f"--cache-dir={cache}", f"--config-file={ROOT / 'pyproject.toml'}"]
    ran = subprocess.run([*command, str(program)], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert (ran.returncode == 0) == accepted, ran.stdout + ran.stderr
    assert ('expected "Agreed"' in ran.stdout) != accepted, ran.stdout + ran.stderr
