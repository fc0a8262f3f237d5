"""NaN and infinities on one rank: that layer, and no other, is non-finite on every rank, and nothing stays behind."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import Int8, Ternary

pytestmark = pytest.mark.conformance

WORLD_SIZE = 3
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
LAYERS = {"1.weight": "coded", "2.bias": "exact"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])


class Poison(torch.autograd.Function):
    """The gradient of `parameter` gets a bad element on its way."""

    @staticmethod
    def forward(ctx, parameter, value):
        ctx.value = value
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[gradient.numel() // 2] = ctx.value
        return gradient, None


def train(codec, layer, value, victim, cap):
    """Five steps with a GradScaler; in the third the victim's gradient of `layer` has a bad element."""
    rank = dist.get_rank()
    model = DistributedDataParallel(network(), bucket_cap_mb=cap)
    terncomm.register(model, codec, exempt=())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    poisoned = dict(model.module.named_parameters())[layer]
    number, kind = int(layer[0]), layer[2:]
    told = []
    for step in range(5):
        optimizer.zero_grad()
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + rank))
        module = model.module[number]
        plain = nn.Linear.forward
        if step == 2 and rank == victim:

            def forward(inputs, module=module):
                parameters = {"weight": module.weight, "bias": module.bias}
                parameters[kind] = Poison.apply(poisoned, value)
                return nn.functional.linear(inputs, **parameters)

            module.forward = forward
        scaler.scale(model(inputs).square().mean()).backward()
        module.forward = plain.__get__(module)
        gradients = {name: p.grad.clone() for name, p in model.module.named_parameters()}
        before = copy.deepcopy(model.module.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            scaler.step(optimizer)
            scaler.update()
        stepped = any(not torch.equal(before[n], p) for n, p in model.module.named_parameters())
        told.append((gradients, scaler.get_scale(), stepped))
    return told


@pytest.mark.parametrize("cap", [0.01, 25.0], ids=["many buckets", "one bucket"])
@pytest.mark.parametrize(
    ("codec", "bad"),
    [(Ternary(), "nan"), (Ternary(), "-inf"), (Ternary(clip=None), "inf"), (Int8(), "inf"), (Int8(block=500), "nan")],
    ids=repr,
)
def test_one_layer_is_lost_on_every_rank_and_the_step_is_skipped_in_step(on_ranks, bad, codec, cap):
    for layer in LAYERS:
        for victim in range(WORLD_SIZE):
            ranks = on_ranks(WORLD_SIZE, train, codec, layer, BAD[bad], victim, cap)
            for step in range(5):
                for told in ranks:
                    gradients, scale, stepped = told[step]
                    lost = {name for name, gradient in gradients.items() if not gradient.isfinite().all()}
                    assert lost == ({layer} if step == 2 else set()), (step, victim)
                    assert scale == (1024.0 if step < 2 else 512.0)
                    assert stepped == (step != 2)
                    for name, gradient in gradients.items():
                        other = ranks[0][step][0][name]
                        assert torch.equal(gradient.isfinite(), other.isfinite())
                        assert torch.equal(gradient.nan_to_num(), other.nan_to_num())
