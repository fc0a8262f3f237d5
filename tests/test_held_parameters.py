"""Parameters that are frozen, thawed, ignored by DDP or empty. Functions up to the tests run on ranks."""

import logging
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_ddp_hook import backward, gradients, mlp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

import terncomm
from terncomm import ops
from terncomm.transports import LocalTransport


def registered(network, frozen, **options):
    """A model that is registered while its first layers are frozen, and thawed afterwards."""
    model = DistributedDataParallel(network)
    network[:frozen].requires_grad_(False)
    state = terncomm.register(model, "terngrad", **options)
    network.requires_grad_(True)
    return model, state


def thawed():
    found = []
    for frozen in (0, 3):
        model, state = registered(mlp(), frozen, skip=["0"])
        backward(model, 0, dist.get_rank())
        found.append((gradients(model.module), state.stats()["coded_numel"]))
        assert state.layers.names == [name for name, _ in model.module.named_parameters()]
    return found


class Unused(nn.Module):
    """A network, and before it a parameter that nothing uses."""

    def __init__(self, dtype):
        super().__init__()
        self.side = nn.Module()
        self.side.unused = nn.Parameter(torch.ones(8, 8).to(dtype))
        self.body = mlp()

    def forward(self, inputs):
        return self.body(inputs)


def ignored(kind):
    network = Unused(torch.float32 if kind == "float32" else torch.float8_e4m3fn)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, ["side.unused"])
    model = DistributedDataParallel(network)
    if kind == "pair":
        named = model.module.named_parameters()
        model.register_comm_hook(terncomm.CommState(named_parameters=named), terncomm.comm_hook)
    else:
        state = terncomm.register(model, "terngrad")
        assert "side.unused" not in state.layers.names
    backward(model, 0, dist.get_rank())
    assert network.side.unused.grad is None
    return gradients(network.body)


class Holding(nn.Module):
    """A layer and an empty parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64, bias=False)
        self.empty = nn.Parameter(torch.empty(0, 5))

    def forward(self, inputs):
        return self.layer(inputs) + self.empty.sum()


def empty():
    model = DistributedDataParallel(Holding())
    state = terncomm.register(model, "terngrad", exempt=())
    model(torch.randn(4, 64)).sum().backward()
    assert model.module.empty.grad.shape == (0, 5)
    return state.stats()["coded_numel"]


def with_a_graph(how):
    """The gradient of a layer where each backward pass makes a graph of its own."""
    found = []
    for create_graph in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Linear(64, 64, bias=False))
        if how == "plain":
            terncomm.register(model, "terngrad", exempt=(), warmup_steps=1)
        else:
            terncomm.register(model, how, exempt=())
        inputs = torch.full((4, 64), dist.get_rank() + 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: a graph that is kept may leak
            model(inputs).pow(2).mean().backward(create_graph=create_graph)
        found.append(model.module.weight.grad.detach())
    return found


def test_a_parameter_that_was_frozen_at_registration_has_its_name_and_its_noise(on_ranks):
    for (always, coded), (late, as_many) in on_ranks(2, thawed):
        assert all(map(torch.equal, always, late))
        assert coded == as_many


@pytest.mark.parametrize("kind", ["float8", "float32", "pair"])
def test_a_parameter_that_ddp_ignores_is_ignored(on_ranks, kind):
    one, other = on_ranks(2, ignored, kind)
    assert all(map(torch.equal, one, other))


def test_an_empty_parameter_is_no_trouble(on_ranks):
    assert on_ranks(2, empty) == [64 * 64] * 2


@pytest.mark.parametrize("how", ["plain", "terngrad", "int8"])
def test_a_backward_pass_may_make_a_graph(on_ranks, how):
    for without, made in on_ranks(2, with_a_graph, how):
        assert torch.equal(without, made)


def test_freezing_does_not_change_the_noise_of_the_others():
    """In a training loop, where a new averager is made after each change."""
    networks = {(rank, frozen): mlp() for rank in (0, 1) for frozen in (0, 3)}

    def work(transport):
        found = []
        for frozen in (0, 3):
            network = networks[transport.rank, frozen]
            network[:frozen].requires_grad_(False)
            averager = terncomm.GradientAverager(network, "terngrad", transport)
            backward(network, 0, transport.rank)
            averager.reduce()
            found.append(gradients(network))
        return found

    for whole, part in LocalTransport.run(2, work):
        assert part[0] is None
        assert all(torch.equal(a, b) for a, b in zip(whole[-6:], part[-6:], strict=True))


def test_only_what_requires_a_gradient_is_judged_and_compared():
    network = mlp()
    network[0].weight.requires_grad_(False)
    frozen = nn.Parameter(torch.ones(40, 40).to(torch.float8_e4m3fn), requires_grad=False)
    state = terncomm.CommState(named_parameters=[("eighth", frozen), *network.named_parameters()])
    state.check_dtypes()
    assert state.layers.names[:2] == ["eighth", "0.weight"]
    assert not {"eighth", "0.weight"} & state.layers.coded_names.keys()
    assert "2.weight" in state.layers.coded_names
    frozen.requires_grad_(True)
    with pytest.raises(TypeError, match=r"eighth is torch\.float8_e4m3fn"):
        state.check_dtypes()


def other_hooks():
    """What `register` says of models that take DDP's only hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses what is deprecated
        from torch.distributed.optim import _apply_optimizer_in_backward
    told = []
    mixed = _MixedPrecision(param_dtype=torch.bfloat16)
    stepping = nn.Linear(8, 8)
    _apply_optimizer_in_backward(torch.optim.SGD, stepping.parameters(), {"lr": 0.1})
    logging.getLogger("torch").setLevel(logging.ERROR)  # torch says which mixed precision it was given
    for network, options in ((nn.Linear(8, 8), {"mixed_precision": mixed}), (stepping, {})):
        with pytest.raises(RuntimeError) as error:
            terncomm.register(DistributedDataParallel(network, **options), "int8")
        told.append(str(error.value))
    logging.getLogger("torch").setLevel(logging.WARNING)
    return told


def test_what_takes_the_only_hook_is_named(on_ranks):
    for mixed, stepping in on_ranks(2, other_hooks):
        assert "DistributedDataParallel(mixed_precision=) reduces gradients by a communication hook of its own" in mixed
        assert "torch.autocast" in mixed
        assert "an optimizer runs inside the backward pass of this model" in stepping


@pytest.mark.parametrize(("device", "compiled"), [("cpu", True), ("meta", True), ("cuda", False)])
def test_kernels_of_the_cpu_are_compiled_for_the_cpu(device, compiled):
    with mock.patch.object(ops, "compile_kernels") as compile_kernels:
        state = terncomm.CommState("int8")
        state.get_ready(torch.device(device))
    assert compile_kernels.called == compiled
