"""Ranks meet in a store, whatever processes that have ended left in it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from terncomm.hooks.meeting import Meeting
from terncomm.transports import RankFailed

LIMIT_S = 20.0


def meet(store, world_size, *, absent=(), limit_s=LIMIT_S):
    """A meeting of new processes: for each rank that comes, its part of the store."""
    come = [rank for rank in range(world_size) if rank not in absent]
    meetings = [Meeting(store, list(range(world_size)), rank) for rank in come]
    with ThreadPoolExecutor(len(come)) as threads:
        waiting = [threads.submit(each.wait, limit_s) for each in meetings]
    return [each.exception() or each.result() for each in waiting]


def share_a_store(stores):
    """Whether what one rank writes can be read by all, and was not there before. NCCL and gloo use "0" and "0/0"."""
    assert not any(stores[0].check([key]) for key in ("hello", "0", "1", "0/0", "0/1"))
    stores[0].set("hello", "")
    return all(store.check(["hello"]) for store in stores)


@pytest.fixture
def store():
    return dist.HashStore()


def test_each_meeting_has_a_part_of_the_store(store):
    assert share_a_store(meet(store, 3))
    assert share_a_store(meet(store, 3))


def test_ranks_meet_after_one_of_them_died_before_it_came(store):
    for failure in meet(store, 3, absent=[2], limit_s=0.3):
        with pytest.raises(RankFailed, match=r"^rank 2 has not come within 0 s"):
            raise failure
    assert share_a_store(meet(store, 3))


@pytest.mark.parametrize("sizes", [(3, 2, 3), (2, 3, 2), (3, 1, 3)])
def test_ranks_meet_with_another_number_of_ranks(store, sizes):
    for world_size in sizes:
        assert share_a_store(meet(store, world_size))


@pytest.mark.parametrize("ended", [0, 1, 2])
def test_a_process_that_has_ended_is_not_taken_for_a_rank_that_is_there(store, ended):
    meet(store, 3)
    for failure in meet(store, 3, absent=[ended], limit_s=0.3):
        with pytest.raises(RankFailed, match=rf"^rank {ended} has not come within 0 s"):
            raise failure


def test_ranks_meet_although_one_saw_an_ended_process_first(store):
    meet(store, 2)
    first = Meeting(store, [0, 1], 0)
    with ThreadPoolExecutor(2) as threads:
        early = threads.submit(first.wait, LIMIT_S)
        while not first._seen:  # it has seen the token that the ended rank 1 left
            threading.Event().wait(0.01)
        late = threads.submit(Meeting(store, [0, 1], 1).wait, LIMIT_S)
        assert share_a_store([early.result(), late.result()])


def test_who_gave_up_is_not_counted(store):
    gone = Meeting(store, [0, 1], 0)
    with pytest.raises(RankFailed, match="rank 1 has not come"):
        gone.wait(0.1)
    gone.leave()
    with pytest.raises(RankFailed, match="rank 0 has not come"):
        Meeting(store, [0, 1], 1).wait(0.1)
    assert share_a_store(meet(store, 2))


def test_ranks_are_named_by_their_global_numbers(store):
    with pytest.raises(RankFailed, match="rank 4, 6 has not come"):
        Meeting(store, [2, 4, 6], 0).wait(0.1)


def test_a_rank_that_saw_all_and_left_is_not_met(store):
    """It has written that it saw the other; the other looks when it has gone."""
    first, second = Meeting(store, [0, 1], 0), Meeting(store, [0, 1], 1)
    second._come()
    with pytest.raises(RankFailed, match="rank 1 has not come"):
        first.wait(0.1)
    first.leave()
    with pytest.raises(RankFailed, match="rank 0 has not come"):
        second.wait(0.1)


def test_who_left_is_named(store):
    first, second = Meeting(store, [0, 1], 0), Meeting(store, [0, 1], 1)
    first._come()
    assert not second._met(), "it saw the token of rank 0"
    first.leave()
    with pytest.raises(RankFailed, match=r"^rank 0 has not come"):
        second.wait(0.1)
