"""The MPI transport, under a real mpirun; `mpi_job.py` is what its ranks run."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs import ROOT, ended, read, torchrun
from mpi_job import digest

from terncomm.transports import LocalTransport, MPITransport

HERE = Path(__file__).parent
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or MPIRUN is None, reason="needs mpi4py and mpirun: pip install .[mpi]"
)


def mpirun(ranks, *arguments, limit_s=120):
    """A finished job of so many ranks."""
    paths = os.pathsep.join([str(HERE), str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [str(MPIRUN), "-n", str(ranks), sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )


def results(ranks, folder, *arguments):
    """What every rank of tests/mpi_job.py has found."""
    done = mpirun(ranks, HERE / "mpi_job.py", folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What the first ranks of one job have found, by case and number of ranks: see `mpi_job.TOGETHER`."""
    told = results(4, tmp_path_factory.mktemp("together"), "together")
    return lambda case, ranks: [told[rank][f"{case} {ranks}"] for rank in range(ranks)]


@pytest.mark.conformance
@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_arrive_in_rank_order(together, ranks):
    assert together("conformance", ranks) == ["fine"] * ranks


@pytest.mark.parametrize(("ranks", "codec"), [(4, "terngrad"), (2, "int8")])
def test_the_same_bits_as_over_threads(together, ranks, codec):
    """And so as the DDP hook's: tests/test_loop.py."""
    wanted = LocalTransport.run(ranks, lambda transport: digest(transport, codec))
    assert len(set(wanted)) == 1
    assert wanted[0] != hashlib.sha256().hexdigest()
    assert together("digest", ranks) == wanted


def test_a_rank_that_calls_otherwise_later_is_told(together):
    for told in together("otherwise", 2):
        assert "Rank 1 begins with new parameters, types or options, and rank 0 reduces gradients as before" in told


@pytest.mark.parametrize(("how", "said"), [("raises", "KeyError: 'rank 1 broke'"), ("killed", "")])
def test_a_rank_that_ends_ends_the_job(how, said, tmp_path):
    began = time.monotonic()
    done = mpirun(3, HERE / "mpi_job.py", tmp_path, how)
    assert done.returncode != 0
    assert said in done.stderr
    assert time.monotonic() - began < 45, "long before the transport's timeout of 60 s"


def test_a_rank_that_leaves_is_named_to_the_others(tmp_path):
    done = mpirun(3, HERE / "mpi_job.py", tmp_path, "leaves")
    assert done.returncode != 0
    told = [json.loads(path.read_text()) for path in tmp_path.glob("told-*")]
    assert told, done.stdout + done.stderr
    for text, waited_s in told:
        assert "rank 1 has ended" in text
        assert waited_s < 10, "long before the timeout of 60 s"


def test_a_launcher_that_mpi_does_not_know_is_told(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(
        "import terncomm\nfrom mpi4py import MPI\nprint(terncomm.transports.MPITransport(MPI.COMM_SELF).world_size)\n"
        "terncomm.transports.MPITransport()\n"
    )
    job = torchrun(script)
    text, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "a launcher has started 2 processes (WORLD_SIZE), but MPI (" in text
    assert "start them with " in text
    assert "or give comm=MPI.COMM_SELF" in text
    assert "1\n" in text, "a communicator that is given is taken"


def test_a_rank_that_is_silent_is_waited_for_no_longer_than_the_timeout(tmp_path):
    done = mpirun(2, HERE / "mpi_job.py", tmp_path, "silent")
    first, second, waited_s = json.loads(done.stdout.splitlines()[0])
    assert "not all of 2 ranks have come within 0.5 s" in first
    assert "an earlier exchange over MPI failed" in second
    assert 0.5 <= waited_s < 3


def test_after_an_interrupt_no_call_is_answered(tmp_path):
    done = mpirun(2, HERE / "mpi_job.py", tmp_path, "interrupted")
    assert "an earlier exchange over MPI failed, so none can follow: KeyboardInterrupt" in done.stdout


def test_training_over_mpi_is_training_with_ddp(tmp_path):
    """The two example programs, one seed: what is learned is the same, to the order in which evaluations are added."""
    words = ["--codec", "int8", "--epochs", 1, "--metrics"]
    done = mpirun(2, ROOT / "launch" / "train_mpi.py", *words, tmp_path / "mpi")
    assert done.returncode == 0, done.stderr
    assert "epoch   1/1" in done.stdout
    ended(torchrun(ROOT / "launch" / "train.py", *words, tmp_path / "ddp"))
    (mpi,), (ddp,) = read(tmp_path / "mpi"), read(tmp_path / "ddp")
    assert mpi["test_accuracy"] == ddp["test_accuracy"]
    for name in ("train_loss", "test_loss"):
        assert mpi[name] == pytest.approx(ddp[name], rel=1e-5)
    assert mpi["world_size"] == 2
    assert 0 < mpi["wire_bytes"] < mpi["raw_bytes"] / 3


def test_data_that_are_not_there_end_the_job_with_one_line():
    done = mpirun(2, ROOT / "launch" / "train_mpi.py", "--data", "nope")
    assert done.returncode != 0
    assert done.stderr.count("train_mpi.py: unknown data 'nope'") == 1


def test_bad_timeout():
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
        MPITransport(timeout_s=0)


def test_without_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install mpi4py mpich"):
        MPITransport()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("codec", ["terngrad", "int8"])
def test_cuda_gradients_are_staged_through_the_host(codec, tmp_path):
    assert len(set(results(2, tmp_path, "digest", codec, "cuda"))) == 1
