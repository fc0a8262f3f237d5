"""Gradients are, bit for bit, those that golden.json has digests of, in every engine. Functions run on ranks."""

import pytest
import torch
import torch.distributed as dist
from golden import (
    BUCKET_CAP_MB,
    NODES,
    PATHS,
    SEED,
    STEPS,
    Block,
    Case,
    Network,
    cases,
    compare,
    digests,
    gradients,
    in_a_loop,
    loops,
    paths,
    recorded,
    under_ddp,
    whole,
)
from test_fsdp1 import flat
from test_fsdp1 import whole as gathered_by_fsdp1
from test_horovod import built
from test_horovod import results as by_horovodrun
from test_mpi import pytestmark as with_mpi
from test_mpi import results as by_mpirun
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import TensorDataset

import terncomm
from terncomm.path.bucket import EXCHANGES
from terncomm.simulator import Experiment, Workload, simulate
from terncomm.transports import LocalTransport


def compare_ranks(engine, entry, by_rank):
    """All ranks hold what is recorded, and so the same."""
    for rank, found in enumerate(by_rank):
        compare(f"{engine}, rank {rank}", entry, found)


def compare_jobs(engine, by_rank):
    """What each rank has found of several entries."""
    assert by_rank[0], "there is something to compare"
    for entry in by_rank[0]:
        compare_ranks(engine, entry, [found[entry] for found in by_rank])


def by_ddp(exchange):
    return {case.entry: under_ddp(case, exchange=exchange) for case in cases(dist.get_world_size())}


def by_averager():
    return {case.entry: in_a_loop(case, rank=dist.get_rank()) for case in cases(dist.get_world_size())}


def by_fsdp(codec):
    case = Case(codec, dist.get_world_size())
    model = case.network()
    for module in (model.one, model.two, model):
        fully_shard(module)
    terncomm.register(model, **case.options)
    return case.run(dist.get_rank(), model)


def by_fsdp1(codec, strategy):
    case = Case(codec, dist.get_world_size())
    model = flat(strategy, case.network(), auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True)
    terncomm.register(model, **case.options)
    return case.run(dist.get_rank(), model, gathered=gathered_by_fsdp1)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ddp(on_ranks, world_size, exchange):
    compare_jobs(f"DDP, exchange={exchange}", on_ranks(world_size, by_ddp, exchange))


@pytest.mark.parametrize("entry", NODES)
def test_ddp_between_nodes(on_ranks, entry):
    compare_ranks("DDP, intra_group", entry, on_ranks(4, under_ddp, NODES[entry], 2))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("codec", ["terngrad", "int8"])
def test_fsdp2(on_ranks, codec, world_size):
    """Each rank's own shard, gathered; sums of "int8" return exactly."""
    entry = "int8 exact, W = 3" if (codec, world_size) == ("int8", 3) else Case(codec, world_size).entry
    compare_ranks("FSDP2", entry, on_ranks(world_size, by_fsdp, codec))


@pytest.mark.parametrize("codec", ["terngrad", "int8"])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_fsdp1(on_ranks, strategy, codec):
    compare_ranks(f"FSDP1, {strategy}", Case(codec, 2).entry, on_ranks(2, by_fsdp1, codec, strategy))


@pytest.mark.parametrize("world_size", [2, 3])
def test_loop_over_a_process_group(on_ranks, world_size):
    compare_jobs("GradientAverager over gloo", on_ranks(world_size, by_averager))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_loop_over_threads(world_size):
    compare_jobs("GradientAverager over threads", LocalTransport.run(world_size, loops))


@pytest.mark.parametrize("world_size", [2, 3])
def test_numpy_arrays(world_size):
    """Of arrays structure is not known: what travels exactly is named."""
    known = [case for case in cases(world_size) if case.dtype != torch.bfloat16]

    def work(transport, case):
        found = {}
        for step in range(STEPS):
            own = {n: g.numpy() for n, g in gradients(step, transport.rank, case.dtype).items()}
            terncomm.reduce_gradients(own, transport=transport, skip=("words", "head"), **case.options)
            found[f"step {step}"] = digests({name: torch.from_numpy(array) for name, array in own.items()})
        return found

    for case in known:
        found = LocalTransport.run(world_size, lambda transport: work(transport, case))
        compare_ranks("reduce_gradients of numpy arrays", case.entry, found)


@with_mpi
def test_loop_over_mpi(tmp_path):
    compare_jobs("GradientAverager over MPI", by_mpirun(3, tmp_path, "golden"))


@built
def test_horovod(tmp_path):
    compare_jobs("Horovod", by_horovodrun("gloo", 2, tmp_path, "golden"))


class Virtual(Network):
    """Knows the step and the worker by counting calls: workers take their turns."""

    def __init__(self, workers):
        super().__init__()
        self.workers, self.calls = workers, 0

    def forward(self, inputs):
        if not self.training:
            return torch.zeros(1)
        step, rank = divmod(self.calls, self.workers)
        self.calls += 1
        return super().forward(gradients(step, rank))


@pytest.mark.parametrize("codec", ["none", "terngrad", "int8"])
def test_simulation(codec):
    found = {}

    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            found[f"step {len(found)}"] = digests(whole(network))
            super().step(closure)

    network, data = Virtual(4), TensorDataset(torch.zeros(4 * STEPS), torch.zeros(4 * STEPS))
    workload = Workload(
        network=network, train=data, test=data, lr=1.0, optimizer=Noting, loss=lambda out, _: out.sum(), accuracy=None
    )
    options = {"workers": 4, "batch_size": 1, "epochs": 1, "seed": SEED, "bucket_cap_mb": BUCKET_CAP_MB}
    simulate(Experiment(codec=codec, **options), workload=workload)
    case = Case("terngrad", 4, warmup_steps=STEPS) if codec == "none" else Case(codec, 4)
    compare(f"simulate(codec={codec!r})", case.entry, found)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_path_itself(world_size, exchange):
    for entry, by_rank in paths(world_size, exchange).items():
        compare_ranks(f"all_reduce_mean over threads, exchange={exchange}", entry, by_rank)


def test_every_entry_is_compared():
    """What is recorded names no case that is gone."""
    known = {case.entry for world_size in (2, 3, 4) for case in cases(world_size)} | set(NODES)
    assert set(recorded()) == known | {f"{codec!r}, W = {w}" for codec in PATHS for w in (2, 3, 4, 5)}
