"""A transport that counts the bytes that another transport sends."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from terncomm.transports.base import Kind, Transport, Wait, beside, overlaps


class Metered:
    """Wraps a transport and counts its messages and their bytes.

    `overlaps` says whether the inner transport has `begin`.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.overlaps = overlaps(inner)
        self._sent_bytes = self._calls = 0

    @cached_property
    def beside(self) -> "Metered | None":
        """See :func:`terncomm.transports.base.beside`; its bytes are counted here, too."""
        inner = beside(self.inner)
        return None if inner is None else Metered(inner)

    @property
    def sent_bytes(self) -> int:
        """Payload bytes that this rank has sent to other ranks."""
        return self._sent_bytes + (self.beside.sent_bytes if self.beside else 0)

    @property
    def calls(self) -> int:
        """Messages sent."""
        return self._calls + (self.beside.calls if self.beside else 0)

    @property
    def chunk(self) -> int | None:
        """Bytes of one transfer of the inner transport, if that is a `ProcessGroupTransport`; else None."""
        return getattr(self.inner, "chunk", None)

    def _count(self, nbytes: int) -> None:
        self._sent_bytes += (self.world_size - 1) * nbytes
        self._calls += 1

    @property
    def in_flight(self) -> int:
        """See :class:`terncomm.transports.base.Overlapping`; 1 if the inner transport blocks."""
        return self.inner.in_flight if overlaps(self.inner) else 1

    def begin(self, kind: Kind, payload: torch.Tensor) -> tuple[torch.Tensor, Iterator[Wait]]:
        """See :class:`terncomm.transports.base.Overlapping`. The message is counted here, before it is sent.

        Raises:
            TypeError: the inner transport has only blocking calls.
        """
        if not overlaps(self.inner):
            raise TypeError(f"{type(self.inner).__name__} has only blocking calls, no begin()")
        received, transfers = self.inner.begin(kind, payload)
        self._count(payload.shape[-1])
        return self._checked(received, payload), transfers

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        out = self.inner.all_gather(payload)
        self._count(payload.numel())
        return self._checked(out, payload)

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        out = self.inner.all_to_all(rows)
        self._count(rows.shape[1])
        return self._checked(out, rows)

    def _checked(self, received: Any, payload: torch.Tensor) -> torch.Tensor:
        """What a transport returned for a message.

        Raises:
            TypeError: it is not (W, k) uint8.
        """
        wanted = torch.Size((self.world_size, payload.shape[-1]))
        if isinstance(received, torch.Tensor) and received.shape == wanted and received.dtype == torch.uint8:
            return received
        got = type(received).__name__
        if isinstance(received, torch.Tensor):
            got = f"shape {tuple(received.shape)}, {received.dtype}"
        raise TypeError(f"{type(self.inner).__name__}: wanted rows of shape {tuple(wanted)}, torch.uint8; got {got}")
