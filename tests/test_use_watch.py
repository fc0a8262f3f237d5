"""A hook that is registered and never called, a loop that never reduces: told once, after a hundred passes."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm.transports import LocalTransport


def passes(module, count):
    for _ in range(count):
        module(torch.ones(1, 8)).sum().backward()


def network():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def beside_its_ddp_model(registered):
    """Local SGD by mistake: the module is trained, and not the DDP model around it."""
    model = DistributedDataParallel(network())
    if registered:
        terncomm.register(model, "int8", min_numel=1, exempt=())
    else:
        model.register_comm_hook(terncomm.CommState("int8"), terncomm.comm_hook)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        passes(model.module, 99)
        early = len(told)
        passes(model.module, 150)
        with model.no_sync():
            passes(model, 3)
        passes(model, 2)
    return early, [str(each.message) for each in told if "no gradient was averaged" in str(each.message)]


def test_a_ddp_model_that_is_passed_by(on_ranks):
    first, second = on_ranks(2, beside_its_ddp_model, True)
    assert first[0] == second[0] == 0
    (text,) = first[1]
    assert "100 backward passes" in text
    assert "model.module or inside no_sync()" in text
    assert second[1] == [], "rank 0 speaks for all"


def test_a_loop_that_never_reduces():
    module = network()
    averager = terncomm.GradientAverager(module, "int8", *LocalTransport.world(1), min_numel=1, exempt=())
    passes(module, 99)
    with pytest.warns(UserWarning, match=r"100 backward passes.* when reduce\(\) is called"):
        passes(module, 1)
    passes(module, 200)
    averager.reduce()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_loop_that_reduces_is_not_told(overlap):
    module = network()
    averager = terncomm.GradientAverager(
        module, "int8", *LocalTransport.world(1), min_numel=1, exempt=(), overlap=overlap
    )
    passes(module, 1)
    averager.reduce()
    if not overlap:  # else it would be an error
        passes(module, 150)


def test_it_keeps_no_averager_alive():
    module = network()
    averager = terncomm.GradientAverager(module, "int8", *LocalTransport.world(1), min_numel=1, exempt=())
    known = weakref.ref(averager)
    del averager
    gc.collect()
    assert known() is None
    passes(module, 120)
