"""Horovod's optimizer over real horovodrun and mpirun; `horovod_job.py` is what its ranks run.

Horovod is no wheel: `launch/build_horovod.sh` builds it, and `tests/engines.sh` runs this file where it is built.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs import ROOT
from mpi_job import digest

from terncomm.horovod import DistributedOptimizer
from terncomm.transports import HorovodTransport, LocalTransport

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
built = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not built: launch/build_horovod.sh"
)


def launched(launcher, ranks, *arguments, limit_s=120):
    """A finished job of so many ranks."""
    start = {
        "gloo": [BIN / "horovodrun", "--gloo", "-np", ranks],
        "mpi": [shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ['PATH']}"), "-np", ranks],
    }[launcher]
    if launcher == "mpi":
        import horovod.torch as hvd

        if not hvd.mpi_built():
            pytest.skip("Horovod was built without MPI")
    paths = os.pathsep.join([str(HERE), str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [*map(str, start), sys.executable, *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=limit_s,
    )


def results(launcher, ranks, folder, *arguments):
    """What every rank of tests/horovod_job.py has found."""
    done = launched(launcher, ranks, HERE / "horovod_job.py", folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(ranks)]


@built
@pytest.mark.parametrize(("launcher", "ranks"), [("gloo", 3), ("mpi", 2)])
def test_the_same_bits_as_over_threads_and_horovods_own_semantics(launcher, ranks, tmp_path):
    """In one job, for it takes long to start one. The bits are those of the DDP hook: tests/test_loop.py."""
    found = results(launcher, ranks, tmp_path, "together")
    for codec in ("terngrad", "int8"):
        wanted = LocalTransport.run(ranks, lambda transport, codec=codec: digest(transport, codec))
        assert [each[codec] for each in found] == wanted


@built
def test_ranks_that_are_not_in_step_are_told(tmp_path):
    results("gloo", 2, tmp_path, "out_of_step")


@built
def test_the_example_trains():
    done = launched("gloo", 2, ROOT / "launch" / "train_horovod.py", "--epochs", 2, "--codec", "int8")
    assert done.returncode == 0, done.stdout + done.stderr
    epochs = re.findall(r"epoch +(\d)/2  train loss ([0-9.]+)  sent +([0-9.]+) MB/rank", done.stdout)
    assert [number for number, _, _ in epochs] == ["1", "2"]
    losses, sent = [float(loss) for _, loss, _ in epochs], [float(mb) for _, _, mb in epochs]
    assert losses[1] < losses[0] / 2
    assert 0 < sent[0] < sent[1]


@built
@pytest.mark.parametrize(("how", "said"), [("raises", "KeyError: 'rank 1 broke'"), ("killed", "")])
def test_a_rank_that_ends_ends_the_job(how, said, tmp_path):
    began = time.monotonic()
    done = launched("gloo", 2, HERE / "horovod_job.py", tmp_path, how)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert time.monotonic() - began < 45


@built
def test_a_rank_that_is_silent_is_waited_for_no_longer_than_the_timeout(tmp_path):
    launched("gloo", 2, HERE / "horovod_job.py", tmp_path, "silent")
    assert (tmp_path / "told").exists()


def test_without_horovod(monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ModuleNotFoundError, match=r"build_horovod\.sh"):
        DistributedOptimizer(torch.optim.SGD(model.parameters()), model)
    with pytest.raises(ModuleNotFoundError, match=r"build_horovod\.sh"):
        HorovodTransport()


def test_bad_timeout():
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
        HorovodTransport(timeout_s=0)
