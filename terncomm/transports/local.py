"""A transport between threads of one process, one thread per rank: for tests, simulations and experiments."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from terncomm.transports.base import RankFailed

T = TypeVar("T")


class _World:
    def __init__(self, world_size: int, timeout_s: float | None) -> None:
        self.barrier = threading.Barrier(world_size)
        self.slots: list[torch.Tensor | None] = [None] * world_size
        self.timeout_s = timeout_s
        self.error: BaseException | None = None


class LocalTransport:
    """One rank of W ranks that are threads of one process.

    :meth:`world` makes the transports of all ranks. :meth:`run` also runs a function on each.

    >>> import torch
    >>> LocalTransport.run(3, lambda t: t.all_gather(torch.tensor([t.rank], dtype=torch.uint8)).flatten().tolist())
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """

    def __init__(self, world: _World, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.world_size = len(world.slots)

    @classmethod
    def world(cls, world_size: int, *, timeout_s: float | None = 60.0) -> list["LocalTransport"]:
        """W connected transports, in rank order.

        Args:
            world_size: W.
            timeout_s: how long a call waits for the other ranks; then it raises on every rank. None: no limit.
        """
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        shared = _World(world_size, timeout_s)
        return [cls(shared, rank) for rank in range(world_size)]

    @classmethod
    def run(
        cls,
        world_size: int,
        work: Callable[["LocalTransport"], T],
        *,
        timeout_s: float | None = 60.0,
    ) -> list[T]:
        """Call work(transport) once per rank, each in a thread; return the results in rank order.

        If a rank raises, the calls of all other ranks raise `RankFailed`, and the first error is raised here.
        """
        ranks = cls.world(world_size, timeout_s=timeout_s)
        results: list[T | None] = [None] * world_size

        def body(transport: LocalTransport) -> None:
            try:
                results[transport.rank] = work(transport)
            except BaseException as error:
                transport.fail(error)

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        error = ranks[0]._world.error
        if error is not None:
            raise error
        return results  # type: ignore[return-value]

    def fail(self, error: BaseException) -> None:
        """Report that this rank has failed: pending and later calls of every rank raise."""
        if self._world.error is None:
            self._world.error = error
        self._world.barrier.abort()

    def _meet(self) -> None:
        try:
            self._world.barrier.wait(self._world.timeout_s)
        except threading.BrokenBarrierError:
            cause = self._world.error
            if cause is None:
                raise TimeoutError(f"rank {self.rank} waited {self._world.timeout_s} s for the other ranks") from None
            raise RankFailed(f"rank {self.rank}: another rank failed: {cause!r}") from cause

    def _exchange(self, payload: torch.Tensor) -> list[torch.Tensor]:
        self._world.slots[self.rank] = payload
        self._meet()
        slots = [slot for slot in self._world.slots if slot is not None]
        if len({slot.shape for slot in slots}) > 1:
            raise ValueError(f"ranks sent different sizes: {[tuple(slot.shape) for slot in slots]}")
        return slots

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        slots = self._exchange(payload)
        out = torch.stack(slots)
        self._meet()
        return out

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        slots = self._exchange(rows)
        out = torch.stack([slot[self.rank] for slot in slots])
        self._meet()
        return out
