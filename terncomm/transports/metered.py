"""A transport that counts the bytes that another transport sends."""

from collections.abc import Iterator

import torch

from terncomm.transports.base import Kind, Transport, Wait, overlaps


class Metered:
    """Wraps a transport and counts, in `sent_bytes`, the payload bytes that this rank sends to other ranks.

    `calls` counts the messages. `overlaps` says whether the inner transport has `begin`.
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
        """Bytes of one transfer of the inner transport, if that is a `ProcessGroupTransport`; else None."""
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
            TypeError: the inner transport has only blocking calls.
        """
        if not overlaps(self.inner):
            raise TypeError(f"{type(self.inner).__name__} has only blocking calls, no begin()")
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
