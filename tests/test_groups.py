"""Models whose process group is not the default one. Functions up to the tests run on ranks."""

import os
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import CommState

RANKS = [0, 1]


def gradient(model):
    model(torch.full((1, 64), dist.get_rank() + 1.0)).sum().backward()
    return model.module.weight.grad


def crosswise():
    """Two equal models on groups of their own, whose first gradients come in another order on each rank."""
    models = [
        DistributedDataParallel(nn.Linear(64, 64, bias=False), process_group=dist.new_group(RANKS)) for _ in range(2)
    ]
    for model in models:
        model.register_comm_hook(CommState("terngrad"), terncomm.comm_hook)
    told = []
    for model in models[:: 1 if dist.get_rank() == 0 else -1]:
        with pytest.raises(Exception, match="process group of its own") as error:
            gradient(model)
        told.append(str(error.value))
    return told


def of_a_group(given):
    """The gradient of a model on a group of its own. given: which group its state has."""
    mine, other = dist.new_group(RANKS), dist.new_group(RANKS)
    model = DistributedDataParallel(nn.Linear(64, 64, bias=False), process_group=mine)
    state = CommState("terngrad", process_group=mine if given == "its own" else other)
    model.register_comm_hook(state, terncomm.comm_hook)
    if given == "its own":
        return gradient(model)
    with pytest.raises(Exception, match="and CommState has another, over ranks 0, 1"):
        gradient(model)


def of_the_default_group(named):
    """The default group may be given by its name, by itself, or not at all."""
    group = dist.group.WORLD if named else None
    model = DistributedDataParallel(nn.Linear(64, 64, bias=False), process_group=group)
    model.register_comm_hook(
        CommState("terngrad", process_group=None if named else dist.group.WORLD), terncomm.comm_hook
    )
    return gradient(model)


def lazy():
    """The gradient of a model on a group whose ranks connect when they first send."""
    with mock.patch.dict(os.environ, TORCH_GLOO_LAZY_INIT="1"):
        group = dist.new_group(RANKS, timeout=timedelta(seconds=10))
        model = DistributedDataParallel(nn.Linear(64, 64, bias=False), process_group=group)
        terncomm.register(model, "terngrad", exempt=())
        return gradient(model)


def test_a_group_that_connects_lazily(on_ranks):
    one, other = on_ranks(2, lazy)
    assert one.any()
    assert torch.equal(one, other)


def test_a_group_that_the_plain_pair_was_not_given_is_told(on_ranks):
    for told in on_ranks(2, crosswise):
        for text in told:
            assert "CommState has the default one, over ranks 0, 1: give CommState(process_group=), or use" in text


def test_a_group_that_the_plain_pair_was_given_is_compared(on_ranks):
    for mean in on_ranks(2, of_a_group, "its own"):
        assert mean.mean().item() == pytest.approx(1.5, rel=0.03)
    on_ranks(2, of_a_group, "another")


@pytest.mark.parametrize("named", [True, False])
def test_the_default_group_need_not_be_given(on_ranks, named):
    one, other = on_ranks(2, of_the_default_group, named)
    assert torch.equal(one, other)
