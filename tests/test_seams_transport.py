"""A transport of one's own under DDP: blocking calls of torch.distributed's default group. Functions run on ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from golden import BUCKET_CAP_MB, Network, cases, compare, gradients, under_ddp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import terncomm
from terncomm.transports import Metered, RankFailed


class OverTheDefaultGroup:
    """Sends and receives, one after the other, of gloo's default group."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.calls, self.fails_at = 0, -1

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        return self.all_to_all(payload.expand(self.world_size, -1))

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RankFailed("the line is dead")
        received = rows.clone()
        for step in range(1, self.world_size):
            after, before = (self.rank + step) % self.world_size, (self.rank - step) % self.world_size
            sending = dist.isend(rows[after].contiguous(), after, tag=77)
            dist.recv(received[before], before, tag=77)
            sending.wait()
        return received


def over_ones_own():
    transport = OverTheDefaultGroup()
    found = {case.entry: under_ddp(case, transport=transport) for case in cases(dist.get_world_size())}
    return found, transport.calls


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_bits_are_those_of_the_usual_hook(on_ranks, world_size):
    for found, calls in on_ranks(world_size, over_ones_own):
        assert calls > 0
        assert set(found) == {case.entry for case in cases(world_size)}
        for entry, digests in found.items():
            compare("DDP over a transport of one's own", entry, digests)


def states():
    plain = DistributedDataParallel(Network(), bucket_cap_mb=BUCKET_CAP_MB)
    state = terncomm.CommState("int8", seed=3, transport=OverTheDefaultGroup())
    plain.register_comm_hook(state, terncomm.comm_hook)
    plain(gradients(0, dist.get_rank())).backward()
    assert state.stats()["wire_bytes"] > 0
    other = DistributedDataParallel(Network(), bucket_cap_mb=BUCKET_CAP_MB)
    other.register_comm_hook(copy.deepcopy(state), terncomm.comm_hook)
    with pytest.raises(RuntimeError, match="this CommState was copied, without its transport"):
        other(gradients(0, dist.get_rank())).backward()
    return [parameter.grad.sum().item() for parameter in plain.parameters()]


def test_the_plain_pair_of_state_and_hook_takes_one(on_ranks):
    first, second = on_ranks(2, states)
    assert first == second


def message(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refusals():
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3))
    alone = OverTheDefaultGroup()
    alone.rank = 1 - rank
    return [
        message(lambda: terncomm.register(DistributedDataParallel(model), "int8", transport="tcp")),
        message(
            lambda: terncomm.register(
                DistributedDataParallel(model), "int8", seed=rank, transport=OverTheDefaultGroup()
            )
        ),
        message(
            lambda: terncomm.register(
                DistributedDataParallel(model), "int8", min_numel=-rank, transport=OverTheDefaultGroup()
            )
        ),
        message(
            lambda: terncomm.register(
                DistributedDataParallel(model), "int8", intra_group=dist.group.WORLD, transport=OverTheDefaultGroup()
            )
        ),
        message(lambda: terncomm.register(DistributedDataParallel(model), "int8", transport=alone)),
    ]


def test_what_cannot_be_is_refused(on_ranks):
    first, second = on_ranks(2, refusals)
    for texts in (first, second):
        assert texts[0] == "TypeError: transport: wanted rank, world_size, all_gather, all_to_all; 'tcp' lacks rank"
        assert "ConfigurationsDiffer: ranks are configured differently. seed: 0 on rank 0; 1 on rank 1" in texts[1]
        assert texts[3].startswith("TypeError: transport= is for DistributedDataParallel only; with intra_group=")
    assert "rank 1 refused its options: min_numel must not be negative" in first[2]
    assert second[2] == "ValueError: min_numel must not be negative, got -1"
    assert first[4] == "ValueError: transport: wanted rank 0 of 2, as in the model's process group, got rank 1 of 2"


def failing():
    transport = OverTheDefaultGroup()
    model = DistributedDataParallel(Network(), bucket_cap_mb=BUCKET_CAP_MB)
    terncomm.register(model, "int8", transport=transport)
    transport.fails_at = transport.calls + 2
    found = []
    for _ in range(2):
        found.append(message(lambda: model(gradients(0, dist.get_rank())).backward()))
    return found


def test_a_rank_that_fails_raises_its_own_error(on_ranks):
    for first, second in on_ranks(2, failing):
        assert "the line is dead" in first
        assert "an earlier gradient reduction failed: the line is dead" in second


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda rows: rows[:1], r"got shape \(1, 4\), torch.uint8"),
        (lambda rows: torch.cat([rows, rows]), r"got shape \(4, 4\), torch.uint8"),
        (lambda rows: rows.flatten(), r"got shape \(8,\), torch.uint8"),
        (lambda rows: rows.int(), r"got shape \(2, 4\), torch.int32"),
        (list, "got list"),
    ],
)
def test_rows_that_cannot_be_are_refused(returned, got):
    """Else every rank would add up wrong rows, alike and without an error."""

    class Wrong:
        rank, world_size, in_flight = 0, 2, 1

        def all_to_all(self, rows):
            return returned(rows)

        def all_gather(self, payload):
            return returned(payload.expand(2, -1))

        def begin(self, kind, payload):
            return returned(payload if kind == "all_to_all" else payload.expand(2, -1)), iter(())

    transport, rows = Metered(Wrong()), torch.zeros(2, 4, dtype=torch.uint8)
    for call in (
        lambda: transport.all_to_all(rows),
        lambda: transport.all_gather(rows[0]),
        lambda: transport.begin("all_to_all", rows),
        lambda: transport.begin("all_gather", rows[0]),
    ):
        with pytest.raises(TypeError, match=rf"Wrong: wanted rows of shape \(2, 4\), torch.uint8; {got}"):
            call()
