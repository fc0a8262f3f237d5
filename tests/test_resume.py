"""A run that was killed and resumed is the uninterrupted run, bit for bit. Functions up to the tests run on ranks."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from forked import run_job
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import terncomm

pytestmark = pytest.mark.conformance

STEPS, SAVED, KILLED = 12, 5, 8


def train(codec, directory, killed=None, cap=0.02):
    """Train to STEPS, from the checkpoint if there is one; rank 0 saves one after SAVED steps."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    model = DistributedDataParallel(network, bucket_cap_mb=cap)
    state = terncomm.register(model, codec, seed=3, warmup_steps=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    begin, path = 0, directory / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path)  # with its defaults: plain tensors and numbers
        begin = saved["step"]
        for part, name in ((network, "network"), (optimizer, "optimizer"), (state, "state")):
            part.load_state_dict(saved[name])
    losses = []
    for step in range(begin, STEPS):
        if step == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        inputs = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * step + rank))
        optimizer.zero_grad()
        loss = functional.mse_loss(model(inputs), inputs.repeat(1, 2).tanh())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if rank == 0 and step + 1 == SAVED:
            parts = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "state": state.state_dict()}
            torch.save({"step": step + 1, **parts}, path)
    torch.save((torch.cat([p.detach().flatten() for p in network.parameters()]), losses), directory / f"end-{rank}.pt")
    assert state.state_dict() == {"step": STEPS - 1, "seed": 3, "enabled": True}


def ends(directory, world_size):
    """Parameters at the end, equal on all ranks, and the mean loss of each step."""
    told = [torch.load(directory / f"end-{rank}.pt") for rank in range(world_size)]
    for parameters, _ in told:
        assert torch.equal(parameters, told[0][0])
    return told[0][0], torch.tensor([losses for _, losses in told]).mean(0)


# ---- tests -----------------------------------------------------------------------------------------------------------


def run(world_size, directory, codec, *args):
    job = run_job(world_size, train, codec, directory, *args, directory=directory)
    return [end.status for end in job], "\n".join(end.text for end in job)


@pytest.fixture(scope="module", params=["terngrad", "int8"])
def whole(request, tmp_path_factory):
    """The codec, and how an uninterrupted run of four ranks ends."""
    directory = tmp_path_factory.mktemp("whole")
    statuses, text = run(4, directory, request.param)
    assert statuses == [0] * 4, text
    return request.param, *ends(directory, 4)


@pytest.fixture
def left(whole, tmp_path):
    """What a job leaves all of whose ranks are killed after the checkpoint."""
    statuses, _ = run(4, tmp_path, whole[0], KILLED)
    assert statuses == [-signal.SIGKILL] * 4
    assert (tmp_path / "checkpoint.pt").exists()
    return tmp_path


def test_a_killed_run_resumes_to_the_same_bits(whole, left):
    codec, parameters, losses = whole
    statuses, text = run(4, left, codec)
    assert statuses == [0] * 4, text
    found, later = ends(left, 4)
    assert torch.equal(found, parameters)
    assert torch.equal(later, losses[SAVED:])


def test_a_resume_at_another_world_size_trains(whole, left):
    codec, parameters, losses = whole
    statuses, text = run(3, left, codec)
    assert statuses == [0] * 3, text
    found, later = ends(left, 3)
    assert not torch.equal(found, parameters)
    assert later[-1] < 0.8 * losses[SAVED]
    assert later[-1] == pytest.approx(losses[-1].item(), rel=0.25)


def test_the_size_of_buckets_changes_nothing(whole, tmp_path):
    codec, parameters, losses = whole
    statuses, text = run(4, tmp_path, codec, None, 25)
    assert statuses == [0] * 4, text
    found, again = ends(tmp_path, 4)
    assert torch.equal(found, parameters)
    assert torch.equal(again, losses)
