"""A transport moves bytes between ranks and knows nothing of what they mean.

Conformance (`tests/test_transports.py` runs over every transport): both collectives return rows in rank order, for any
size including zero; calls of all ranks pair up in the order in which they are made; a rank that fails makes the call
of every other raise, within the transport's timeout.
"""

from typing import Protocol

import torch


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
