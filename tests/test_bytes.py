"""The bytes that are counted are the bytes that leave the network interface."""

import json

import pytest
import torch
import torch.distributed as dist
from forked import run_job
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm.cluster.namespaces import NotPermitted, traffic
from terncomm.cluster.network import network

pytestmark = [pytest.mark.conformance, pytest.mark.root]
CODECS = ("terngrad", "int8", "exact")
SHORT, LONG = 3, 9


def count(path):
    """Interface and counted bytes of LONG steps less those of SHORT ones, by codec, three times."""
    told = {}
    for codec in CODECS:
        layers = nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 1024), nn.Linear(1024, 8))
        model = DistributedDataParallel(layers)
        state = terncomm.register(model, "terngrad" if codec == "exact" else codec)
        if codec == "exact":
            state.disable()
        inputs = torch.randn(2, 1024, generator=torch.Generator().manual_seed(dist.get_rank()))

        def sent(steps, model=model, state=state, inputs=inputs):
            dist.barrier()
            before = traffic()[0], state.stats()["wire_bytes"]
            for _ in range(steps):
                model(inputs).square().mean().backward()
            dist.barrier()
            return traffic()[0] - before[0], state.stats()["wire_bytes"] - before[1]

        sent(3)  # not looked at
        told[codec] = []
        for _ in range(3):
            (interface, counted), (interface_long, counted_long) = sent(SHORT), sent(LONG)
            told[codec].append((interface_long - interface, counted_long - counted))
    (path / f"bytes-{dist.get_rank()}.json").write_text(json.dumps(told))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_interface_and_count_agree_within_3_percent(tmp_path, world_size):
    try:
        with network(world_size) as net:
            names = [node.path for node in net.nodes]
            job = run_job(world_size, count, tmp_path, directory=tmp_path, timeout_s=60, limit_s=120, names=names)
    except NotPermitted as error:
        pytest.skip(f"no network namespaces here: {error}")
    assert [end.status for end in job] == [0] * world_size, "\n".join(end.text for end in job)
    for rank in range(world_size):
        for codec, told in json.loads((tmp_path / f"bytes-{rank}.json").read_text()).items():
            interface, counted = min(told)  # other work beside it makes more and smaller packets, never fewer bytes
            assert counted > 100_000
            assert {other for _, other in told} == {counted}
            assert interface == pytest.approx(counted, rel=0.03), (codec, interface / counted)
