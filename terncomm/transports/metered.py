"""Counts what a transport sends."""

from collections.abc import Iterator

import torch

from terncomm.transports.base import Kind, Transport, Wait, overlaps


class Metered:
    """A transport that counts, in `sent_bytes`, the payload bytes this rank sends to others.

    `begin` and `in_flight` are those of the inner transport; `overlaps` says whether it has them.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.overlaps = overlaps(inner)
        self.sent_bytes = 0
        self.calls = 0

    @property
    def chunk(self) -> int | None:
        """Bytes that fill the inner transport's link for a moment; None if it has not measured the link."""
        return getattr(self.inner, "chunk", None)

    def _count(self, nbytes: int) -> None:
        self.sent_bytes += (self.world_size - 1) * nbytes
        self.calls += 1

    @property
    def in_flight(self) -> int:
        """See :class:`terncomm.transports.base.Overlapping`; 1 if the inner transport blocks."""
        return self.inner.in_flight if overlaps(self.inner) else 1

    def begin(self, kind: Kind, payload: torch.Tensor) -> tuple[torch.Tensor, Iterator[Wait]]:
        """See :class:`terncomm.transports.base.Overlapping`. The message is counted here, before it is sent.

        Raises:
            TypeError: the inner transport has blocking calls alone.
        """
        if not overlaps(self.inner):
            raise TypeError(f"{type(self.inner).__name__} has blocking calls alone, and no begin()")
        begun = self.inner.begin(kind, payload)
        self._count(payload.shape[-1])
        return begun

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        out = self.inner.all_gather(payload)
        self._count(payload.numel())
        return out

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        out = self.inner.all_to_all(rows)
        self._count(rows.shape[1])
        return out
