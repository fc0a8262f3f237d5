"""A codec of the user's own by "FILE.py:NAME", where codecs have names."""

import sys

import pytest
import torch
from train import parse_arguments

import terncomm
from terncomm.cli import main
from terncomm.codecs import Rules, codec_for
from terncomm.simulator.plan import advice
from terncomm.simulator.reductions import family

FILE = """
from dataclasses import dataclass, field

from beside import CLIP
from terncomm import Ternary


@dataclass(frozen=True, kw_only=True)
class Mine(Ternary):
    clip: float = CLIP

    name = "mine"


@dataclass(frozen=True)
class Needs(Ternary):
    more: int = field(kw_only=False)


made = Mine(clip=3.0)
number = 3
"""


@pytest.fixture
def own(tmp_path):
    """FILE.py, with a file beside it that it imports."""
    (tmp_path / "beside.py").write_text("CLIP = 2.0\n")
    (tmp_path / "codec.py").write_text(FILE)
    return tmp_path / "codec.py"


def test_a_class_or_a_codec_of_a_file(own):
    mine, made = codec_for(f"{own}:Mine"), codec_for(f"{own}:made")
    assert (mine.clip, made.clip, type(mine)) == (2.0, 3.0, type(made))
    assert mine == codec_for(f"{own}:Mine"), "the file is loaded once"
    assert Rules.of({"head": f"{own}:Mine", "default": "int8"}).pairs[0][1] == mine
    assert terncomm.testing.check_codec(f"{own}:Mine")
    assert family(f"{own}:Mine") == f"{own}:Mine", "it is no kind of TernGrad"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("codec.py:Other", r"codec\.py has no 'Other'"),
        ("gone.py:Mine", r"gone\.py is not a file; wanted: FILE\.py:Mine"),
        ("broken.py:Mine", r"broken\.py:Mine: ZeroDivisionError: division by zero"),
        ("codec.py:number", r"codec\.py:number: codec must be a name or a terncomm codec, got 3"),
        ("codec.py:Needs", r"codec\.py:Needs: .*missing 1 required"),
    ],
)
def test_what_is_not_there_is_told(own, name, words):
    (own.parent / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=words):
        codec_for(str(own.parent / name))


def test_it_is_planned_with_a_cost_of_its_own(own, capsys):
    name = f"{own}:Mine"
    words = [
        "plan",
        "resnet50",
        "--workers",
        "4",
        "--links",
        "100mbit",
        "--device",
        "cpu-core",
        "--codecs",
        name,
        "terngrad",
    ]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert f"cost of {name}: measured now" in told
    own_row, named = (next(line for line in told.splitlines() if line.startswith(each)) for each in (name, "terngrad"))
    assert own_row.removeprefix(name).split()[0] == named.split()[1], "as many bytes"
    assert own_row.split()[2:] != named.split()[2:], "another cost"
    assert advice({"none": 9.0, name: 1.0, "terngrad": 1.05})[0] == "terngrad", "the known noise is preferred"


def test_it_is_simulated(own, tmp_path, capsys):
    words = ["simulate", "--codecs", f"{own}:Mine", "--workers", "2", "--epochs", "1", "--steps-per-epoch", "2"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert f"{own}:Mine" in capsys.readouterr().out


def test_the_training_script_takes_it(own, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--codec", f"{own}:Mine"])
    assert parse_arguments().codec == f"{own}:Mine"
    monkeypatch.setattr(sys, "argv", ["train.py", "--codec", "ternary"])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert "--codec: wanted none, fp16, bf16, int8, terngrad, or FILE.py:CLASS, got ternary" in capsys.readouterr().err


def test_bits_are_those_of_the_codec(own):
    def work(transport, codec):
        gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(transport.rank))
        terncomm.reduce_gradients([gradient], codec, transport, exempt=())
        return gradient

    from terncomm.transports import LocalTransport

    found = LocalTransport.run(2, lambda transport: work(transport, f"{own}:made"))
    wanted = LocalTransport.run(2, lambda transport: work(transport, terncomm.Ternary(clip=3.0)))
    assert torch.equal(found[0], wanted[0])
