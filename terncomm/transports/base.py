"""The interface of a transport. It moves bytes between ranks and does not interpret them.

Every transport must do the following. Both collectives return rows in rank order, for any size including zero. The
n-th call of one rank pairs with the n-th call of every other rank. If a rank fails, the calls of all other ranks raise
within the transport's timeout. Checks are in `tests/laws.py`.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, Protocol, TypeGuard

import torch

Kind = Literal["all_gather", "all_to_all"]
Wait = Callable[[], None]


class RankFailed(RuntimeError):
    """Another rank has failed, exited or stopped answering, so this exchange cannot complete."""


class Transport(Protocol):
    """One rank's connection to W ranks that exchange rows of bytes.

    Calls block. Only one thread of a rank may call at a time.
    """

    @property
    def rank(self) -> int:
        """This rank, in [0, world_size)."""

    @property
    def world_size(self) -> int:
        """Number of ranks, W."""

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """(k,) uint8, k equal on all ranks -> (W, k) uint8: every rank's payload. Sends (W - 1) k bytes.

        The payload is contiguous. The result is a new tensor, which later calls do not change.
        """

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """(W, k) uint8, row r for rank r -> (W, k) uint8: row r came from rank r. Sends (W - 1) k bytes.

        As for `all_gather`, the result is a new tensor.
        """


class Overlapping(Transport, Protocol):
    """A transport that can have several messages in flight at once.

    A message is one collective. It consists of one or more transfers. One thread begins the messages and waits for
    their transfers. Every rank must begin the same messages, and advance their iterators, in the same order. The waits
    must be called in the order in which the transfers were started. This excludes deadlock.
    """

    @property
    def in_flight(self) -> int:
        """Largest number of transfers in flight: as many as fill the link. The caller must not start more."""

    def begin(self, kind: Kind, payload: torch.Tensor) -> tuple[torch.Tensor, Iterator[Wait]]:
        """Begin a message; returns the buffer for the received rows, and an iterator over the transfers.

        Nothing is sent before the iterator is advanced. Advancing it starts the next transfer and returns a function
        that waits for this transfer; both raise `RankFailed`.

        Args:
            kind: the collective.
            payload: uint8, (k,) for an all-gather or (W, k) for an all-to-all. Must not change until all waits have
                returned.

        Returns:
            (W, k) uint8, which must not be read before all waits have returned; and the iterator, which is empty if
            W = 1 or k = 0.
        """


def beside(transport: Transport) -> Transport | None:
    """A second transport over the same ranks, `transport.beside`, which another thread may use at the same time.

    It carries the headers of buckets, which then need not wait for large messages. It may be blocking or
    :class:`Overlapping`. It must be there on every rank or on none, and always be the same object. None: there is none.
    """
    return getattr(transport, "beside", None)


def overlaps(transport: Transport) -> TypeGuard[Overlapping]:
    """Whether a transport has `begin`, so that a message can begin before earlier ones have completed."""
    return bool(getattr(transport, "overlaps", hasattr(transport, "begin")))


def begin_and_wait(transport: Overlapping, kind: Kind, payload: torch.Tensor) -> torch.Tensor:
    """Begin one message and wait for it; returns (W, k) uint8. The blocking call of a transport that has `begin`."""
    received, transfers = transport.begin(kind, payload)
    waits: deque[Wait] = deque()
    for wait in transfers:
        waits.append(wait)
        if len(waits) >= transport.in_flight:
            waits.popleft()()
    for wait in waits:
        wait()
    return received


def nothing_to_send(kind: Kind, payload: torch.Tensor, world_size: int) -> tuple[torch.Tensor, Iterator[Wait]]:
    """What `begin` returns if there is nothing to send: W = 1 or k = 0."""
    received = payload.expand(world_size, -1) if kind == "all_gather" else payload
    return received.clone(), iter(())


def copied_to(
    received: torch.Tensor, transfers: Iterator[Wait], device: torch.device
) -> tuple[torch.Tensor, Iterator[Wait]]:
    """What `begin` returns for a payload on `device`, if the transfers write to `received`, maybe on another device.

    Then one more wait, the last, copies `received` to `device`.
    """
    if received.device == device:
        return received, transfers
    there = torch.empty_like(received, device=device)

    def then_copied() -> Iterator[Wait]:
        yield from transfers
        yield lambda: void(there.copy_(received))  # the last wait: `received` is complete by then

    return there, then_copied()


def void(_: object) -> None:
    """Discard a value, so that a lambda returns None."""
