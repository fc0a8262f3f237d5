"""The pipelined driver: the order of messages, and errors, through small paths."""

import gc
import threading
import time

import pytest
import torch
from laws import Recorded
from pipelines import Chunked, ask, octets, pipelined

from terncomm.keys import Key
from terncomm.path.account import Account, Clock, Context
from terncomm.path.message import Message, Start
from terncomm.path.pipeline import Pipeline
from terncomm.transports import LocalTransport
from terncomm.transports.calls import Calls

KEY = Key(9, 4)


def test_the_pipeline_runs_ahead_up_to_the_answer_that_a_path_needs():
    """The second path computes while the first waits, and sends nothing before the first's last message."""
    order, computed = [], threading.Event()

    class Slow:
        rank, world_size = 0, 1

        def all_gather(self, payload):
            order.append(payload.item())
            if payload.item() == 1:
                assert computed.wait(10), "the second path did not run ahead"
            return payload[None].clone()

    def first():
        yield Message("all_gather", octets(1))
        yield Message("all_gather", octets(2), last=True)

    def second():
        computed.set()
        yield Message("all_gather", octets(3), last=True)
        return "done"

    pipeline, transports = Pipeline(), {"all": Slow()}
    futures = [pipeline.submit(path, transports, Clock(), lambda error, phase: error) for path in (first(), second())]
    assert [future.wait() for future in futures] == [None, "done"]
    assert order == [1, 2, 3]


@pytest.mark.parametrize("apart", [True, False], ids=["beside", "in one order"])
def test_a_header_goes_beside_what_the_path_before_sends(apart):
    """The first path's last message is under way until the second's header has arrived, if it has its own transport."""
    order, arrived = [], threading.Event()

    class Noting:
        rank, world_size = 0, 1

        def __init__(self, beside=None):
            self.beside = beside

        def all_gather(self, payload):
            number = payload.item()
            if number == 2 and apart:
                assert arrived.wait(10), "the header of the second path waited for its turn"
            order.append(number)
            return payload[None].clone()

    def path(number):
        yield Message("all_gather", octets(number), ahead=True)
        if number > 1:
            arrived.set()
        yield Message("all_gather", octets(number + 1))
        yield Message("all_gather", octets(number + 2), last=True)

    pipeline, transports = Pipeline(), {"all": Noting(Noting() if apart else None)}
    futures = [pipeline.submit(path(number), transports, Clock(), lambda error, phase: error) for number in (1, 10, 20)]
    for future in futures:
        future.wait()
    if apart:
        assert order.index(10) < order.index(2), "the header goes before the last messages of the path before"
        assert order.index(2) < order.index(20), "the header of the third waits for the first path's last message"
    assert [number for number in order if number not in (1, 10, 20)] == [2, 3, 11, 12, 21, 22]
    assert apart or order == [1, 2, 3, 10, 11, 12, 20, 21, 22]


def test_a_path_whose_turn_has_not_come_makes_one_message():
    """Else the memory of messages would grow with the number of buckets."""
    made, second_ran, go = [], threading.Event(), threading.Event()

    class Slow:
        rank, world_size = 0, 1

        def all_gather(self, payload):
            if payload.item() == 1:
                assert go.wait(10)
            return payload[None].clone()

    def first():
        yield Message("all_gather", octets(1))
        yield Message("all_gather", octets(2), last=True)

    def second():
        for number in (3, 4, 5):
            made.append(number)
            second_ran.set()
            yield Start(Message("all_gather", octets(number), last=number == 5))

    pipeline, transports = Pipeline(), {"all": Slow()}
    futures = [pipeline.submit(path, transports, Clock(), lambda error, phase: error) for path in (first(), second())]
    assert second_ran.wait(10)
    time.sleep(0.1)
    assert made == [3]
    go.set()
    for future in futures:
        future.wait()
    assert made == [3, 4, 5]


def test_calls_at_the_same_time_count_once(monkeypatch):
    now = iter([1.0, 4.0, 10.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    with clock.wire(), clock.wire():
        pass
    assert clock.wire_s == 3.0
    with pytest.raises(OSError, match="boom"), clock.wire():
        raise OSError("boom")
    assert clock.wire_s == 4.0


def test_an_error_beside_lets_the_path_before_end():
    """The second path's header fails while the first path sends; the first is sound, and is not blamed."""
    failed, told = threading.Event(), []

    class Breaks:
        rank, world_size = 0, 1

        def all_gather(self, payload):
            if payload.item() == 10:
                failed.set()
                raise OSError("boom")
            return payload[None].clone()

    class Slow(Breaks):
        beside = Breaks()

        def all_gather(self, payload):
            if payload.item() == 2:
                assert failed.wait(10)
                time.sleep(0.1)
            return super().all_gather(payload)

    def path(number):
        yield Message("all_gather", octets(number), ahead=True)
        yield Message("all_gather", octets(number + 1))
        rows = yield Message("all_gather", octets(number + 2), last=True)
        return rows.flatten().tolist()

    def failing(error, phase):
        told.append((str(error), phase))
        return error

    pipeline, transports = Pipeline(), {"all": Slow()}
    first, second, third = [pipeline.submit(path(number), transports, Clock(), failing) for number in (1, 10, 20)]
    assert first.wait() == [3]
    with pytest.raises(RuntimeError, match="OSError: boom"):
        second.wait()
    with pytest.raises(RuntimeError, match="PipelineFailed: an earlier gradient reduction failed: boom"):
        third.wait()
    assert told == [("boom", "exchange")]


def test_a_header_that_cannot_begin_leaves_no_path_before_it_waiting():
    """The first path's header is under way when the second's cannot begin: the transport beside is lost for both."""
    second_asks = threading.Event()

    class Lost(Chunked):
        in_flight = 10

        def begin(self, kind, payload):
            if payload[0] == 99:
                raise OSError("closed")
            received, _ = super().begin(kind, payload)

            def lost():
                raise OSError("lost")

            def transfers():
                yield lost
                assert second_asks.wait(10)
                time.sleep(0.1)

            return received, transfers()

    class Main(Recorded):
        def __init__(self, inner):
            super().__init__(inner)
            self.beside = Lost(inner)

    def path(number):
        if number == 99:
            second_asks.set()
        yield Message("all_gather", octets(number), ahead=True)
        yield Message("all_gather", octets(number), last=True)

    (outcomes,), failed = pipelined(lambda rank: [(path(number), Clock()) for number in (7, 99, 8)], 1, Main)
    assert len(failed) == 1
    words = list(map(str, outcomes))
    assert "closed" in words[1] or "lost" in words[0]
    assert all("closed" in each or "lost" in each for each in words)


def test_a_path_has_one_message_that_goes_ahead():
    """A second could be paired with the header of another path."""

    class Silent:
        rank, world_size = 0, 1

        def all_gather(self, payload):
            return payload[None].clone()

    class Both(Silent):
        beside = Silent()

    path = ask(*[Message("all_gather", octets(1), ahead=True)] * 2)
    future = Pipeline().submit(path, {"all": Both()}, Clock(), lambda error, phase: error)
    with pytest.raises(RuntimeError, match="second message that goes ahead"):
        future.wait()


@pytest.mark.parametrize("where", ["before its first message", "between", "on the wire", "at its end"])
def test_an_error_in_the_pipeline_lets_earlier_paths_end_and_stops_later_ones(where):
    class Breaks(Recorded):
        def all_gather(self, payload):
            if payload[0] == 99:
                raise OSError("boom")
            return super().all_gather(payload)

    def sound(number):
        rows = yield Message("all_gather", octets(number), last=True)
        return rows.flatten().tolist()

    def stopped():
        yield Message("all_gather", octets(5))
        yield Message("all_gather", octets(6), last=True)

    def broken(ctx):
        with ctx.phase("encode"):
            if where == "before its first message":
                raise OSError("boom")
        yield Message("all_gather", octets(99 if where == "on the wire" else 1))
        with ctx.phase("decode"):
            if where == "between":
                raise OSError("boom")
        yield Message("all_gather", octets(2), last=True)
        with ctx.phase("decode"):
            raise OSError("boom")

    def paths_of(rank):
        clock = Clock()
        ctx = Context(KEY, rank, 2, Account(clock))
        return [(path, clock) for path in (sound(7), sound(8), broken(ctx), stopped(), stopped())]

    outcomes, failed = pipelined(paths_of, 2, Breaks)
    phase = {"before its first message": "encode", "on the wire": "exchange"}.get(where, "decode")
    assert [(type(error), told) for error, told in failed] == [(OSError, phase)] * 2, "told once on each rank"
    for one, two, three, *later in outcomes:
        assert (one, two) == ([7, 7], [8, 8])
        assert "OSError: boom" in str(three)
        assert len(later) == 2
        for each in later:
            assert "PipelineFailed: an earlier gradient reduction failed: boom" in str(each)


def second_breaks(transfers_of):
    """Run paths of 7s, 99s and 8s on one rank: the second's message begins while the first's is under way.

    transfers_of(transfers, breaks): the transfers of a message; those of the 99s raise. Returns what came, path by
    path, and what was told.
    """
    second_asks = threading.Event()

    class Breaks(Chunked):
        in_flight = 10

        def begin(self, kind, payload):
            received, transfers = super().begin(kind, payload)

            def started():
                yield from transfers_of(transfers, payload[0] == 99)
                assert second_asks.wait(10)
                time.sleep(0.1)

            return received, started()

    def path(number):
        if number == 99:
            second_asks.set()
        rows = yield Message("all_gather", octets(number, number, number), last=True)
        return rows[:, 0].tolist()

    outcomes, failed = pipelined(lambda rank: [(path(number), Clock()) for number in (7, 99, 8)], 1, Breaks)
    return outcomes[0], failed


def test_a_message_that_cannot_begin_is_not_blamed_on_the_path_before():
    """The first path's message is under way when the second's fails to begin, and it still arrives."""
    order = []

    def transfers_of(transfers, breaks):
        for wait in transfers:
            order.append("start")
            yield lambda wait=wait: (order.append("wait"), wait())
        if breaks:
            raise OSError("boom")

    (one, two, three), failed = second_breaks(transfers_of)
    assert order[:6] == ["start"] * 6, "the second message began while the first was under way"
    assert [(str(error), phase) for error, phase in failed] == [("boom", "exchange")]
    assert one == [7]
    assert "OSError: boom" in str(two)
    assert "PipelineFailed" in str(three)


def test_a_transport_that_breaks_names_the_message_that_broke_it():
    """Once a call has failed, no call follows: the path before cannot end, but the error is not taken for its own."""
    calls = Calls("a library")

    def transfers_of(transfers, breaks):
        for wait in transfers:
            with calls.guarded():
                if breaks:
                    raise MemoryError("boom")

            def guarded(wait=wait):
                with calls.guarded():
                    wait()

            yield guarded

    outcomes, failed = second_breaks(transfers_of)
    assert [(type(error), str(error), phase) for error, phase in failed] == [(MemoryError, "boom", "exchange")]
    one, two, three = map(str, outcomes)
    assert "MemoryError: boom" in two
    assert "PipelineFailed: an earlier gradient reduction failed: boom" in one
    assert "PipelineFailed: an earlier gradient reduction failed: boom" in three


def test_a_message_to_a_group_that_is_not_there_leaves_no_future_waiting():
    def path():
        yield Message("all_gather", octets(1), group="nowhere", last=True)

    outcomes, failed = pipelined(lambda rank: [(path(), Clock()), (path(), Clock())], 1)
    assert [type(error) for error, _ in failed] == [KeyError]
    assert "KeyError" in str(outcomes[0][0])
    assert "PipelineFailed" in str(outcomes[0][1])


def test_a_path_whose_cleanup_raises_leaves_no_future_waiting(caplog):
    begun = threading.Event()

    class Waits(Recorded):
        def all_gather(self, payload):
            assert begun.wait(10)
            return super().all_gather(payload)

    def broken():
        yield Message("all_gather", octets(1))
        raise OSError("boom")

    def clings():
        begun.set()
        try:
            yield Message("all_gather", octets(2), last=True)
        finally:
            raise ValueError("cleanup")

    outcomes, _ = pipelined(lambda rank: [(path, Clock()) for path in (broken(), clings(), clings())], 1, Waits)
    words = [str(each) for each in outcomes[0]]
    assert "OSError: boom" in words[0]
    assert all("PipelineFailed: an earlier gradient reduction failed: boom" in each for each in words[1:])
    assert "abandoned gradient reduction raised ValueError: cleanup" in caplog.text


def test_nothing_runs_after_a_pipeline_has_failed():
    def broken():
        raise OSError("boom")
        yield

    ran = []

    def never():
        ran.append(True)
        yield Message("all_gather", octets(1), last=True)

    pipeline = Pipeline()

    def submitted(path):
        return pipeline.submit(path, {}, Clock(), lambda error, phase: error)

    first, second = submitted(broken()), submitted(never())
    with pytest.raises(RuntimeError, match="OSError: boom"):
        first.wait()
    for future in (second, submitted(never())):
        with pytest.raises(RuntimeError, match="PipelineFailed: an earlier gradient reduction failed: boom"):
            future.wait()
    assert len(ran) <= 1, "a path that came after the failure was run"


@pytest.mark.parametrize("where", ["path", "wire", "telling"])
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, OSError])
def test_no_error_of_any_kind_leaves_a_future_waiting(where, kind):
    class Breaks(Recorded):
        def all_gather(self, payload):
            if where == "wire":
                raise kind("boom")
            return super().all_gather(payload)

    def broken():
        yield Message("all_gather", octets(1))
        raise (kind if where == "path" else ZeroDivisionError)("boom")

    def failing(error, phase):
        if where == "telling":
            raise kind("boom")
        return error

    pipeline, transports = Pipeline(), {"all": Breaks(LocalTransport.world(1)[0])}
    futures = [pipeline.submit(path, transports, Clock(), failing) for path in (broken(), broken())]
    ended = [threading.Event() for _ in futures]
    for future, event in zip(futures, ended, strict=True):
        future.add_done_callback(lambda _, event=event: event.set())
    assert all(event.wait(10) for event in ended), "a future waits for ever"
    for future in futures:
        with pytest.raises(RuntimeError, match=f"{kind.__name__}: boom|an earlier gradient reduction failed"):
            future.wait()


def threads_of_pipelines():
    return [thread for thread in threading.enumerate() if thread.name.startswith("terncomm")]


def test_a_pipeline_that_nobody_holds_ends_its_threads():
    before = set(threads_of_pipelines())
    pipeline = Pipeline()
    assert set(threads_of_pipelines()) == before, "it has none until it is used"
    transport = LocalTransport.world(1)[0]
    path = ask(Message("all_gather", octets(1), last=True))
    assert pipeline.submit(path, {"all": transport}, Clock(), lambda error, phase: error).wait().tolist() == [[1]]
    assert len(set(threads_of_pipelines()) - before) == 2
    del pipeline
    gc.collect()
    until = time.monotonic() + 5
    while set(threads_of_pipelines()) - before and time.monotonic() < until:
        time.sleep(0.01)
    assert not set(threads_of_pipelines()) - before


def test_a_pipeline_that_nobody_holds_ends_what_it_has_begun():
    go = threading.Event()

    class Slow:
        rank, world_size = 0, 1

        def all_gather(self, payload):
            assert go.wait(10)
            return payload[None].clone()

    pipeline = Pipeline()
    path = ask(Message("all_gather", octets(1)), Message("all_gather", octets(2), last=True))
    future = pipeline.submit(path, {"all": Slow()}, Clock(), lambda error, phase: error)
    ended = threading.Event()
    future.add_done_callback(lambda _: ended.set())
    del pipeline
    gc.collect()
    go.set()
    assert ended.wait(10), "the future waits for ever"
    assert future.wait().tolist() == [[2]]


def test_a_pipeline_computes_with_the_threads_of_who_submits():
    before = torch.get_num_threads()
    seen = []

    def path():
        seen.append(torch.get_num_threads())
        yield Message("all_gather", octets(1), last=True)

    pipeline, transports = Pipeline(), {"all": LocalTransport.world(1)[0]}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pipeline.submit(path(), transports, Clock(), lambda error, phase: error).wait()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]
