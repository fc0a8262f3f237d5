"""Codes between nodes alone, floats inside them (`intra_group`). Functions run on ranks."""

import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist
import wire_bytes
from forked import run_job
from ranks import encoding_breaks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm.cluster.namespaces import NotPermitted, traffic
from terncomm.cluster.network import network
from terncomm.keys import Key
from terncomm.path.account import Context
from terncomm.path.drivers import blocking
from terncomm.path.reduce import all_reduce_mean_between_nodes
from terncomm.reduce import all_reduce_mean, bucket_of
from terncomm.segments import Segments
from terncomm.transports import LocalTransport, ProcessGroupTransport

NODES = {"blocks": [[0, 1], [2, 3]], "interleaved": [[0, 2], [1, 3]], "three": [[0, 1, 2], [3, 4, 5]]}


def groups(nodes):
    """This rank's group inside its node, and the one between nodes."""
    rank = dist.get_rank()
    inside = [dist.new_group(node) for node in nodes]
    between = [dist.new_group(list(place)) for place in zip(*nodes, strict=True)]
    mine = next(place for place, node in enumerate(nodes) if rank in node)
    return inside[mine], between[nodes[mine].index(rank)]


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(50, 61), nn.ReLU(), nn.Linear(61, 53), nn.ReLU(), nn.Linear(53, 7))


def backward(model, step=0):
    inputs = torch.randn(8, 50, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
    model.zero_grad()
    model(inputs).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def path(nodes, codec, dtype):
    """The function against its three steps, done by hand on gradients that all ranks know."""
    world_size, rank, n = dist.get_world_size(), dist.get_rank(), 1001
    everyone = [torch.randn(n, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world_size)]
    inside, between = map(ProcessGroupTransport, groups(nodes))
    found = everyone[rank].clone()
    coded, exact = Segments([700, 290], offsets=[0, 711], layers=[5, 7]), Segments([11], offsets=[700])
    levels = [Context(Key(3, 4, 0), each.rank, each.world_size) for each in (inside, between)]
    steps = all_reduce_mean_between_nodes(found, bucket_of(coded, codec, exact), *levels)
    blocking(steps, {"node": inside, "between": between})
    width = -(-n // len(nodes[0]))
    rows = []
    for place in range(len(nodes[0])):
        begin, end = place * width, min((place + 1) * width, n)
        means = []
        for node in nodes:
            wide = [everyone[r][begin:end].to(torch.promote_types(dtype, torch.float32)) for r in node]
            means.append((sum(wide[1:], wide[0]) / len(node)).to(dtype))
            means[-1] = nn.functional.pad(means[-1], (0, width - len(means[-1])))
        pieces = [(max(o, begin), min(o + s, end), layer, o) for o, s, layer in ((0, 700, 5), (711, 290, 7))]
        pieces = [(b - begin, e - b, layer, b - o) for b, e, layer, o in pieces if e > b]
        offsets, sizes, layers, bases = zip(*pieces, strict=True) if pieces else ((),) * 4
        coded = Segments(sizes, offsets=offsets, layers=layers, bases=bases)
        plain = (max(700, begin), min(711, end))
        exact = Segments([plain[1] - plain[0]], offsets=[plain[0] - begin]) if plain[1] > plain[0] else Segments(())

        def work(transport, means=means, coded=coded, exact=exact):
            return all_reduce_mean(
                means[transport.rank].clone(), coded, codec, transport, key=Key(3, 4, 0), exact=exact
            )

        rows.append(LocalTransport.run(len(nodes), work)[0])
    wanted = torch.cat(rows)[:n]
    known = torch.cat([torch.arange(0, 1001)])
    assert torch.equal(found[known], wanted[known])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("codec", [terncomm.Ternary(), terncomm.Int8(block=64)], ids=["terngrad", "int8"])
@pytest.mark.parametrize("nodes", NODES)
def test_it_is_the_mean_inside_and_the_path_between(on_ranks, nodes, codec, dtype):
    found = on_ranks(sum(map(len, NODES[nodes])), path, NODES[nodes], codec, dtype)
    assert all(torch.equal(found[0], other) for other in found)


def hooked(codec, nodes):
    plain, model = DistributedDataParallel(made()), DistributedDataParallel(made())
    inside, _ = groups(nodes)
    state = terncomm.register(model, codec, intra_group=inside, warmup_steps=1)
    for step in range(3):
        wanted, found = backward(plain, step), backward(model, step)
        for place, (a, b) in enumerate(zip(found, wanted, strict=True)):
            error = (a - b).norm() / b.norm()
            if step > 0 and place in (0, 2):
                assert 1e-4 < error < 0.02, (step, place, float(error))
            else:
                assert error < 1e-6, (step, place, float(error))
            everywhere = [torch.empty_like(a) for _ in range(dist.get_world_size())]
            dist.all_gather(everywhere, a)
            assert all(torch.equal(a, other) for other in everywhere)
    before = state.stats()
    backward(model, 3)
    after = state.stats()
    return {name: after[name] - before[name] for name in ("wire_bytes", "intra_bytes", "exact_bytes", "coded_numel")}


def test_gradients_are_plain_ddps_but_for_codes_between_nodes(on_ranks):
    total = sum(parameter.numel() for parameter in made().parameters())
    coded = 50 * 61 + 61 * 53
    for told in on_ranks(4, hooked, "int8", NODES["blocks"]):
        assert told["coded_numel"] == coded
        header = 256
        assert told["intra_bytes"] == 2 * 4 * -(-total // 2) + header
        between = told["wire_bytes"] - told["intra_bytes"]
        rows = sum(wire_bytes.codes(terncomm.Int8(), [-(-coded // 2)], 2))
        assert between == pytest.approx(rows + told["exact_bytes"] - told["intra_bytes"] + 2 * header, rel=0.1)
        assert between < 0.6 * 4 * total / 2


def interface_bytes(folder):
    """What leaves a node of two ranks, and what they count, over six steps."""
    layers = nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 1024), nn.Linear(1024, 8))
    model = DistributedDataParallel(layers)
    inside, _ = groups(NODES["blocks"])
    state = terncomm.register(model, "terngrad", intra_group=inside)
    inputs = torch.randn(2, 1024, generator=torch.Generator().manual_seed(dist.get_rank()))

    def sent(steps):
        dist.barrier()
        before, left = state.stats(), traffic()[0]
        for _ in range(steps):
            model(inputs).square().mean().backward()
        dist.barrier()
        after = state.stats()
        counted = [after[name] - before[name] for name in ("wire_bytes", "intra_bytes")]
        return traffic()[0] - left, counted[0] - counted[1]

    sent(3)
    told = []
    for _ in range(3):  # other work beside it makes more and smaller packets: the least counts
        short, long = sent(3), sent(9)
        told.append([b - a for a, b in zip(short, long, strict=True)])
    (folder / f"bytes-{dist.get_rank()}.json").write_text(json.dumps(min(told)))


@pytest.mark.root
def test_what_leaves_a_node_is_what_one_rank_would_send(tmp_path):
    try:
        with network(2) as net:
            names = [node.path for node in net.nodes for _ in range(2)]
            job = run_job(4, interface_bytes, tmp_path, directory=tmp_path, timeout_s=60, limit_s=120, names=names)
    except NotPermitted as error:
        pytest.skip(f"no network namespaces here: {error}")
    assert [end.status for end in job] == [0] * 4, "\n".join(end.text for end in job)
    told = [json.loads((tmp_path / f"bytes-{rank}.json").read_text()) for rank in range(4)]
    steps, coded, exact = 6, 2 * 1024 * 512, 512 + 1024 + 8 + 1024 * 8
    alone = steps * (sum(wire_bytes.codes(terncomm.Ternary(), [coded], 2)) + 4 * exact)
    for first in (0, 2):
        counted = sum(told[rank][1] for rank in (first, first + 1))
        assert counted == pytest.approx(alone, rel=0.05)
        assert told[first][0] == pytest.approx(counted, rel=0.05), "at the interface"


def tiny_in_one_row(nodes):
    """float16 gradients of which only the second half of a layer is too small for codes."""
    model = DistributedDataParallel(nn.Linear(64, 64, bias=False).half())
    terncomm.register(model, "int8", intra_group=groups(nodes)[0], exempt=())
    scale = torch.ones(64, 1, dtype=torch.float16)
    scale[32:] = 2.0**-18
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (model(torch.ones(1, 64, dtype=torch.float16)) * scale.T).sum().backward()
    return [str(each.message) for each in told if "is so small" in str(each.message)]


def test_what_is_wrong_in_any_row_is_told_by_the_first_node(on_ranks):
    told = on_ranks(4, tiny_in_one_row, NODES["blocks"])
    assert [len(each) for each in told] == [0, 1, 0, 0], "rank 1 has the second row of the first node"
    assert "the gradient of weight in torch.float16 is so small" in told[1][0]


def one_rank_fails(nodes):
    model = DistributedDataParallel(made())
    terncomm.register(model, "int8", intra_group=groups(nodes)[0])
    backward(model)
    with encoding_breaks(dist.get_rank() == 2), pytest.raises(Exception) as caught:  # noqa: PT011 - each has its own
        backward(model, 1)
    return str(caught.value)


def test_a_rank_that_fails_is_named_to_the_others(on_ranks):
    told = on_ranks(4, one_rank_fails, NODES["blocks"])
    for rank in (0, 1, 3):
        assert "rank 2 failed in bucket 0 of step 1" in told[rank], told[rank]


def out_of_step(nodes):
    """Ranks of one place that are ahead together are told by the ranks of their node."""
    model = DistributedDataParallel(made())
    state = terncomm.register(model, "int8", intra_group=groups(nodes)[0])
    if dist.get_rank() in (1, 3):
        state.load_state_dict({"step": 6, "seed": 0})
    with pytest.raises(RuntimeError, match=r"step 0 here, 7 there|step 7 here, 0 there"):
        backward(model)


def test_ranks_out_of_step_are_told(on_ranks):
    on_ranks(4, out_of_step, NODES["blocks"])


def refusals():
    rank = dist.get_rank()
    alone = [dist.new_group([r]) for r in range(4)]
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3], [1, 2])]
    three = dist.new_group([0, 1, 2])
    cases = [
        ("unequal", three if rank < 3 else alone[3]),
        ("not its own", [pairs[0], pairs[2], pairs[2], pairs[1]][rank]),
        ("no group", 2),
    ]
    said = {}
    for name, group in cases:
        try:
            terncomm.register(DistributedDataParallel(made()), "int8", intra_group=group)
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def test_groups_that_are_no_nodes(on_ranks):
    for said in on_ranks(4, refusals):
        assert "ranks in intra_group: 3 on rank 0, 1, 2; 1 on rank 3" in said["unequal"]
        assert "ValueError: intra_group: every rank must give the group of its own node's ranks" in said["not its own"]
        assert "TypeError: intra_group: wanted the process group of this node's ranks, got 2" in said["no group"]


def copied():
    """A copy would code over all ranks, in silence."""
    model = DistributedDataParallel(made())
    state = terncomm.register(model, "int8", intra_group=dist.group.WORLD)
    other = DistributedDataParallel(made())
    other.register_comm_hook(copy.deepcopy(state), terncomm.comm_hook)
    with pytest.raises(RuntimeError, match="was copied, without its intra_group"):
        backward(other)


def test_a_copy_has_no_nodes(on_ranks):
    on_ranks(2, copied)


def one_node():
    """Nothing is coded, and nothing leaves."""
    model, plain = DistributedDataParallel(made()), DistributedDataParallel(made())
    state = terncomm.register(model, "terngrad", intra_group=dist.group.WORLD)
    for a, b in zip(backward(model), backward(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    stats = state.stats()
    assert stats["coded_numel"] == 0
    assert stats["intra_bytes"] > 0


def test_one_node_alone(on_ranks):
    on_ranks(2, one_node)
