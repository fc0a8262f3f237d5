"""What a path asks of its driver: messages, awaited at once, or started now and awaited later.

A path is a generator. It yields a request and is sent the answer:

    rows = yield message           # send it and wait: (W, k) uint8, row r from rank r
    ticket = yield Start(message)  # send it and go on
    rows = yield ticket            # wait for it

It never sees a network, a thread, a stream or a clock, so one path serves every engine; :mod:`terncomm.path.drivers`
moves the messages. Requests must be a function of what is equal on all ranks: then all ranks send the same messages in
the same order.
"""

from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

import torch

from terncomm.transports.base import Kind

T = TypeVar("T")


class Message(NamedTuple):
    """One collective call.

    kind: "all_gather": payload (k,) uint8 goes to every rank. "all_to_all": payload (W, k) uint8, row r goes to rank r.
    group: among which ranks: "all", or "node" and "between" for a rank's two groups.
    last: no message follows in this path, so those of the next path may be sent.
    """

    kind: Kind
    payload: torch.Tensor
    group: str = "all"
    last: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes to each other rank."""
        return self.payload.shape[-1]


class Start(NamedTuple):
    """A request to begin a message; the answer is a ticket."""

    message: Message


class Turn(NamedTuple):
    """A request to wait until the path's turn to send is near; the answer is None.

    For a path that needs much memory from its beginning on.
    """


Path = Generator[Any, Any, T]


def within(group: str, path: Path[T]) -> Path[T]:
    """The same path with its messages in another group of ranks. More messages follow it."""
    answer = None
    while True:
        try:
            request = path.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if isinstance(request, Message):
            request = request._replace(group=group, last=False)
        elif isinstance(request, Start):
            request = Start(request.message._replace(group=group, last=False))
        answer = yield request
