"""A rank that flushes denormal numbers gets the same bits as the others. Functions up to the tests run on ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import ops
from terncomm.ops.denormals import kept
from terncomm.path.drivers import lockstep

TINY = 5e-39  # normal numbers begin at 1.18e-38
WAYS = {
    "exact": ("terngrad", {"warmup_steps": 9}),
    "bf16": ("bf16", {}),
    "terngrad": ("terngrad", {}),
    "int8": ("int8", {}),
}


class Scaled(nn.Module):
    """A layer whose gradient is as small as its factor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(300, 1000))

    def forward(self, factors):
        return (self.weight * factors).sum()


def factors(rank):
    generator = torch.Generator().manual_seed(rank)
    return TINY * torch.randn(300, 1000, generator=generator)


def averaged(engine, how, flushing):
    """The mean gradient. flushing: the ranks that flush denormal numbers."""
    codec, options = WAYS[how]
    rank = dist.get_rank()
    torch.set_num_threads(2)
    mine = factors(rank)
    torch.set_flush_denormal(rank in flushing)
    try:
        if engine == "ddp":
            model = DistributedDataParallel(Scaled())
            terncomm.register(model, codec, exempt=(), **options)
        else:
            model = Scaled()
            averager = terncomm.GradientAverager(model, codec, exempt=(), overlap=engine == "overlap", **options)
        model(mine).backward()
        if engine != "ddp":
            averager.reduce()
        return next(model.parameters()).grad.clone()
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("engine", ["ddp", "loop", "overlap"])
def test_ranks_agree_if_some_flush_denormal_numbers(on_ranks, engine, how):
    kept_by_all = on_ranks(2, averaged, engine, how, ())[0]
    assert ((kept_by_all != 0) & (kept_by_all.abs() < 1.17e-38)).any()
    one, other = on_ranks(2, averaged, engine, how, (1,))
    assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    assert one.any()


def test_the_mode_of_a_thread_is_left_as_it_was():
    def halved():
        return float(torch.tensor(TINY) / 2)

    assert halved() > 0
    numbers = torch.tensor([TINY, TINY])
    torch.set_flush_denormal(True)
    try:
        threads = torch.get_num_threads()
        with kept():
            assert halved() > 0
        assert halved() == 0
        assert torch.get_num_threads() == threads
        with pytest.raises(ValueError, match="boom"), kept():
            raise ValueError("boom")
        assert halved() == 0

        def path(number):
            yield from ()
            return number / 2

        results = lockstep([path(each) for each in numbers])
    finally:
        torch.set_flush_denormal(False)
    assert all(results)
    with kept():
        assert halved() > 0
    assert halved() > 0


def test_kernels_of_several_threads_keep_denormal_numbers():
    """Also those of threads that were started by a thread which flushes."""
    from terncomm.ops import cpu
    from terncomm.segments import Segments

    numel = 1 << 20
    threads = torch.get_num_threads()
    cpu._pool.cache_clear()
    torch.set_flush_denormal(True)
    torch.set_num_threads(2)
    try:
        found = torch.empty(numel)
        unit = ops.split_unit(torch.tensor([TINY], dtype=torch.float64))
        ops.decode(torch.ones(numel, dtype=torch.int32), Segments([numel]), unit, 0, found)
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        cpu._pool.cache_clear()
    assert (found > 0).all()
