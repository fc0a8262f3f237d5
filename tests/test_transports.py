"""The conformance of a transport. `test_mpi.py` and `test_horovod.py` hold theirs to the same laws under a launcher."""

import pytest
import torch
import torch.distributed as dist
from laws import messages_in_flight_bring_the_same, octets, rows_in_rank_order

from terncomm.transports import LocalTransport, Metered, ProcessGroupTransport, RankFailed, overlaps


@pytest.mark.conformance
@pytest.mark.parametrize("wrap", [lambda t: t, Metered], ids=["plain", "metered"])
@pytest.mark.parametrize("world_size", range(1, 10))
def test_rows_arrive_in_rank_order(world_size, wrap):
    for k in (0, 1, 7, 1000):
        LocalTransport.run(world_size, lambda transport, k=k: rows_in_rank_order(wrap(transport), k))


def over_gloo(wrap):
    transport = ProcessGroupTransport(dist.group.WORLD)
    messages_in_flight_bring_the_same(wrap(transport), (0, 1, 5000, 2))
    transport.at_once, transport.chunk = 100, 1000
    messages_in_flight_bring_the_same(wrap(transport), (0, 1, 99, 100, 101, 999, 1000, 1001, 2, 1999, 2000, 2001, 8191))
    rows_in_rank_order(transport, 2999)


def plain(transport):
    return transport


@pytest.mark.conformance
@pytest.mark.parametrize("wrap", [plain, Metered])
@pytest.mark.parametrize("world_size", range(1, 5))
def test_messages_in_flight_over_gloo(on_ranks, world_size, wrap):
    on_ranks(world_size, over_gloo, wrap)


def metered_over_gloo():
    metered = Metered(ProcessGroupTransport(dist.group.WORLD))
    _, first = metered.begin("all_gather", octets(0, 10))
    _, second = metered.begin("all_to_all", octets(0, 3, 7))
    for transfers in (first, second):
        for wait in transfers:
            wait()
    return metered.overlaps, metered.in_flight, metered.sent_bytes, metered.calls


def test_metered_counts_what_is_begun(on_ranks):
    assert on_ranks(3, metered_over_gloo) == [(True, 8, 2 * 10 + 2 * 7, 2)] * 3


def test_threads_have_blocking_calls_alone():
    (transport,) = LocalTransport.world(1)
    assert not overlaps(transport)
    assert not overlaps(Metered(transport))
    assert Metered(transport).in_flight == 1
    with pytest.raises(TypeError, match="LocalTransport has only blocking calls"):
        Metered(transport).begin("all_gather", octets(0, 3))


def test_metered_counts_what_goes_to_others():
    def work(transport):
        metered = Metered(transport)
        metered.all_gather(octets(0, 10))
        metered.all_to_all(octets(0, 4, 7))
        return metered.sent_bytes, metered.calls

    assert LocalTransport.run(4, work) == [(3 * 10 + 3 * 7, 2)] * 4


def test_a_received_tensor_is_ones_own():
    def work(transport):
        mine = octets(transport.rank, 5)
        for _ in range(50):
            received = transport.all_gather(mine)
            received.zero_()
        return mine

    results = LocalTransport.run(3, work)
    assert all(torch.equal(result, octets(rank, 5)) for rank, result in enumerate(results))


def test_a_rank_that_raises_ends_all_with_its_error():
    seen = []

    def work(transport):
        if transport.rank == 1:
            raise KeyError("rank 1 broke")
        try:
            transport.all_gather(octets(0, 3))
        except RankFailed as error:
            seen.append(str(error))
            raise

    with pytest.raises(KeyError, match="rank 1 broke"):
        LocalTransport.run(3, work)
    assert len(seen) == 2
    assert all("rank 1 broke" in message for message in seen)


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_timeout():
    with pytest.raises(TimeoutError, match=r"waited 0\.2 s"):
        LocalTransport.run(2, lambda t: t.all_gather(octets(0, 3)) if t.rank == 0 else None, timeout_s=0.2)


def test_different_sizes_are_an_error():
    with pytest.raises(ValueError, match="different sizes"):
        LocalTransport.run(2, lambda t: t.all_gather(octets(0, 3 + t.rank)))


def test_a_world_has_a_rank():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LocalTransport.world(0)
