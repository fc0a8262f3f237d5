"""What a path asks of its driver: send a message and wait for the answer, or start it now and wait later.

A path is a generator. It yields a request, and the driver sends the answer back into it:

    rows = yield message           # send it and wait: (W, k) uint8, row r from rank r
    ticket = yield Start(message)  # send it and go on
    rows = yield ticket            # wait for it

A path uses no network and no threads, so every engine can run it; :mod:`terncomm.path.drivers` sends its messages.
Requests must depend only on values that are equal on all ranks. Then all ranks send the same messages in the same
order.
"""

from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

import torch

from terncomm.transports.base import Kind

T = TypeVar("T")


class Message(NamedTuple):
    """One collective call.

    kind: "all_gather": payload (k,) uint8 goes to every rank. "all_to_all": payload (W, k) uint8, row r goes to rank r.
    group: the ranks that take part. "all"; "node": those of this node; "between": one of each node, at the same place.
    last: this path sends no more messages, so the next path may send.
    ahead: goes over the transport beside that of the group, if there is one, and so need not wait for the messages of
        earlier paths. Each path sends at most one in each group: its header.
    """

    kind: Kind
    payload: torch.Tensor
    group: str = "all"
    last: bool = False
    ahead: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes to each other rank."""
        return self.payload.shape[-1]


class Start(NamedTuple):
    """A request to begin a message; the answer is a ticket."""

    message: Message


class WaitForTurn(NamedTuple):
    """A request to wait until at most one earlier path may still send; the answer is None.

    For a path that needs much memory from its start. Only the pipeline waits; other drivers answer at once.
    """


Path = Generator[Any, Any, T]


def within(group: str, path: Path[T]) -> Path[T]:
    """The same path, with its messages in the message group `group`.

    `last` is cleared in its messages: the caller must send more messages after them.
    """
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
