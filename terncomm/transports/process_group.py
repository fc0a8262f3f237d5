"""A transport over a torch.distributed process group."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from terncomm.torch_internals import all_gather_flat, backend_of, gloo_device_count, set_timeout
from terncomm.transports.base import Kind, RankFailed, Wait, begin_and_wait, copied_to, nothing_to_send
from terncomm.transports.calls import Calls

# Bytes. Rows up to this size are sent by gloo's own all-to-all: one call, which sends all rows at once. Concurrent
# flows on one link slow each other down (100 Mbit/s, 4 ranks: 30 %), so larger rows are sent in turn.
AT_ONCE = 1 << 17  # until :meth:`ProcessGroupTransport.adapt` has measured the link
_LEAST, _MOST = 1 << 13, 1 << 18
CHUNK = 5 << 19  # bytes of a larger row that one transfer sends, until the link has been measured
_LEAST_CHUNK, _MOST_CHUNK = 1 << 14, 1 << 24
_CHUNK_S = 4e-3  # least transmission time of a chunk; shorter ones cost more in calls than they gain by overlap
_IN_FLIGHT = 8  # two fill the link of an idle machine; eight fill it while encoding competes for the cores
_ROUNDS = 2  # of chunks to every other rank in flight at least: a late rank must not stop the transfers to the others
_PROBE = 1 << 20  # bytes that each rank sends to measure the rate
_TAG, _TAG_BESIDE = 0, 1  # one for each thread: on each, all ranks exchange chunks in the same order
_LIBRARY = "the process group"  # in error messages
_CANCEL_TAG = 1 << 30  # no message has this tag or a higher one


class ProcessGroupTransport:
    """Moves bytes over a process group, or over one backend of it. Nobody else may use the group meanwhile.

    CUDA payloads over a CPU backend such as gloo are staged through host memory. On gloo, small rows are sent by its
    all-to-all, in one call. That call reaches only half the link's rate between two ranks, and it is slow for large
    rows among more ranks. So large rows, and all rows between two ranks, are cut into chunks. A chunk of each row is
    sent to one rank after the other, beginning with the next rank; several transfers are in flight at once. On other
    backends a message is one call of the backend's own collective.

    Args:
        group: a `ProcessGroup`, or a backend of one.
        timeout: called before each message; if the time differs from the last one, the group gets it as its timeout.
            None: leave the timeout of the group as it is.

    Raises:
        RankFailed: by a call, if another rank cannot be reached or does not arrive within the group's timeout, or if an
            earlier call failed or was interrupted.
    """

    def __init__(self, group: Any, timeout: Callable[[], timedelta] | None = None) -> None:
        self._group = group
        self._timeout = timeout
        self._limit: timedelta | None = None
        self._beside: Callable[[], _Beside | None] = lambda: None  # weak: else a group would outlive its users
        self._calls = Calls(_LIBRARY, (RuntimeError,))
        self.at_once = AT_ONCE  # bytes; this and `chunk` must be equal on all ranks
        self.chunk = CHUNK
        self.rank: int = group.rank()
        self.world_size: int = group.size()
        self.in_flight = max(_IN_FLIGHT, _ROUNDS * (self.world_size - 1))

    @property
    def beside(self) -> "_Beside | None":
        """See :func:`terncomm.transports.base.beside`. None if not all of the group is gloo: others have no tags."""
        if (found := self._beside()) is not None:
            return found
        if self._group is None or self.world_size == 1:
            return None
        names = set()
        for device in ("cpu", "cuda"):
            with suppress(RuntimeError):  # the group has no backend for this device
                names.add(backend_for(self._group, torch.device(device)).name())
        if names != {"gloo"}:
            return None
        made = _Beside(self)
        self._beside = weakref.ref(made)
        return made

    def close(self) -> None:
        """Close the connections of the group and release it. Nobody can use the group afterwards.

        On gloo, threads of this process that wait in a call raise at once, and so do other ranks that wait for this
        one. On other backends this happens when nothing else refers to the group.
        """
        group, self._group = self._group, None
        if group is None or self.world_size == 1:
            return
        with suppress(RuntimeError):  # a group may have no backend for the CPU
            if (backend := backend_for(group, torch.device("cpu"))).name() == "gloo":
                _close_connections(backend)

    def adapt(self) -> None:
        """Measure latency and rate of the link, and set `at_once` and `chunk` to match; equal on all ranks.

        Collective: every rank must call it.
        """
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
        return begin_and_wait(self, "all_gather", payload)

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        return begin_and_wait(self, "all_to_all", rows)

    def begin(self, kind: Kind, payload: torch.Tensor) -> tuple[torch.Tensor, Iterator[Wait]]:
        """See :class:`terncomm.transports.base.Overlapping`."""
        if self.world_size == 1 or payload.numel() == 0:
            return nothing_to_send(kind, payload, self.world_size)
        mine, backend = self._readable(payload)
        received = mine.new_empty(self.world_size, mine.shape[-1])
        if backend.name() == "gloo" and goes_in_steps(self.world_size, mine.shape[-1], self.at_once):
            transfers = self._chunks(mine.expand(self.world_size, -1), received, backend, self.chunk, _TAG, self._calls)
        else:
            transfers = self._collective(kind, mine, received, backend)
        return copied_to(received, transfers, payload.device)

    def _collective(self, kind: Kind, mine: torch.Tensor, received: torch.Tensor, backend: Any) -> Iterator[Wait]:
        with self._calls.guarded():
            if kind == "all_gather" and backend.name() != "gloo":
                work = all_gather_flat(backend, received.view(-1), mine)
            else:  # gloo's own all-gather is a ring of W - 1 steps
                rows = mine.repeat(self.world_size) if kind == "all_gather" else mine.view(-1)
                work = backend.alltoall_base(received.view(-1), rows, [], [])
        yield partial(_wait, self._calls, work)

    def begin_beside(self, payload: torch.Tensor, calls: Calls) -> tuple[torch.Tensor, Iterator[Wait]]:
        """As `begin`, but every row is sent whole, under a tag of its own; gloo only. calls: guards these calls."""
        mine, backend = self._readable(payload)
        received = mine.new_empty(self.world_size, mine.shape[-1])
        rows = mine.expand(self.world_size, -1)
        transfers = self._chunks(rows, received, backend, mine.shape[-1], _TAG_BESIDE, calls)
        return copied_to(received, transfers, payload.device)

    def _chunks(
        self, rows: torch.Tensor, received: torch.Tensor, backend: Any, most: int, tag: int, calls: Calls
    ) -> Iterator[Wait]:
        rank, world_size, nbytes = self.rank, self.world_size, rows.shape[1]
        received[rank] = rows[rank]
        count = -(-nbytes // most)
        for chunk in range(count):
            begin, end = nbytes * chunk // count, nbytes * (chunk + 1) // count
            for step in range(1, world_size):
                after, before = (rank + step) % world_size, (rank - step) % world_size
                with calls.guarded():
                    # The receive is posted first, so both directions flow at once. Gloo's all-to-all halves the rate.
                    coming = backend.recv([received[before, begin:end]], before, tag)
                    going = backend.send([rows[after, begin:end]], after, tag)
                yield partial(_wait, calls, going, coming, limit=self._limit)

    def _readable(self, payload: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The payload, contiguous in memory that its backend can read, and that backend."""
        group = self._group
        if group is None:
            raise RankFailed("this transport is closed: close() was called, or an earlier error closed it")
        backend = backend_for(group, payload.device)
        if self._timeout is not None and (limit := self._timeout()) != self._limit:
            set_timeout(backend, limit)
            self._limit = limit
        if payload.is_cuda and backend.name() != "nccl":
            payload = payload.cpu()
        return payload.contiguous(), backend


def _wait(calls: Calls, *works: Any, limit: timedelta | None = None) -> None:
    """limit: for gloo's sends and receives, which keep the timeout that the group had when it was made."""
    with calls.guarded():
        for work in works:
            if limit is None:
                work.wait()
            else:
                work.wait(limit)


class _Beside:
    """A transport over the connections of another one, which another thread may use at the same time.

    An error of one does not stop the other: what is on its way there may still arrive.
    """

    def __init__(self, main: ProcessGroupTransport) -> None:
        self._main, self._calls = main, Calls(_LIBRARY, (RuntimeError,))
        self.rank, self.world_size = main.rank, main.world_size
        self.in_flight = max(main.world_size - 1, 1)

    def begin(self, kind: Kind, payload: torch.Tensor) -> tuple[torch.Tensor, Iterator[Wait]]:
        """See :class:`terncomm.transports.base.Overlapping`."""
        if payload.numel() == 0:
            return nothing_to_send(kind, payload, self.world_size)
        return self._main.begin_beside(payload, self._calls)

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        return begin_and_wait(self, "all_gather", payload)

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        return begin_and_wait(self, "all_to_all", rows)


def _close_connections(backend: Any) -> None:
    """Close all connections of a gloo backend. Calls that wait then raise, in every thread, here and on other ranks.

    Gloo's own `abort` does not end the waits of sends and receives. A receive that times out does: gloo cannot cancel
    one message, so it closes the connections to all ranks.
    """
    nothing = torch.empty(1, dtype=torch.uint8)
    for tag in range(_CANCEL_TAG, _CANCEL_TAG + gloo_device_count(backend)):  # each device has connections of its own
        for other in range(backend.size()):
            if other != backend.rank():
                with suppress(RuntimeError):  # raised always; at once and without effect if `other` is gone
                    backend.recv([nothing], other, tag).wait(timedelta(milliseconds=1))


def at_once_for(round_s: float, bytes_per_s: float) -> int:
    """Largest row in bytes that is sent to all ranks at once, between _LEAST and _MOST.

    Rows are sent in turn only if the transmission of a row takes longer than the latency.

    Args:
        round_s: latency of a small message, in seconds.
        bytes_per_s: rate of a link.
    """
    return int(min(max(round_s * bytes_per_s, _LEAST), _MOST))


def chunk_for(round_s: float, bytes_per_s: float) -> int:
    """Size of a chunk in bytes, between _LEAST_CHUNK and _MOST_CHUNK.

    One chunk takes _CHUNK_S to transmit, or longer, so that all chunks in flight take at least twice the latency.

    Args:
        round_s: latency of a small message, in seconds.
        bytes_per_s: rate of a link.
    """
    return int(min(max(max(_CHUNK_S, 2 * round_s / _IN_FLIGHT) * bytes_per_s, _LEAST_CHUNK), _MOST_CHUNK))


def goes_in_steps(world_size: int, nbytes: int, at_once: int = AT_ONCE) -> bool:
    """Whether gloo rows of `nbytes` are sent in chunks to one rank after the other, rather than all at once."""
    return world_size == 2 or nbytes > at_once


def backend_for(group: Any, device: torch.device) -> Any:
    """The backend of a process group that serves tensors of `device`; `group` itself if it is a backend."""
    return backend_of(group, device) if isinstance(group, dist.ProcessGroup) else group
