"""A torch.distributed process group as a transport."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def home_of(group: dist.ProcessGroup) -> torch.device:
    """A device whose tensors the group's backends move: the CPU if one of them does, else CUDA."""
    kinds = {device.type for device in group._device_types}
    return torch.device("cpu" if "cpu" in kinds else "cuda")


def _staged(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether payloads on `device` must go through the host: CUDA tensors, and the group has no NCCL."""
    return device.type == "cuda" and group._get_backend(device).name() != "nccl"


class ProcessGroupTransport:
    """Bytes over a process group; the group belongs to the caller, and no one else may use it meanwhile.

    CUDA payloads over a CPU backend such as gloo are staged through host memory.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        if self.world_size == 1 or payload.numel() == 0:
            return payload.expand(self.world_size, -1).clone()
        mine = self._at_home(payload)
        out = mine.new_empty(self.world_size * mine.numel())
        _all_gather_single(out, mine, group=self._group)
        return out.view(self.world_size, -1).to(payload.device)

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        if self.world_size == 1 or rows.numel() == 0:
            return rows.clone()
        mine = self._at_home(rows)
        out = torch.empty_like(mine)
        dist.all_to_all_single(out, mine, group=self._group)
        return out.to(rows.device)

    def _at_home(self, payload: torch.Tensor) -> torch.Tensor:
        if _staged(self._group, payload.device):
            payload = payload.cpu()
        return payload.contiguous()
