"""A transport moves bytes between ranks and knows nothing of what they mean.

Conformance (`tests/test_transports.py` runs over every transport): both collectives return rows in rank order, for any
size including zero; calls of all ranks pair up in the order in which they are made; a rank that fails makes the call
of every other raise, within the transport's timeout.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, Protocol, TypeGuard

import torch

Kind = Literal["all_gather", "all_to_all"]
Wait = Callable[[], None]


class RankFailed(RuntimeError):
    """Another rank has failed, ended or gone silent, so this exchange cannot be completed."""


class Transport(Protocol):
    """W ranks that exchange rows of bytes. Calls block; a rank's calls come from one thread at a time."""

    @property
    def rank(self) -> int:
        """This rank, in [0, world_size)."""

    @property
    def world_size(self) -> int:
        """Number of ranks, W."""

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """(k,) uint8, k equal on all ranks -> (W, k) uint8: every rank's payload. Sends (W - 1) k bytes."""

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """(W, k) uint8, row r for rank r -> (W, k) uint8: row r came from rank r. Sends (W - 1) k bytes."""


class Overlapping(Transport, Protocol):
    """A transport that can have several messages under way at once.

    One thread begins the messages and waits for their transfers. Every rank begins the same messages and advances
    their iterators in the same order; waits are called in the order in which the transfers were started. No two ranks
    can then wait for each other.
    """

    @property
    def in_flight(self) -> int:
        """Number of transfers to keep outstanding: enough to fill the link. More are not allowed."""

    def begin(self, kind: Kind, payload: torch.Tensor) -> tuple[torch.Tensor, Iterator[Wait]]:
        """Begin a message: what arrives, and the transfers that bring it.

        Nothing is sent before the iterator is advanced. Advancing it starts the next transfer and returns a function
        that waits for this transfer; both raise `RankFailed`.

        Args:
            kind: the collective.
            payload: uint8, (k,) for an all-gather or (W, k) for an all-to-all. Must not change until all waits have
                returned.

        Returns:
            (W, k) uint8, complete when all waits have returned and not to be read before; and the iterator, which is
            empty if W = 1 or k = 0.
        """


def overlaps(transport: Transport) -> TypeGuard[Overlapping]:
    """Whether messages can be begun on a transport before earlier ones have ended."""
    return bool(getattr(transport, "overlaps", hasattr(transport, "begin")))


def perform(transport: Overlapping, kind: Kind, payload: torch.Tensor) -> torch.Tensor:
    """Perform one message from beginning to end: the blocking call of a transport that has `begin`."""
    received, transfers = transport.begin(kind, payload)
    waits: deque[Wait] = deque()
    for wait in transfers:
        waits.append(wait)
        if len(waits) >= transport.in_flight:
            waits.popleft()()
    for wait in waits:
        wait()
    return received


def alone(kind: Kind, payload: torch.Tensor, world_size: int) -> tuple[torch.Tensor, Iterator[Wait]]:
    """The message of a single rank, or of no bytes: nothing is sent."""
    received = payload.expand(world_size, -1) if kind == "all_gather" else payload
    return received.clone(), iter(())


def delivered(
    received: torch.Tensor, transfers: Iterator[Wait], device: torch.device
) -> tuple[torch.Tensor, Iterator[Wait]]:
    """What `begin` returns for a payload on `device`, if `transfers` bring it to `received`, perhaps elsewhere."""
    if received.device == device:
        return received, transfers
    there = torch.empty_like(received, device=device)

    def then_copied() -> Iterator[Wait]:
        yield from transfers
        yield lambda: void(there.copy_(received))  # waited for last: all has come by then

    return there, then_copied()


def void(_: object) -> None:
    """Nothing, whatever an expression returned."""
