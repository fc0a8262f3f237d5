"""The faults of test_faults.py in every other engine over process groups. Functions up to the tests run on ranks."""

import os
import re
import signal
import threading

import pytest
import torch
import torch.distributed as dist
from forked import run_job
from test_faults import TIMEOUT_S, VICTIM, backward, disturb, fail, kill, network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import terncomm

ENGINES = {"fsdp2": 3, "fsdp1": 3, "loop": 3, "overlap": 3, "nodes": 4}  # and their ranks
OPTIONS = {"codec": "terngrad", "exempt": (), "min_numel": 1}


def made(engine, ready=lambda: None, **options):
    """A step of this engine: a backward pass, with its gradients reduced. ready: called before terncomm connects."""
    options = OPTIONS | options
    model = network()
    if engine in ("loop", "overlap"):
        ready()
        averager = terncomm.GradientAverager(model, bucket_cap_mb=0.1, overlap=engine == "overlap", **options)

        def step():
            backward(model)
            averager.reduce()

        return step
    if engine == "nodes":
        nodes = [dist.new_group(node) for node in ([0, 1], [2, 3])]
        options["intra_group"] = nodes[dist.get_rank() // 2]
        model = DistributedDataParallel(model, bucket_cap_mb=0.1)
    elif engine == "fsdp1":
        cpu, strategy = torch.device("cpu"), ShardingStrategy.SHARD_GRAD_OP
        model = FullyShardedDataParallel(model, device_id=cpu, sharding_strategy=strategy)
    elif engine == "fsdp2":
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        options["replicas"] = mesh.get_group("replicate")
        fully_shard(model, mesh=mesh["shard"])
    ready()
    terncomm.register(model, **options)
    return lambda: backward(model)


def train(engine, stage, act):
    """Three good steps; in the fourth the victim acts."""
    step = made(engine)
    for number in range(6):
        if number == 3 and dist.get_rank() == VICTIM:
            disturb(stage, "before", act)
        step()


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def with_another_seed(engine):
    made(engine, seed=int(dist.get_rank() == VICTIM))


def never_registers(engine):
    made(engine, ready=lambda: os._exit(0) if dist.get_rank() == VICTIM else None)


def interrupted(engine):
    """Ctrl-C reaches every rank of a terminal's job."""
    step = made(engine)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in range(10_000):
        if number == 5:
            threading.Timer(0.05 + 0.01 * dist.get_rank(), os.kill, (os.getpid(), signal.SIGINT)).start()
        step()


# ---- tests -----------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.conformance
everywhere = pytest.mark.parametrize("engine", ENGINES)


def survivors(job):
    return [end for rank, end in enumerate(job) if rank != VICTIM]


@everywhere
@pytest.mark.parametrize("stage", ["share", "encode"])
def test_a_rank_that_is_killed_is_named(tmp_path, engine, stage):
    job = run_job(ENGINES[engine], train, engine, stage, kill, directory=tmp_path, timeout_s=TIMEOUT_S)
    assert job[VICTIM].status == -signal.SIGKILL
    for end in survivors(job):
        assert end.status == 1, end.text
        assert f"No word from rank {VICTIM}: killed, ended or stuck" in end.text
        assert "terminate called" not in end.text
        assert end.seconds - job[VICTIM].seconds < TIMEOUT_S


@pytest.mark.parametrize("act", [kill, fail])
def test_a_fault_with_replicas_ends_the_job(tmp_path, act):
    """Rank 3 has the same shard. The others wait in a collective of FSDP itself, which does not say why it fails."""
    job = run_job(4, train, "replicas", "encode", act, directory=tmp_path, timeout_s=TIMEOUT_S)
    assert all(end.status for end in job)
    if act is fail:
        assert re.search(r"rank 1 \(0 of its group\) failed in .* of step 3, encode: ValueError: boom\.", job[3].text)


@everywhere
def test_an_error_on_one_rank_reaches_all_in_its_own_words(tmp_path, engine):
    job = run_job(ENGINES[engine], train, engine, "encode", fail, directory=tmp_path, timeout_s=TIMEOUT_S)
    assert "ValueError: boom" in job[VICTIM].text
    for end in survivors(job):
        assert end.status == 1, end.text
        assert re.search(rf"rank {VICTIM} failed in .* of step 3, encode: ValueError: boom\.", end.text), end.text
        assert end.seconds - job[VICTIM].seconds < TIMEOUT_S


@everywhere
def test_a_rank_that_is_stopped_is_noticed_within_the_timeout(tmp_path, engine):
    arguments = {"directory": tmp_path, "timeout_s": TIMEOUT_S, "stopped": VICTIM}
    for end in survivors(run_job(ENGINES[engine], train, engine, "share", stop, **arguments)):
        assert end.status == 1, end.text
        assert f"No word from rank {VICTIM}" in end.text
        assert end.seconds < TIMEOUT_S + 5


@everywhere
def test_a_rank_that_never_comes_is_noticed(tmp_path, engine):
    for end in survivors(run_job(ENGINES[engine], never_registers, engine, directory=tmp_path, timeout_s=5)):
        assert end.status == 1, end.text
        assert end.seconds < 5 + 5


@everywhere
def test_another_option_on_one_rank_is_told_to_all(tmp_path, engine):
    for end in run_job(ENGINES[engine], with_another_seed, engine, directory=tmp_path, timeout_s=TIMEOUT_S):
        assert end.status == 1, end.text
        assert "seed: 0 on rank 0" in end.text or "No word from rank" in end.text
        assert end.seconds < TIMEOUT_S


@everywhere
def test_ctrl_c_ends_every_rank(tmp_path, engine):
    job = run_job(ENGINES[engine], interrupted, engine, directory=tmp_path, timeout_s=TIMEOUT_S, limit_s=30)
    for end in job:
        assert end.status != 0
        assert "terminate called" not in end.text
        assert end.seconds < 2 * TIMEOUT_S
