"""Counts what a transport sends."""

import torch

from terncomm.transports.base import Transport


class Metered:
    """A transport that counts, in `sent_bytes`, the payload bytes this rank sends to others."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.sent_bytes = 0
        self.calls = 0

    def _count(self, nbytes: int) -> None:
        self.sent_bytes += (self.world_size - 1) * nbytes
        self.calls += 1

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
