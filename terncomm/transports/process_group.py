"""A torch.distributed process group as a transport."""

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from terncomm.torch_internals import all_gather_flat, backend_of, gloo_device_count
from terncomm.transports.base import Kind, RankFailed, Wait, alone, delivered, perform
from terncomm.transports.calls import Calls

# Bytes to each other rank. Up to so many, a message is gloo's own all-to-all: one call, in which all rows are sent at
# once. Concurrent flows on one link slow each other down (100 Mbit/s, 4 ranks: 30 %), so larger rows are sent in turn.
AT_ONCE = 1 << 17  # until :meth:`ProcessGroupTransport.adapt` has measured the link
_LEAST, _MOST = 1 << 13, 1 << 18
CHUNK = 1 << 20  # bytes of a larger row that one transfer sends, until the link has been measured
_LEAST_CHUNK, _MOST_CHUNK = 1 << 14, 1 << 24
_CHUNK_S = 1.6e-3  # that a chunk keeps the link busy; shorter ones cost more in calls than they gain by overlap
_IN_FLIGHT = 8  # two fill the link of an idle machine; eight fill it while encoding competes for the cores
_PROBE = 1 << 20  # bytes that each rank sends to find out the rate
_TAG = 0  # of every chunk: two ranks exchange chunks in one order, which all ranks share
_CANCEL_TAG = 1 << 30  # nobody sends with this tag, or those that follow


class ProcessGroupTransport:
    """Bytes over a process group, or over one of its backends, that nobody else uses meanwhile.

    CUDA payloads over a CPU backend such as gloo are staged through host memory. On gloo, small rows are sent by its
    all-to-all, which needs one call. It reaches half the link's rate between two ranks, and slows large rows down
    among more. So large rows are cut into chunks; each is sent to one rank after the other, the next rank first, and
    several are under way at once. Other backends get one call of their own collective per message.

    Raises:
        RankFailed: in every call, when another rank cannot be reached, or not within the group's timeout; and in
            every call after one that failed or was interrupted.
    """

    in_flight = _IN_FLIGHT

    def __init__(self, group: Any) -> None:
        self._group = group
        self._calls = Calls("the process group", (RuntimeError,))
        self.at_once = AT_ONCE  # equal on all ranks, and so is the next
        self.chunk = CHUNK
        self.rank: int = group.rank()
        self.world_size: int = group.size()

    def close(self) -> None:
        """End the connections of the group, which is of no use to anybody afterwards, and let go of it.

        Threads of this process that wait in a call raise at once, and so do other ranks that wait for this one. That
        is so for gloo; elsewhere it is so when nothing else holds the group.
        """
        group, self._group = self._group, None
        if group is None or self.world_size == 1:
            return
        with suppress(RuntimeError):  # a group of several backends may have none for the CPU
            if (backend := backend_for(group, torch.device("cpu"))).name() == "gloo":
                _cut(backend)

    def adapt(self) -> None:
        """Measure latency and rate, and choose how messages of what size are sent. Collective; all choose alike."""
        if self.world_size == 1:
            return
        rows = torch.zeros(self.world_size, _PROBE // (self.world_size - 1), dtype=torch.uint8)
        self.at_once = self.chunk = _PROBE
        times = []
        for message in [rows[:, :8].contiguous()] * 5 + [rows] * 2:
            began = time.perf_counter()
            self.all_to_all(message)
            times.append(time.perf_counter() - began)
        mine = torch.tensor([sorted(times[:5])[2], times[-1]], dtype=torch.float64)
        round_s, probe_s = self.all_gather(mine.view(torch.uint8)).view(torch.float64).amin(dim=0).tolist()
        rate = _PROBE / max(probe_s - round_s, 1e-6)
        self.at_once, self.chunk = at_once_for(round_s, rate), chunk_for(round_s, rate)

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        return perform(self, "all_gather", payload)

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        return perform(self, "all_to_all", rows)

    def begin(self, kind: Kind, payload: torch.Tensor) -> tuple[torch.Tensor, Iterator[Wait]]:
        """See :class:`terncomm.transports.base.Overlapping`."""
        if self.world_size == 1 or payload.numel() == 0:
            return alone(kind, payload, self.world_size)
        mine, backend = self._at_home(payload)
        received = mine.new_empty(self.world_size, mine.shape[-1])
        if backend.name() == "gloo" and goes_in_steps(self.world_size, mine.shape[-1], self.at_once):
            transfers = self._chunks(mine.expand(self.world_size, -1), received, backend)
        else:
            transfers = self._collective(kind, mine, received, backend)
        return delivered(received, transfers, payload.device)

    def _collective(self, kind: Kind, mine: torch.Tensor, received: torch.Tensor, backend: Any) -> Iterator[Wait]:
        with self._calls.guarded():
            if kind == "all_gather" and backend.name() != "gloo":
                work = all_gather_flat(backend, received.view(-1), mine)
            else:  # gloo's own all-gather is a ring of W - 1 steps
                rows = mine.repeat(self.world_size) if kind == "all_gather" else mine.view(-1)
                work = backend.alltoall_base(received.view(-1), rows, [], [])
        yield partial(self._wait, work)

    def _chunks(self, rows: torch.Tensor, received: torch.Tensor, backend: Any) -> Iterator[Wait]:
        rank, world_size, nbytes = self.rank, self.world_size, rows.shape[1]
        received[rank] = rows[rank]
        count = -(-nbytes // self.chunk)
        for chunk in range(count):
            begin, end = nbytes * chunk // count, nbytes * (chunk + 1) // count
            for step in range(1, world_size):
                after, before = (rank + step) % world_size, (rank - step) % world_size
                with self._calls.guarded():
                    # Ready to receive before it sends: both directions flow at once, where gloo would halve the rate.
                    coming = backend.recv([received[before, begin:end]], before, _TAG)
                    going = backend.send([rows[after, begin:end]], after, _TAG)
                yield partial(self._wait, going, coming)

    def _wait(self, *works: Any) -> None:
        with self._calls.guarded():
            for work in works:
                work.wait()

    def _at_home(self, payload: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The payload where its backend can read it, and that backend."""
        group = self._group
        if group is None:
            raise RankFailed("this rank's connection to the others is closed")
        backend = backend_for(group, payload.device)
        if payload.is_cuda and backend.name() != "nccl":
            payload = payload.cpu()
        return payload.contiguous(), backend


def _cut(backend: Any) -> None:
    """End all connections of a gloo backend: a call of any thread that waits raises, here and on other ranks.

    Gloo's own `abort` does not end the waits of sends and receives. A receive whose time is over does: gloo then
    closes the connections to all ranks, for it cannot take one message back.
    """
    nothing = torch.empty(1, dtype=torch.uint8)
    for tag in range(_CANCEL_TAG, _CANCEL_TAG + gloo_device_count(backend)):  # each device has its connections
        for other in range(backend.size()):
            if other != backend.rank():
                with suppress(RuntimeError):  # always; but at once, and without effect, if `other` has gone before
                    backend.recv([nothing], other, tag).wait(timedelta(milliseconds=1))


def at_once_for(round_s: float, bytes_per_s: float) -> int:
    """Bytes of the largest row that is sent to all ranks at once.

    Sending in turn pays where transmission takes longer than the latency.

    Args:
        round_s: latency of a small message.
        bytes_per_s: rate of a link.
    """
    return int(min(max(round_s * bytes_per_s, _LEAST), _MOST))


def chunk_for(round_s: float, bytes_per_s: float) -> int:
    """Bytes that one transfer sends; those in flight fill the link for twice the latency at least.

    Args:
        round_s: latency of a small message.
        bytes_per_s: rate of a link.
    """
    return int(min(max(max(_CHUNK_S, 2 * round_s / _IN_FLIGHT) * bytes_per_s, _LEAST_CHUNK), _MOST_CHUNK))


def goes_in_steps(world_size: int, nbytes: int, at_once: int = AT_ONCE) -> bool:
    """Whether rows of so many bytes are sent in chunks to one rank after the other on gloo, not all at once."""
    return world_size == 2 or nbytes > at_once


def backend_for(group: Any, device: torch.device) -> Any:
    """The backend of a process group that serves tensors of `device`; a backend is its own."""
    return backend_of(group, device) if isinstance(group, dist.ProcessGroup) else group
