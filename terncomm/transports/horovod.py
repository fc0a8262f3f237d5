"""A transport over Horovod. It imports horovod when a transport is made, not before."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from terncomm.transports.base import Kind, Wait, begin_and_wait, nothing_to_send
from terncomm.transports.calls import Calls, poll
from terncomm.transports.launched import check_sees_all_processes

_POLL_S = 5e-5  # Horovod's own wait sleeps for 1 ms at a time
_numbers: "dict[tuple[int, ...], itertools.count[int]]" = {}  # by ranks: counts transports over them, alike on all

RECIPE = "to build it for the installed torch, run `bash launch/build_horovod.sh` in terncomm's repository"


def horovod_torch() -> Any:
    """The module `horovod.torch`.

    Raises:
        ModuleNotFoundError: Horovod is not installed, or was built without torch.
    """
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise ModuleNotFoundError(f"Horovod for torch cannot be imported ({error}): {RECIPE}") from error
    return hvd


class HorovodTransport:
    """Moves bytes with Horovod's `allgather` and `alltoall`, for jobs that horovodrun or mpirun started.

    Horovod matches operations by name, so the program's own reductions may run at the same time. A message is one
    operation of Horovod. Several may be in flight.

    Args:
        process_set: the ranks that take part; by default all. Made with `hvd.add_process_set` or given to `hvd.init`.
        timeout_s: how long a call waits for the other ranks.

    Raises:
        ModuleNotFoundError: Horovod is not installed.
        ValueError: `hvd.init()` has not been called, this rank is not in the process set, the timeout is not positive,
            or a launcher has started several processes but Horovod sees only one.
        RankFailed: by a call, if the other ranks do not arrive within `timeout_s`, or an earlier call failed.
        horovod.common.exceptions.HorovodInternalError: by a call, if Horovod reports a lost rank or different sizes.

    References:
        A. Sergeev and M. Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow", 2018,
        arXiv:1802.05799.
    """

    in_flight = 4  # operations reuse as many names in turn: Horovod remembers what it negotiated under a name

    def __init__(self, process_set: Any = None, *, timeout_s: float = 600.0) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self._hvd = hvd = horovod_torch()
        if not hvd.is_initialized():
            raise ValueError("Horovod is not initialized: call hvd.init() first")
        if process_set is None:
            advice = (
                "start them with horovodrun, or the mpirun of the MPI it was built with; or give "
                "process_set=hvd.global_process_set, if each is a program of its own"
            )
            check_sees_all_processes(hvd.size(), "Horovod", advice)
        self._process_set = hvd.global_process_set if process_set is None else process_set
        if not self._process_set.included():
            raise ValueError(f"rank {hvd.rank()} is not in {self._process_set}")
        self.rank: int = self._process_set.rank()
        self.world_size: int = self._process_set.size()
        self._timeout_s = timeout_s
        self._calls = Calls("Horovod")
        ranks = tuple(self._process_set.ranks or range(hvd.size()))
        number = next(_numbers.setdefault(ranks, itertools.count()))
        self._name = f"terncomm.{'-'.join(map(str, ranks)) if process_set is not None else 'all'}.{number}"

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
        received = payload.new_empty(self.world_size, payload.shape[-1])
        return received, self._operation(kind, payload.contiguous(), received)

    def _operation(self, kind: Kind, mine: torch.Tensor, received: torch.Tensor) -> Iterator[Wait]:
        with self._calls.guarded():
            number = self._calls.hold(mine)
            # The n-th operation has the same name on all ranks. If ranks are out of step, Horovod then reports
            # different sizes. It adds the kind to the name, so ranks that call different kinds wait until the timeout.
            name = f"{self._name}.{number % self.in_flight}"
            if kind == "all_gather":
                handle = self._hvd.allgather_async(mine.unsqueeze(0), name=name, process_set=self._process_set)
            else:
                handle = self._hvd.alltoall_async(mine, name=name, process_set=self._process_set)
        yield partial(self._wait, handle, number, received)

    def _wait(self, handle: Any, number: int, received: torch.Tensor) -> None:
        with self._calls.guarded():
            poll(
                partial(self._hvd.poll, handle),
                timeout_s=self._timeout_s,
                world_size=self.world_size,
                pause_s=_POLL_S,
            )
            out = self._hvd.synchronize(handle)
            received.copy_(out[0] if isinstance(out, tuple) else out)  # alltoall returns (output, splits)
            self._calls.release(number)
