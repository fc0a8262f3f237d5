"""The pipelined driver: runs many paths concurrently, and sends their messages in one fixed order.

There are two threads. The compute thread resumes each path whose answer has arrived. The wire thread starts messages,
keeps several transfers in flight, also from different messages, and waits for them.

The order of messages depends only on the paths: first all messages of a path, in the order in which it asks for them,
then those of the path that was submitted next. So the order is the same on every rank, whichever path is ready first.
No two ranks can wait for each other, and no messages are mispaired. Only computing runs ahead: a path whose turn to
send has not come runs until it needs its first answer. After the last message of a path the next path may send at once;
it does not wait for the answer.

No collective is ever issued from a `.then` callback. Callbacks run in completion order, which differs from rank to
rank; collectives issued from them pair up wrongly, on gloo without any error.
"""

import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.profiler import record_function

from terncomm.path.account import Clock
from terncomm.path.drivers import Transports, call
from terncomm.path.message import Message, Path, Start, WaitForTurn
from terncomm.transports.base import Transport, Wait, overlaps

_log = logging.getLogger("terncomm")

_JOIN_S = 0.5  # seconds to wait for the compute thread at exit; a thread that is stuck in a call is not stopped

Failing = Callable[[Exception, str], Exception]  # (error, phase) -> the error that the future raises


class PipelineFailed(RuntimeError):
    """An earlier reduction failed, so this one cannot run; the first error is the cause."""


class _Job:
    """A submitted path and its state."""

    def __init__(
        self, path: Path[torch.Tensor], transports: Transports, clock: Clock, failing: Failing, bucket: int
    ) -> None:
        self.path, self.transports, self.clock, self.failing, self.bucket = path, transports, clock, failing, bucket
        self.threads = torch.get_num_threads()  # torch keeps this setting per thread
        self.outcome: torch.futures.Future[Any] = torch.futures.Future()
        self.held: deque[_Ticket] = deque()  # messages that wait until it is this path's turn to send
        self.wanted: _Ticket | None = None
        self.sends = True  # more messages may follow
        self.waits_for_turn = False
        self.ended = False
        self.error: Exception | None = None
        self.phase = ""  # in which the error came
        self.result: Any = None

    def advance(self, answer: Any) -> None:
        """Send `answer` into the path, and run it until it needs an answer that has not arrived."""
        if self.threads != torch.get_num_threads():
            torch.set_num_threads(self.threads)
        self.wanted = None
        try:
            while True:
                request = self.path.send(answer)
                if isinstance(request, WaitForTurn):
                    self.waits_for_turn = True
                    return
                if isinstance(request, (Message, Start)):
                    ticket = _Ticket(self, request.message if isinstance(request, Start) else request)
                    self.held.append(ticket)
                    if isinstance(request, Start):
                        answer = ticket
                        continue
                    request = ticket
                if request.rows is None:
                    self.wanted = request
                    return
                answer, request.rows = request.rows, None
        except StopIteration as end:
            self.result = end.value
        except BaseException as error:  # SystemExit, too: if this thread ended, the futures would never complete
            self.fail(_ordinary(error), self.clock.phase)
            self.clock.phase = ""
        self.ended = True

    def fail(self, error: Exception, phase: str) -> None:
        """Record an error; the future raises it when all earlier jobs have ended."""
        self.error, self.phase, self.ended = error, phase, True
        _abandon(self.path)


class _Ticket:
    """A message of a job, and the received rows, (W, k) uint8; None until they have arrived."""

    def __init__(self, job: _Job, message: Message) -> None:
        self.job, self.message = job, message
        self.rows: torch.Tensor | None = None


class Pipeline:
    """Runs paths concurrently; submit them in the same order on every rank.

    If a path fails, earlier paths still complete. Later paths fail with :class:`PipelineFailed`, because ranks may no
    longer be in step; the first error is its cause.
    """

    def __init__(self) -> None:
        self._inbox: _Inbox | None = None

    def submit(
        self, path: Path[torch.Tensor], transports: Transports, clock: Clock, failing: Failing, bucket: int = 0
    ) -> torch.futures.Future[torch.Tensor]:
        """Queue a path.

        Args:
            path: the path.
            transports: message group -> transport of this rank. Nothing else may use them while the pipeline runs.
            clock: its `wire_s` counts the time of the wire thread.
            failing: called once if this path or its transport fails, when all earlier paths have ended: (error, phase)
                -> the error that the future raises.
            bucket: for profiles.

        Returns:
            A future of the path's result. If the path fails, it raises the error of `failing` with its own message.
        """
        if self._inbox is None:
            self._inbox = _Inbox()
            computing = threading.Thread(target=_compute, args=(self._inbox,), name="terncomm", daemon=True)
            computing.start()
            weakref.finalize(self, _close, self._inbox, computing)  # runs at interpreter exit too
        job = _Job(path, transports, clock, failing, bucket)
        self._inbox.put_job(job)
        # An exception set on a future that DDP holds surfaces as a cast error; one raised in `then` keeps its message.
        return job.outcome.then(_unwrap)


def _unwrap(outcome: torch.futures.Future[Any]) -> torch.Tensor:
    value = outcome.value()
    if isinstance(value, BaseException):
        raise value
    return value  # type: ignore[no-any-return]


def _close(inbox: "_Inbox", computing: threading.Thread) -> None:
    inbox.close()
    if computing is not threading.current_thread():
        computing.join(timeout=_JOIN_S)


class _Inbox:
    """The queue of the compute thread: answers first, then new jobs."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answers: deque[_Ticket | _WireFailed] = deque()
        self._jobs: deque[_Job] = deque()
        self._closed = False

    def put_job(self, job: _Job) -> None:
        """Add a job."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def put_answer(self, answer: "_Ticket | _WireFailed") -> None:
        """Add a message whose rows have arrived, or the error that ended the wire thread."""
        with self._changed:
            self._answers.append(answer)
            self._changed.notify()

    def close(self) -> None:
        """Make `get` return None as soon as the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def get(self) -> "_Ticket | _WireFailed | _Job | None":
        """Wait for the next item; None: the queue is closed and empty."""
        with self._changed:
            while not (self._answers or self._jobs or self._closed):
                self._changed.wait()
            if self._answers:
                return self._answers.popleft()
            return self._jobs.popleft() if self._jobs else None


def _compute(inbox: _Inbox) -> None:
    """The compute thread."""
    wire = _Wire(inbox)
    jobs: deque[_Job] = deque()  # jobs that have not completed, in order
    failed: BaseException | None = None
    while (item := inbox.get()) is not None:
        if failed is not None:
            if isinstance(item, _Job):
                _abandon(item.path)
                item.outcome.set_result(_follow_up(failed))
        else:
            if isinstance(item, _WireFailed):
                _blame(item, jobs)
            elif isinstance(item, _Job):
                jobs.append(item)
                item.advance(None)
            elif item.job.wanted is item:
                rows, item.rows = item.rows, None
                item.job.advance(rows)
                del rows
            failed = _settle(jobs, wire)
        del item  # else its tensors would be kept alive while `get` waits
    wire.close()


def _blame(failure: "_WireFailed", jobs: deque[_Job]) -> None:
    """Fail the job whose message failed. It comes first: jobs before it that have not ended cannot end any more."""
    job = failure.job if failure.job in jobs else jobs[0]
    if job.error is None:
        job.fail(failure.error, "exchange")
    jobs.remove(job)
    jobs.appendleft(job)


def _settle(jobs: deque[_Job], wire: "_Wire") -> BaseException | None:
    """Send the messages whose turn has come, and complete finished jobs in order.

    Returns the error that ends the pipeline, or None.
    """
    sending = 0  # number of earlier jobs that may still send
    for job in jobs:
        if job.waits_for_turn:
            job.waits_for_turn = False
            job.advance(None)
        while job.held and not sending:
            ticket = job.held.popleft()
            job.sends = not ticket.message.last
            wire.send(ticket)
        sending += job.sends and not job.ended
        if job.error is not None or sending > 1:
            break
    while jobs and jobs[0].ended:
        job = jobs.popleft()
        if job.error is None:
            job.outcome.set_result(job.result)
            continue
        wire.close()
        error, job.error = job.error, None
        failure = _told(job, error)
        for other in jobs:
            _abandon(other.path)
        job.outcome.set_result(failure)
        for other in jobs:
            other.outcome.set_result(_follow_up(failure))
        return failure
    return None


def _abandon(path: Path[torch.Tensor]) -> None:
    """Close a path that does not go on. An error in its cleanup is logged, for another error is being raised."""
    try:
        path.close()
    except BaseException as error:
        _log.warning("the cleanup of an abandoned gradient reduction raised %s: %s", type(error).__name__, error)


def _told(job: _Job, error: Exception) -> Exception:
    """The error that the job's future raises, also if reporting it to the other ranks fails."""
    try:
        return job.failing(error, job.phase)
    except BaseException as second:
        second.__cause__ = error
        return _ordinary(second)


def _ordinary(error: BaseException) -> Exception:
    """Wrap an error in a RuntimeError if `except Exception` would not catch it."""
    if isinstance(error, Exception):
        return error
    found = RuntimeError(f"{type(error).__name__}: {error}")
    found.__cause__ = error
    return found


def _follow_up(failed: BaseException) -> PipelineFailed:
    error = PipelineFailed(f"an earlier gradient reduction failed: {failed}")
    error.__cause__ = failed
    return error


class _Wire:
    """The wire thread, and the queue of messages that it sends."""

    def __init__(self, inbox: _Inbox) -> None:
        self._due: queue.SimpleQueue[_Ticket | None] = queue.SimpleQueue()
        threading.Thread(target=_transmit, args=(self._due, inbox), name="terncomm-wire", daemon=True).start()

    def send(self, ticket: _Ticket) -> None:
        """Queue a message; messages are sent in this order."""
        self._due.put(ticket)

    def close(self) -> None:
        """Let the thread end after it has started all queued messages."""
        self._due.put(None)


class _Transfer:
    """A transfer in flight. The final one of a message has no `wait`, but the received rows."""

    def __init__(self, wait: Wait | None, ticket: _Ticket, rows: torch.Tensor | None = None) -> None:
        self.wait, self.ticket, self._rows = wait, ticket, rows

    def finish(self, inbox: _Inbox) -> None:
        """Wait for the transfer. If it is the final one of its message, pass the rows to the compute thread."""
        if self.wait is not None:
            try:
                with _timed(self.ticket.job.clock):
                    self.wait()
            except BaseException as error:
                raise _WireFailed(self.ticket.job, error) from error
        if self._rows is not None:
            self.ticket.rows = self._rows
            inbox.put_answer(self.ticket)


class _WireFailed(Exception):
    """An error of the wire, and the job whose message it came in."""

    def __init__(self, job: _Job, error: BaseException) -> None:
        super().__init__(str(error))
        self.job, self.error = job, _ordinary(error)


@contextmanager
def _timed(clock: Clock) -> Iterator[None]:
    """Count the time of the `with` block as exchange."""
    began = time.perf_counter()
    yield
    clock.wire_s += time.perf_counter() - began


def _transmit(due: "queue.SimpleQueue[_Ticket | None]", inbox: _Inbox) -> None:
    """The wire thread: begin messages in their order, and wait for their transfers in the same order."""
    flight: deque[_Transfer] = deque()
    try:
        while (ticket := _next(due, flight, inbox)) is not None:
            try:
                with record_function(f"terncomm {ticket.message.kind}, bucket {ticket.job.bucket}"):
                    _begin(ticket, flight, inbox)
            except _WireFailed:
                raise
            except BaseException as error:
                raise _WireFailed(ticket.job, error) from error
            del ticket
    except _WireFailed as failed:
        flight.clear()
        inbox.put_answer(failed)


def _begin(ticket: _Ticket, flight: deque[_Transfer], inbox: _Inbox) -> None:
    """Start the transfers of a message, as many at a time as the transport wants under way."""
    transport = ticket.job.transports[ticket.message.group]
    most = transport.in_flight if overlaps(transport) else 0
    while flight and not most:
        flight.popleft().finish(inbox)
    transfers = _transfers(ticket, transport)
    while True:
        try:
            with _timed(ticket.job.clock):
                transfer = next(transfers, None)
        except BaseException:
            with suppress(_WireFailed):  # earlier paths have sent all their messages, and end if the transport can
                while flight and flight[0].ticket.job is not ticket.job:
                    flight.popleft().finish(inbox)
            raise
        if transfer is None:
            return
        flight.append(transfer)
        while transfer.wait is not None and len(flight) >= most:
            flight.popleft().finish(inbox)


def _transfers(ticket: _Ticket, transport: Transport) -> Iterator[_Transfer]:
    """Each is started when it is asked for; the last is the answer."""
    message = ticket.message
    if overlaps(transport):
        rows, waits = transport.begin(message.kind, message.payload)
        yield from (_Transfer(wait, ticket) for wait in waits)
    else:
        rows = call(transport, message)
    yield _Transfer(None, ticket, rows)


def _next(due: "queue.SimpleQueue[_Ticket | None]", flight: deque[_Transfer], inbox: _Inbox) -> _Ticket | None:
    """The next message to start. While there is none, wait for transfers in flight. None: the queue is closed."""
    while flight:
        try:
            return due.get_nowait()
        except queue.Empty:
            flight.popleft().finish(inbox)
    return due.get()
