"""The wire threads of the pipelined driver: one for each transport.

A wire starts the messages of its transport in the order in which they are queued. It keeps several transfers in flight,
also from different messages, and waits for them in the order in which they were started.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.profiler import record_function

from terncomm.path.account import Clock
from terncomm.path.drivers import call
from terncomm.path.message import Message
from terncomm.transports.base import Transport, Wait, overlaps


class Ticket:
    """A message to send over `transport`, and the received rows, (W, k) uint8; None until they have arrived.

    sender: the job whose message it is. clock: its `wire` counts the time of the calls. bucket: for profiles.
    """

    def __init__(self, sender: Any, message: Message, transport: Transport, clock: Clock, bucket: int) -> None:
        self.sender, self.message, self.transport = sender, message, transport
        self.clock, self.bucket = clock, bucket
        self.rows: torch.Tensor | None = None


class WireFailed(Exception):
    """An error of a wire, the job whose message it came in, and the transport."""

    def __init__(self, ticket: Ticket, error: BaseException) -> None:
        super().__init__(str(error))
        self.sender, self.transport, self.error = ticket.sender, ticket.transport, ordinary(error)


def ordinary(error: BaseException) -> Exception:
    """Wrap an error in a RuntimeError if `except Exception` would not catch it."""
    if isinstance(error, Exception):
        return error
    found = RuntimeError(f"{type(error).__name__}: {error}")
    found.__cause__ = error
    return found


Deliver = Callable[[Ticket | WireFailed], None]  # takes messages whose rows have arrived, and the error that ends it


class Wire:
    """A thread that sends messages, and the queue of these messages.

    deliver: called on the thread.
    """

    def __init__(self, deliver: Deliver) -> None:
        self._due: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        threading.Thread(target=_run, args=(self._due, deliver), name="terncomm-wire", daemon=True).start()

    def send(self, ticket: Ticket) -> None:
        """Queue a message; messages are sent in this order."""
        self._due.put(ticket)

    def close(self) -> None:
        """Let the thread end after it has started all queued messages."""
        self._due.put(None)


class _Transfer:
    """A transfer in flight. The final one of a message has no `wait`, but the received rows."""

    def __init__(self, wait: Wait | None, ticket: Ticket, rows: torch.Tensor | None = None) -> None:
        self.wait, self.ticket, self._rows = wait, ticket, rows

    def finish(self, deliver: Deliver) -> None:
        """Wait for the transfer. If it is the final one of its message, deliver the rows."""
        if self.wait is not None:
            try:
                with self.ticket.clock.wire():
                    self.wait()
            except BaseException as error:
                raise WireFailed(self.ticket, error) from error
        if self._rows is not None:
            self.ticket.rows = self._rows
            del self.ticket.message  # and with it the payload: the path keeps the ticket while it uses the rows
            deliver(self.ticket)


def _run(due: "queue.SimpleQueue[Ticket | None]", deliver: Deliver) -> None:
    """The thread: begin messages in their order, and wait for their transfers in the same order."""
    flight: deque[_Transfer] = deque()
    try:
        while (ticket := _next(due, flight, deliver)) is not None:
            try:
                with record_function(f"terncomm {ticket.message.kind}, bucket {ticket.bucket}"):
                    _begin(ticket, flight, deliver)
            except WireFailed:
                raise
            except BaseException as error:
                raise WireFailed(ticket, error) from error
            del ticket
    except WireFailed as failed:
        flight.clear()
        deliver(failed)


def _next(due: "queue.SimpleQueue[Ticket | None]", flight: deque[_Transfer], deliver: Deliver) -> Ticket | None:
    """The next message to start. While there is none, wait for transfers in flight. None: the queue is closed."""
    while flight:
        try:
            return due.get_nowait()
        except queue.Empty:
            flight.popleft().finish(deliver)
    return due.get()


def _begin(ticket: Ticket, flight: deque[_Transfer], deliver: Deliver) -> None:
    """Start the transfers of a message, as many at a time as the transport wants under way."""
    transport = ticket.transport
    most = transport.in_flight if overlaps(transport) else 0
    while flight and not most:
        flight.popleft().finish(deliver)
    transfers = _transfers(ticket)
    while True:
        try:
            with ticket.clock.wire():
                transfer = next(transfers, None)
        except BaseException:
            with suppress(WireFailed):  # earlier paths have sent all their messages, and end if the transport can
                while flight and flight[0].ticket.sender is not ticket.sender:
                    flight.popleft().finish(deliver)
            raise
        if transfer is None:
            return
        flight.append(transfer)
        while transfer.wait is not None and len(flight) >= most:
            flight.popleft().finish(deliver)


def _transfers(ticket: Ticket) -> Iterator[_Transfer]:
    """Each is started when it is asked for; the last is the answer."""
    message, transport = ticket.message, ticket.transport
    if overlaps(transport):
        rows, waits = transport.begin(message.kind, message.payload)
        yield from (_Transfer(wait, ticket) for wait in waits)
    else:
        rows = call(transport, message)
    yield _Transfer(None, ticket, rows)
