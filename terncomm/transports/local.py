"""W ranks as threads of one process: for tests, for simulation, and for trying things out."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch

from terncomm.transports.base import RankFailed

T = TypeVar("T")


class _World:
    def __init__(self, world_size: int, timeout_s: float | None, in_turn: bool) -> None:
        self.barrier = threading.Barrier(world_size)
        self.slots: list[torch.Tensor | None] = [None] * world_size
        self.timeout_s = timeout_s
        self.turn: threading.Lock | nullcontext[None] = threading.Lock() if in_turn else nullcontext()
        self.error: BaseException | None = None


class LocalTransport:
    """One rank of a world of threads. Make them with :meth:`world`, or run a function on each with :meth:`run`.

    >>> import torch
    >>> LocalTransport.run(3, lambda t: t.all_gather(torch.tensor([t.rank], dtype=torch.uint8)).flatten().tolist())
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """

    def __init__(self, world: _World, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.world_size = len(world.slots)

    @classmethod
    def world(cls, world_size: int, *, timeout_s: float | None = 60.0, in_turn: bool = False) -> list["LocalTransport"]:
        """W connected transports. A call that waits longer than `timeout_s` for the others raises on every rank.

        in_turn: threads hold `transport.turn` while they work, so that one works at a time. Many threads that fight for
        Python's lock take several times as long.
        """
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        shared = _World(world_size, timeout_s, in_turn)
        return [cls(shared, rank) for rank in range(world_size)]

    @classmethod
    def run(
        cls,
        world_size: int,
        work: Callable[["LocalTransport"], T],
        *,
        timeout_s: float | None = 60.0,
        in_turn: bool = False,
    ) -> list[T]:
        """Call work(transport) once per rank, each in a thread; return the results in rank order.

        A rank that raises ends the world: its error is raised here, the other ranks get `RankFailed`. With `in_turn`
        one rank works at a time, as befits many.
        """
        ranks = cls.world(world_size, timeout_s=timeout_s, in_turn=in_turn)
        results: list[T | None] = [None] * world_size

        def body(transport: LocalTransport) -> None:
            try:
                with transport._world.turn:
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
        """Say that this rank has failed: pending and later calls of every rank raise."""
        if self._world.error is None:
            self._world.error = error
        self._world.barrier.abort()

    def _meet(self) -> None:
        turn = self._world.turn
        turn.__exit__(None, None, None)  # while it waits another may work
        try:
            self._world.barrier.wait(self._world.timeout_s)
        except threading.BrokenBarrierError:
            cause = self._world.error
            if cause is None:
                raise TimeoutError(f"rank {self.rank} waited {self._world.timeout_s} s for the other ranks") from None
            raise RankFailed(f"rank {self.rank}: another rank failed: {cause!r}") from cause
        finally:
            turn.__enter__()

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
