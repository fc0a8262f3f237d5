"""A process group as a transport, against threads of one process."""

import threading
import time
from itertools import chain

import pytest
import torch
import torch.distributed as dist

from terncomm import Int8, Ternary
from terncomm.keys import Key
from terncomm.reduce import all_reduce_mean
from terncomm.segments import Segments
from terncomm.transports import LocalTransport, Metered, ProcessGroupTransport, RankFailed
from terncomm.transports.process_group import AT_ONCE, at_once_for, chunk_for

SIZES = (0, 1, 2, 7, 255, 1001)
WORLDS = (2, 3, 4)
LAYERS = (1500, 1, 0, 333, 4099)
EXACT = 77


def payload(rank, size, rows=None):
    generator = torch.Generator().manual_seed(1000 * size + rank)
    shape = (size,) if rows is None else (rows, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def collectives(transport):
    """Rows of both collectives at every size, and of a payload that is not contiguous."""
    rank, world_size = transport.rank, transport.world_size
    gathered = [transport.all_gather(payload(rank, size)) for size in SIZES]
    gathered.append(transport.all_gather(payload(rank, 10)[::2]))
    swapped = [transport.all_to_all(payload(rank, size, world_size)) for size in SIZES]
    swapped.append(transport.all_to_all(payload(rank, world_size, 5).T))
    return gathered, swapped


def mean(transport, codec, exchange):
    generator = torch.Generator().manual_seed(transport.rank)
    flat = torch.randn(sum(LAYERS) + EXACT, generator=generator)
    exact = Segments([EXACT], offsets=[sum(LAYERS)])
    transport = Metered(transport)
    all_reduce_mean(flat, Segments(LAYERS), codec, transport, key=Key(7, 3), exchange=exchange, exact=exact)
    return flat, transport.sent_bytes


def over_gloo(function, *args):
    return function(ProcessGroupTransport(dist.group.WORLD), *args)


@pytest.mark.conformance
@pytest.mark.parametrize("world_size", WORLDS)
def test_same_rows_as_threads(on_ranks, world_size):
    there = on_ranks(world_size, over_gloo, collectives)
    here = LocalTransport.run(world_size, collectives)
    for rank in range(world_size):
        for rows, expected in zip(chain(*there[rank]), chain(*here[rank]), strict=True):
            assert rows.dtype == torch.uint8
            assert rows.shape == expected.shape
            assert torch.equal(rows, expected)


@pytest.mark.parametrize("world_size", WORLDS)
def test_rows_come_in_rank_order(on_ranks, world_size):
    for rank, (gathered, swapped) in enumerate(on_ranks(world_size, over_gloo, collectives)):
        for size, rows, columns in zip(SIZES, gathered, swapped, strict=False):
            for other in range(world_size):
                assert torch.equal(rows[other], payload(other, size))
                assert torch.equal(columns[other], payload(other, size, world_size)[rank])


@pytest.mark.parametrize("codec", [Ternary(), Int8()], ids=["ternary", "int8"])
@pytest.mark.parametrize("exchange", ["gather", "two_phase"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_mean_is_bit_equal_to_threads(on_ranks, world_size, exchange, codec):
    there = on_ranks(world_size, over_gloo, mean, codec, exchange)
    here = LocalTransport.run(world_size, lambda transport: mean(transport, codec, exchange))
    for (flat, sent), (expected, expected_sent) in zip(there, here, strict=True):
        assert torch.equal(flat, expected)
        assert torch.equal(flat, here[0][0])
        assert sent == expected_sent > 0


def large_rows(numel):
    """Rows of bytes that tell who sent them, to whom, and where in the row they stand."""
    transport = ProcessGroupTransport(dist.group.WORLD)
    world_size, rank = transport.world_size, transport.rank
    place = torch.arange(numel) % 83
    rows = torch.stack([(place + 11 * rank + 29 * to) % 251 for to in range(world_size)]).to(torch.uint8)
    wanted = torch.stack([(place + 11 * source + 29 * rank) % 251 for source in range(world_size)]).to(torch.uint8)
    kept = rows.clone()
    same = all(torch.equal(transport.all_to_all(rows), wanted) for _ in range(3))
    return same and torch.equal(rows, kept)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("over", [0, 1, 12345])
def test_large_rows_go_one_after_the_other(on_ranks, world_size, over):
    assert all(on_ranks(world_size, large_rows, AT_ONCE + over))


def two_threads(count):
    """Large rows on this thread while another sends small ones beside them; each checks what arrives, in its order."""
    transport = Metered(ProcessGroupTransport(dist.group.WORLD))
    transport.inner.chunk = 50_000
    rank, world_size, right = transport.rank, transport.world_size, []

    def exchange(way, sizes):
        for size in sizes:
            wanted = torch.stack([payload(other, size) for other in range(world_size)])
            right.append(torch.equal(way.all_gather(payload(rank, size)), wanted))
            swapped = torch.stack([payload(other, size, world_size)[rank] for other in range(world_size)])
            right.append(torch.equal(way.all_to_all(payload(rank, size, world_size)), swapped))

    thread = threading.Thread(target=exchange, args=(transport.beside, range(count)))
    time.sleep(0.05 * rank)  # so that the threads of the ranks come in different orders
    thread.start()
    exchange(transport, [AT_ONCE + each for each in range(count)] + [10] * count)
    thread.join(20)
    return right, transport.sent_bytes, transport.calls


@pytest.mark.parametrize("world_size", WORLDS)
def test_another_thread_sends_beside(on_ranks, world_size):
    for right, sent, calls in on_ranks(world_size, two_threads, 8):
        assert right == [True] * (2 * 24)
        small, large = sum(range(8)), sum(AT_ONCE + each for each in range(8)) + 80
        assert sent == 2 * (world_size - 1) * (small + large)
        assert calls == 2 * 24


def adapted():
    transport = ProcessGroupTransport(dist.group.WORLD)
    transport.adapt()
    chosen = transport.at_once
    payload = torch.full((chosen + 1,), transport.rank, dtype=torch.uint8)
    return chosen, transport.all_gather(payload)[:, -1].tolist()


def test_what_is_sent_at_once_is_chosen_alike(on_ranks):
    found = on_ranks(3, adapted)
    assert len({chosen for chosen, _ in found}) == 1
    assert 2**13 <= found[0][0] <= 2**18
    assert all(last == [0, 1, 2] for _, last in found)
    assert chunk_for(2e-4, 12.5e6) == 50_000  # what 100 Mbit/s carry in 4 ms
    assert chunk_for(50e-3, 12.5e6) == 156_250  # eight are two latencies
    assert at_once_for(2e-3, 12.5e6) == 25_000  # what 100 Mbit/s carry in 2 ms
    assert (at_once_for(1e-4, 1e6), at_once_for(0.025, 1e9)) == (2**13, 2**18)


def closed_while_waiting(size, beside):
    """Rank 2 stays away; a thread of rank 0 and all of rank 1 wait; then rank 0 closes. The words of each error."""
    transport = ProcessGroupTransport(dist.new_group())
    transport.all_gather(payload(0, 10))
    transport.at_once, transport.chunk = 1000, 1000
    told, began = [], time.monotonic()
    way = transport.beside if beside else transport

    def wait():
        for _ in range(2):
            try:
                way.all_gather(payload(transport.rank, size))
            except RankFailed as error:
                told.append(str(error))
        transport.close()

    thread = threading.Thread(target=wait)
    time.sleep(2.0 * (transport.rank == 2))
    thread.start()
    if transport.rank == 0:
        time.sleep(0.5)
        transport.close()
    thread.join(20)
    return told, time.monotonic() - began


@pytest.mark.parametrize(("size", "beside"), [(1, False), (100_000, False), (100, True)])
def test_to_close_ends_what_other_threads_and_ranks_wait_for(on_ranks, size, beside):
    for told, seconds in on_ranks(3, closed_while_waiting, size, beside):
        assert len(told) == 2, told
        assert "broke off" in told[0]
        assert "closed" in told[1] or "an earlier exchange over the process group failed" in told[1]
        assert seconds < 10
