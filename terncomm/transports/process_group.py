"""A torch.distributed process group as a transport."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ProcessGroupTransport:
    """Bytes over a process group; the group belongs to the caller, and no one else may use it meanwhile.

    Payloads lie where the group's backend wants them: on CPU for gloo, on CUDA for NCCL.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        if self.world_size == 1 or payload.numel() == 0:
            return payload.expand(self.world_size, -1).clone()
        out = payload.new_empty(self.world_size * payload.numel())
        _all_gather_single(out, payload.contiguous(), group=self._group)
        return out.view(self.world_size, -1)

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        if self.world_size == 1 or rows.numel() == 0:
            return rows.clone()
        rows = rows.contiguous()
        out = torch.empty_like(rows)
        dist.all_to_all_single(out, rows, group=self._group)
        return out
