"""The pipelined driver: runs many paths concurrently, and sends their messages in one fixed order.

The compute thread resumes each path whose answer has arrived. A wire thread for each transport sends the messages, see
:mod:`terncomm.path.sending`.

The order of the messages over a transport depends only on the paths: first all messages of a path, in the order in
which it asks for them, then those of the path that was submitted next. So the order is the same on every rank,
whichever path is ready first. No two ranks can wait for each other, and no messages are mispaired.

The header of the next path need not wait for its turn. It goes over a transport of its own, if there is one (see
:func:`terncomm.transports.base.beside`). So ranks have agreed on the statistics of a bucket when the previous
one has been sent. A path whose turn has not come runs up to its first other message, which is made but not sent. After
the last message of a path the next path may send at once; it does not wait for the answer.

No collective is ever issued from a `.then` callback. Callbacks run in completion order, which differs from rank to
rank; collectives issued from them pair up wrongly, on gloo without any error.
"""

import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch

from terncomm.ops import denormals
from terncomm.path.account import Clock
from terncomm.path.drivers import Transports, channel
from terncomm.path.message import Message, Path, Start, WaitForTurn
from terncomm.path.sending import Ticket, Wire, WireFailed, ordinary
from terncomm.transports.base import Transport, beside

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
        self.may_use = {id(each) for main in transports.values() for each in (main, beside(main)) if each is not None}
        self.unanswered: Counter[int] = Counter()  # messages that were sent, by id of the transport
        self.held: Ticket | None = None  # a message that waits until it is this path's turn to send
        self.starts = False  # the path goes on as soon as the held message is sent
        self.wanted: Ticket | None = None
        self.waits_for_turn = False
        self.ended = False
        self.error: Exception | None = None
        self.phase = ""  # in which the error came
        self.result: Any = None

    @property
    def sends(self) -> bool:
        """Whether more messages may follow."""
        return not self.ended and bool(self.may_use)

    def advance(self, answer: Any) -> None:
        """Send `answer` into the path, and run it until it has made a message or needs an answer that has not come."""
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
                    self.starts = isinstance(request, Start)
                    self.held = self._ticket(request.message if isinstance(request, Start) else request)
                    return
                if request.rows is None:
                    self.wanted = request
                    return
                answer, request.rows = request.rows, None
        except StopIteration as end:
            self.result = end.value
        except BaseException as error:  # SystemExit, too: if this thread ended, the futures would never complete
            self.fail(ordinary(error), self.clock.phase)
            self.clock.phase = ""
        self.ended = True

    def _ticket(self, message: Message) -> Ticket:
        return Ticket(self, message, channel(self.transports, message), self.clock, self.bucket)

    def go_on(self, busy: set[int], wires: "_Wires") -> None:
        """Send the messages whose turn has come. busy: ids of the transports that earlier paths may still use."""
        while True:
            if self.waits_for_turn:
                self.waits_for_turn = False
                self.advance(None)
            elif (ticket := self.held) is None or id(ticket.transport) in busy:
                return
            else:
                self.held = None
                if id(ticket.transport) not in self.may_use:
                    error = RuntimeError("a path asked for a second message that goes ahead, or for one after its last")
                    self.fail(error, self.clock.phase)
                    return
                if ticket.message.last:
                    self.may_use.clear()
                elif ticket.transport is not self.transports[ticket.message.group]:
                    self.may_use.discard(id(ticket.transport))
                self.unanswered[id(ticket.transport)] += 1
                wires.send(ticket)
                if self.starts:
                    self.advance(ticket)
                else:
                    self.wanted = ticket

    def fail(self, error: Exception, phase: str) -> None:
        """Record an error; the future raises it when all earlier jobs have ended."""
        self.error, self.phase, self.ended, self.held = error, phase, True, None
        _abandon(self.path)


class _Wires:
    """The wire of each transport; started with its first message."""

    def __init__(self, inbox: "_Inbox") -> None:
        self._inbox = inbox
        self._wires: dict[int, tuple[Transport, Wire]] = {}  # by id of the transport

    def send(self, ticket: Ticket) -> None:
        """Queue a message on the wire of its transport."""
        if id(ticket.transport) not in self._wires:
            self._wires[id(ticket.transport)] = ticket.transport, Wire(self._inbox.put_answer)
        self._wires[id(ticket.transport)][1].send(ticket)

    def close(self) -> None:
        """Let the threads end after they have started all queued messages."""
        for _, wire in self._wires.values():
            wire.close()


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
            clock: its `wire_s` counts the time of the wire threads.
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
        self._answers: deque[Ticket | WireFailed] = deque()
        self._jobs: deque[_Job] = deque()
        self._closed = False

    def put_job(self, job: _Job) -> None:
        """Add a job."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def put_answer(self, answer: Ticket | WireFailed) -> None:
        """Add a message whose rows have arrived, or the error that ended a wire thread."""
        with self._changed:
            self._answers.append(answer)
            self._changed.notify()

    def close(self) -> None:
        """Make `get` return None as soon as the queue is empty and all jobs have ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def get(self, more: bool) -> Ticket | WireFailed | _Job | None:
        """Wait for the next item; None: the queue is closed and empty. more: answers will come even if it is closed."""
        with self._changed:
            while not (self._answers or self._jobs or (self._closed and not more)):
                self._changed.wait()
            if self._answers:
                return self._answers.popleft()
            return self._jobs.popleft() if self._jobs else None


def _compute(inbox: _Inbox) -> None:
    """The compute thread."""
    denormals.keep()
    wires = _Wires(inbox)
    jobs: deque[_Job] = deque()  # jobs that have not completed, in order
    failed: BaseException | None = None
    while (item := inbox.get(more=bool(jobs) and failed is None)) is not None:
        if failed is not None:
            if isinstance(item, _Job):
                _abandon(item.path)
                item.outcome.set_result(_follow_up(failed))
        else:
            if isinstance(item, WireFailed):
                _blame(item, jobs)
            elif isinstance(item, _Job):
                jobs.append(item)
                item.advance(None)
            else:
                item.sender.unanswered[id(item.transport)] -= 1
                if item.sender.wanted is item:
                    rows, item.rows = item.rows, None
                    item.sender.advance(rows)
                    del rows
            failed = _settle(jobs, wires)
        del item  # else its tensors would be kept alive while `get` waits
    wires.close()


def _blame(failure: WireFailed, jobs: deque[_Job]) -> None:
    """Fail the job whose message failed.

    It comes first if a job before it needs the same transport, for that one cannot end any more. Else the jobs before
    it go on: the message went ahead, over a transport of its own.
    """
    job = failure.sender if failure.sender in jobs else jobs[0]
    if job.error is None:
        job.fail(failure.error, "exchange")
    lost, earlier = id(failure.transport), list(jobs)[: jobs.index(job)]
    if any(lost in each.may_use or each.unanswered[lost] for each in earlier if not each.ended):
        jobs.remove(job)
        jobs.appendleft(job)


def _settle(jobs: deque[_Job], wires: _Wires) -> BaseException | None:
    """Send the messages whose turn has come, and complete finished jobs in order.

    Returns the error that ends the pipeline, or None.
    """
    sending, busy = 0, set[int]()  # earlier jobs that may still send, and the transports that they may use
    for job in jobs:
        job.go_on(busy, wires)
        if job.sends:
            sending += 1
            busy |= job.may_use
        if job.error is not None or sending > 1:
            break
    while jobs and jobs[0].ended:
        job = jobs.popleft()
        if job.error is None:
            job.outcome.set_result(job.result)
            continue
        wires.close()
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
        return ordinary(second)


def _follow_up(failed: BaseException) -> PipelineFailed:
    error = PipelineFailed(f"an earlier gradient reduction failed: {failed}")
    error.__cause__ = failed
    return error
