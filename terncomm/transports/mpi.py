"""A transport over an MPI communicator. It imports mpi4py when a transport is made, not before."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from terncomm.transports.base import Kind, Wait, begin_and_wait, copied_to, nothing_to_send
from terncomm.transports.calls import Calls, has_failed, poll
from terncomm.transports.launched import check_sees_all_processes

_ABORT_DELAY_S = 1.0  # before MPI_Abort, so that mpirun passes the traceback on: it drops what it has not read
_hooked = False
_EXIT_TAG = 1  # tag of the message in which a rank says that it exits
_EXIT_WAIT_S = 5.0  # how long a rank that exits waits for these messages of the others
_all_notices: "list[_ExitNotices]" = []
_LIBRARY = "MPI"


class MPITransport:
    """Moves bytes over an MPI communicator, for jobs that mpirun or srun started. Does not need torch.distributed.

    It duplicates the communicator, so its messages do not mix with the program's own. A message is one request of MPI.
    Several may be in flight.

    An uncaught exception in any thread prints its traceback and ends the whole job by `MPI_Abort`; else the other ranks
    would wait for this one. A rank that exits after a failed call ends the job in the same way. If a rank is killed,
    mpirun notices it and ends the job. A rank that exits without an error, by `sys.exit` for example, notifies the
    others: their calls raise `RankFailed`.

    Args:
        comm: an intracommunicator of mpi4py; by default `MPI.COMM_WORLD`. `MPI.COMM_SELF` for one-rank programs that a
            launcher starts together.
        timeout_s: how long a call waits for the other ranks.
        cuda_aware: whether the MPI library reads and writes CUDA memory itself (Open MPI: `ompi_info --parsable --all |
            grep mpi_built_with_cuda_support:value`). If not, CUDA payloads are staged through host memory.

    Raises:
        ModuleNotFoundError: mpi4py is not installed.
        ValueError: the timeout is not positive; `comm` is an intercommunicator; or a launcher has started several
            processes but MPI sees only one, because the launcher is torchrun or the mpirun of another MPI.
        RankFailed: by a call, if another rank has exited, the other ranks do not arrive within `timeout_s`, MPI reports
            an error, or an earlier call failed.

    References:
        Message Passing Interface Forum, "MPI: A Message-Passing Interface Standard, Version 4.1", 2023, section 6.12
        (nonblocking collective operations).
    """

    in_flight = 4

    def __init__(self, comm: Any = None, *, timeout_s: float = 600.0, cuda_aware: bool = False) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        try:
            from mpi4py import MPI
        except ModuleNotFoundError as error:
            advice = "pip install mpi4py mpich (only mpi4py if this machine has an MPI)"
            raise ModuleNotFoundError(f"MPITransport needs mpi4py ({error}): {advice}") from None
        if comm is not None and comm.Is_inter():
            raise ValueError("comm must be an intracommunicator, got an intercommunicator")
        if comm is None:
            advice = f"start them with {_mpirun()}; or give comm=MPI.COMM_SELF, if each is a program of its own"
            check_sees_all_processes(MPI.COMM_WORLD.Get_size(), f"MPI ({_version(MPI)})", advice)
        self._mpi = MPI
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._notices = _ExitNotices(self._comm)
        self._timeout_s = timeout_s
        self._cuda_aware = cuda_aware
        self._calls = Calls(_LIBRARY, (MPI.Exception,))
        self.rank: int = self._comm.Get_rank()
        self.world_size: int = self._comm.Get_size()
        _abort_on_exception(MPI)

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
        mine = self._readable(payload)
        received = mine.new_empty(self.world_size, mine.shape[-1])
        return copied_to(received, self._request(kind, mine, received), payload.device)

    def _readable(self, payload: torch.Tensor) -> torch.Tensor:
        """The payload as a contiguous tensor in memory that MPI can read."""
        if payload.is_cuda:
            if self._cuda_aware:
                payload = payload.contiguous()
                torch.cuda.current_stream(payload.device).synchronize()  # MPI does not know CUDA streams
                return payload
            payload = payload.cpu()  # this waits for the stream
        return payload.contiguous()

    def _request(self, kind: Kind, mine: torch.Tensor, received: torch.Tensor) -> Iterator[Wait]:
        with self._calls.guarded():
            number = self._calls.hold(mine, received)
            collective = self._comm.Iallgather if kind == "all_gather" else self._comm.Ialltoall
            request = collective(*([_memory(tensor), self._mpi.BYTE] for tensor in (mine, received)))
            self._notices.calls = number
        yield partial(self._wait, request, number)

    def _wait(self, request: Any, number: int) -> None:
        def check() -> None:
            if gone := self._notices.exited_before(number):
                raise ConnectionError(f"rank {', '.join(map(str, gone))} has ended")

        with self._calls.guarded():
            # pause_s=0 only yields the core, which another rank may need.
            poll(request.Test, timeout_s=self._timeout_s, world_size=self.world_size, pause_s=0, check=check)
            self._calls.release(number)


class _ExitNotices:
    """Messages over one communicator in which a rank that exits tells the others how many calls it took part in."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._others = set(range(comm.Get_size())) - {comm.Get_rank()}
        self._calls_at_exit: dict[int, int] = {}
        self.calls = 0  # that this rank has started
        _all_notices.append(self)

    def _read(self) -> None:
        for rank in self._others - self._calls_at_exit.keys():
            if self._comm.iprobe(source=rank, tag=_EXIT_TAG):
                self._calls_at_exit[rank] = self._comm.recv(source=rank, tag=_EXIT_TAG)

    def exited_before(self, call: int) -> list[int]:
        """The ranks that have exited and will not take part in the call of this number."""
        self._read()
        return sorted(rank for rank, calls in self._calls_at_exit.items() if calls < call)

    def announce_exit(self) -> None:
        """Tell the other ranks that this one exits. Wait for the same from them, so that no message stays in flight."""
        sent = [self._comm.isend(self.calls, rank, _EXIT_TAG) for rank in self._others]
        ends = time.monotonic() + _EXIT_WAIT_S  # MPI_Finalize waits for ranks that take longer
        while time.monotonic() < ends:
            self._read()
            if len(self._calls_at_exit) == len(self._others) and all(each.Test() for each in sent):
                break
            time.sleep(0.001)


def _version(mpi: Any) -> str:
    return str(mpi.Get_library_version()).strip("\0\n ").partition("\n")[0]


def _mpirun() -> str:
    """The mpirun of the MPI in use: its path in this Python environment, or words for it if there is none."""
    beside = Path(sys.prefix, "bin", "mpirun")
    return str(beside) if beside.exists() else "the mpirun of that MPI"


def _memory(tensor: torch.Tensor) -> Any:
    return tensor.view(-1) if tensor.is_cuda else tensor.view(-1).numpy()


def _abort_on_exception(mpi: Any) -> None:
    """Make an uncaught exception end all ranks, and the exit of this one notify them. Takes effect once a process."""
    global _hooked
    if _hooked:
        return
    _hooked = True
    before, before_in_thread = sys.excepthook, threading.excepthook

    def abort() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        if mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1:
            time.sleep(_ABORT_DELAY_S)
            mpi.COMM_WORLD.Abort(1)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        abort()

    def hook_in_thread(args: threading.ExceptHookArgs) -> None:
        before_in_thread(args)
        abort()

    sys.excepthook, threading.excepthook = hook, hook_in_thread

    process = os.getpid()

    def leave() -> None:
        if os.getpid() != process:  # a forked child is not a rank
            return
        if has_failed(_LIBRARY):
            abort()
        elif mpi.Is_initialized() and not mpi.Is_finalized():
            for notices in _all_notices:
                notices.announce_exit()

    atexit.register(leave)  # it runs before the exit handler of mpi4py, which waits for all ranks
