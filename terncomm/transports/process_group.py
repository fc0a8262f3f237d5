"""A torch.distributed process group as a transport."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from terncomm.transports.base import RankFailed

# Bytes to each other rank: messages of at most so many go to all ranks at the same time, larger ones to one after the
# other. Flows that meet in a link crowd each other out (100 Mbit/s, 4 ranks, 50 kB: 30 %), and a further step costs a
# message's way. So those go alone that keep a link busy for longer than they are on their way.
AT_ONCE = 1 << 17  # until :meth:`ProcessGroupTransport.adapt` knows the links
_LEAST, _MOST = 1 << 13, 1 << 20
_PROBE = 1 << 20  # bytes that each rank sends to find out the rate


class ProcessGroupTransport:
    """Bytes over a process group, or over one of its backends, that nobody else uses meanwhile.

    CUDA payloads over a CPU backend such as gloo are staged through host memory. gloo's own all-gather is a ring of
    W - 1 steps and keeps a second copy of its result; here small payloads need one step, and large ones no copy. Its
    all-to-all reaches half the link's rate between two ranks, and crowds the links of more with large rows; here they
    go to one rank after the other.

    Raises:
        RankFailed: in every call, when another rank cannot be reached, or not within the group's timeout.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.at_once = AT_ONCE  # equal on all ranks
        self.rank: int = group.rank()
        self.world_size: int = group.size()

    def close(self) -> None:
        """Let go of the group. If nothing else holds it, calls that other ranks wait in raise at once."""
        self._group = None

    def adapt(self) -> None:
        """Choose, by the time of messages of two sizes, which go to all ranks at once. Collective; all choose alike."""
        if self.world_size == 1:
            return
        rows = torch.zeros(self.world_size, _PROBE // (self.world_size - 1), dtype=torch.uint8)
        self.at_once = _PROBE
        times = []
        for message in [rows[:, :8].contiguous()] * 5 + [rows] * 2:
            began = time.perf_counter()
            self.all_to_all(message)
            times.append(time.perf_counter() - began)
        mine = torch.tensor([sorted(times[:5])[2], times[-1]], dtype=torch.float64)
        round_s, probe_s = self.all_gather(mine.view(torch.uint8)).view(torch.float64).amin(dim=0).tolist()
        self.at_once = at_once_for(round_s, _PROBE / max(probe_s - round_s, 1e-6))

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        world_size = self.world_size
        if world_size == 1 or payload.numel() == 0:
            return payload.expand(world_size, -1).clone()
        mine, backend = self._at_home(payload)
        if mine.numel() <= self.at_once:
            return self._all_to_all(mine.repeat(world_size, 1), backend).to(payload.device)
        out = mine.new_empty(world_size, mine.numel())
        with _naming_failure():
            if backend.name() == "gloo":
                self._ring(mine, out, backend)
            else:
                backend._allgather_base(out.view(-1), mine).wait()
        return out.to(payload.device)

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        if self.world_size == 1 or rows.numel() == 0:
            return rows.clone()
        return self._all_to_all(*self._at_home(rows)).to(rows.device)

    def _all_to_all(self, rows: torch.Tensor, backend: Any) -> torch.Tensor:
        out = torch.empty_like(rows)
        with _naming_failure():
            if backend.name() == "gloo" and goes_in_steps(self.world_size, rows.shape[1], self.at_once):
                return self._stepped(rows, out, backend)
            backend.alltoall_base(out.view(-1), rows.view(-1), [], []).wait()
        return out

    def _ring(self, mine: torch.Tensor, out: torch.Tensor, backend: Any) -> None:
        out[self.rank] = mine
        following, previous = (self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size
        for step in range(self.world_size - 1):
            # Ready to receive before it sends: both directions flow at once, where gloo would halve the rate.
            received = backend.recv([out[(previous - step) % self.world_size]], previous, step)
            backend.send([out[(self.rank - step) % self.world_size]], following, step).wait()
            received.wait()

    def _stepped(self, rows: torch.Tensor, out: torch.Tensor, backend: Any) -> torch.Tensor:
        """Row by row: in step d every rank sends to the d-th after it, so that no link has two rows to carry."""
        out[self.rank] = rows[self.rank]
        for step in range(1, self.world_size):
            after, before = (self.rank + step) % self.world_size, (self.rank - step) % self.world_size
            received = backend.recv([out[before]], before, step)
            backend.send([rows[after]], after, step).wait()
            received.wait()
        return out

    def _at_home(self, payload: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The payload where its backend can read it, and that backend."""
        if self._group is None:
            raise RankFailed("this rank's connection to the others is closed")
        backend = backend_for(self._group, payload.device)
        if payload.is_cuda and backend.name() != "nccl":
            payload = payload.cpu()
        return payload.contiguous(), backend


def at_once_for(round_s: float, bytes_per_s: float) -> int:
    """The largest message to go to all ranks at the same time: small ones take `round_s`, a link carries so much."""
    return int(min(max(round_s * bytes_per_s, _LEAST), _MOST))


def goes_in_steps(world_size: int, nbytes: int, at_once: int = AT_ONCE) -> bool:
    """Whether an all-to-all of rows of so many bytes goes to one rank after the other on gloo."""
    return world_size == 2 or nbytes > at_once


def backend_for(group: Any, device: torch.device) -> Any:
    """The backend of a process group that serves tensors of `device`; a backend is its own."""
    return group._get_backend(device) if isinstance(group, dist.ProcessGroup) else group


@contextmanager
def _naming_failure() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankFailed(f"the exchange with other ranks broke off: {error}") from error
