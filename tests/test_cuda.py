"""The hook on CUDA tensors: one device, gloo among 2 to 4 ranks, NCCL alone. Functions up to the tests run on ranks."""

import pytest
import torch
import torch.distributed as dist
from forked import run_job
from laws import gaussian, same_bits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm import Int8, Ternary
from terncomm.keys import Key
from terncomm.reduce import all_reduce_mean
from terncomm.segments import Segments
from terncomm.transports import LocalTransport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
LAYERS = [64 * 64, 64, 96 * 64, 96]


class Given(nn.Module):
    """Its gradient is what it is called with, exactly, so that devices can be compared bit for bit."""

    def __init__(self):
        super().__init__()
        shapes = [(64, 64), (64,), (96, 64), (96,)]
        self.layers = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)

    def forward(self, gradients):
        return sum((p * g.view_as(p)).sum() for p, g in zip(self.layers, gradients.split(LAYERS), strict=True))


def reduced(device, codec, cap):
    """Four steps' gradients on a device, on the host."""
    network = Given().to(device)
    model = DistributedDataParallel(network, bucket_cap_mb=cap)
    state = terncomm.register(model, codec, exempt=())
    told = []
    for step in range(4):
        model.zero_grad()
        model(gaussian(sum(LAYERS), seed=10 * step + dist.get_rank()).to(device)).backward()
        told.append(torch.cat([p.grad.flatten() for p in network.parameters()]).cpu())
    assert state.stats()["steps"] == 4
    return told


@pytest.mark.parametrize("codec", [Ternary(), Int8()], ids=["terngrad", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_path_is_the_same_bits_on_both_devices(codec, dtype):
    rows = gaussian(3, 20_000, seed=1).to(dtype)

    def work(transport, device):
        flat = rows[transport.rank].to(device)
        return all_reduce_mean(flat, Segments([12_000, 8000]), codec, transport, key=Key(3, 1)).cpu()

    for device in ("cpu", "cuda"):
        means = LocalTransport.run(3, lambda transport, device=device: work(transport, device))
        wanted = means[0] if device == "cpu" else wanted  # noqa: F821
        for mean in means:
            assert same_bits(mean, wanted)


@pytest.mark.parametrize("cap", [0.01, 25.0], ids=["many buckets", "one bucket"])
@pytest.mark.parametrize("codec", ["terngrad", "int8"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gloo_on_cuda_tensors(on_ranks, world_size, codec, cap):
    here = on_ranks(world_size, reduced, "cpu", codec, cap)
    there = on_ranks(world_size, reduced, "cuda", codec, cap)
    for rank in range(world_size):
        for one, other in zip(there[rank], here[rank], strict=True):
            assert torch.equal(one, other)


def nccl_alone():
    dist.destroy_process_group()
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=0, world_size=1)
    for cap in (0.01, 25.0):
        for step, gradient in enumerate(reduced("cuda", "terngrad", cap)):
            assert torch.equal(gradient, gaussian(sum(LAYERS), seed=10 * step)), "one rank codes nothing"


def test_nccl_with_one_rank(tmp_path):
    (end,) = run_job(1, nccl_alone, directory=tmp_path)
    assert end.status == 0, end.text
