"""A rank that runs another number of backward passes than the others is told of when it happens, not at the end."""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm.hooks.rhythm import Rhythm
from terncomm.transports import LocalTransport


def under_ddp(passes):
    """Whether it was told, after each pass. passes: for each rank, how many between optimizer steps."""
    model = DistributedDataParallel(nn.Linear(8, 8))
    terncomm.register(model, "int8", min_numel=1, exempt=())
    optimizer = torch.optim.Adam(model.parameters())
    told = []
    for count in passes[dist.get_rank()]:
        for _ in range(count):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(torch.ones(1, 8)).sum().backward()
                optimizer.zero_grad(set_to_none=False)  # the mean of the last bucket is there
            told.append([str(each.message) for each in caught if "different numbers" in str(each.message)])
        optimizer.step()
    return told


def test_an_extra_pass_under_ddp(on_ranks):
    first, second = on_ranks(2, under_ddp, [(2, 2, 2, 2), (2, 3, 2, 1)])
    assert [bool(each) for each in first] == [False] * 5 + [True] + [False] * 2, "after rank 1's next step, and once"
    ((text,),) = [each for each in first if each]
    assert "before their last optimizer step: 2 on rank 0; 3 on rank 1." in text
    assert not any(second), "rank 0 speaks for all"


def test_equal_passes_are_not_told_of(on_ranks):
    for told in on_ranks(2, under_ddp, [(1, 3, 2)] * 2):
        assert not any(told)


def test_a_loop_over_threads():
    """Without an optimizer nothing is known; with one, a missing change of the weights is told of."""

    def work(transport, changes):
        module = nn.Linear(8, 8)
        averager = terncomm.GradientAverager(module, "int8", transport, min_numel=1, exempt=())
        with torch.no_grad():
            for step in range(5):
                module.weight.grad, module.bias.grad = torch.ones(8, 8), torch.ones(8)
                averager.reduce()
                if changes and not (step == 2 and transport.rank == 1):
                    module.weight.add_(1)
        return averager._rhythm._told

    assert LocalTransport.run(1, lambda transport: work(transport, True)) == [False]
    assert LocalTransport.run(2, lambda transport: work(transport, False)) == [False] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert LocalTransport.run(2, lambda transport: work(transport, True)) == [True] * 2


def test_ranks_whose_weights_have_not_changed_are_not_compared():
    rhythm = Rhythm()
    weight = torch.zeros(3)
    values = []
    for step in range(6):
        rhythm.begin([weight])
        values.append(rhythm.value)
        if step in (1, 4):
            weight += 1
    assert values == [0, 0, 2, 2, 2, 3]
    assert rhythm.complaint([0, 2, 0, 2]) is None
    assert rhythm.complaint([]) is None
    assert "optimizer step: 2 on node 1, 4; 3 on node 3." in rhythm.complaint([0, 2, 0, 3, 2], "node")
    assert rhythm.complaint([2, 3]) is None, "once"


def uneven(epochs):
    """Two epochs of DDP's join(), in which the ranks have different numbers of batches."""
    model = DistributedDataParallel(nn.Linear(8, 8))
    terncomm.register(model, "int8", min_numel=1, exempt=())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batches in epochs:
            with model.join():
                for _ in range(batches[dist.get_rank()]):
                    model(torch.ones(1, 8)).sum().backward()
                    optimizer.step()
    return [str(each.message) for each in caught if "different numbers" in str(each.message)]


def test_ranks_that_have_joined_are_not_told_of(on_ranks):
    assert on_ranks(3, uneven, [(5, 2, 4), (3, 6, 2), (4, 4, 4)]) == [[]] * 3
