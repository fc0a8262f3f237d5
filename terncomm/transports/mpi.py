"""An MPI communicator as a transport. mpi4py is imported when a transport is made, not before."""

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

from terncomm.transports.base import Kind, Wait, alone, delivered, perform
from terncomm.transports.calls import Calls, has_failed, poll
from terncomm.transports.launched import check_not_alone

_LAST_WORDS_S = 1.0  # for mpirun to pass the traceback on: at MPI_Abort it drops what it has not read yet
_hooked = False
_LEFT = 1  # the tag of the message that says so
_FAREWELL_S = 5.0
_lines: "list[_Line]" = []
_LIBRARY = "MPI"


class MPITransport:
    """Bytes over an MPI communicator, for jobs that mpirun or srun started; torch.distributed is not needed.

    Works on a duplicate of the communicator, so the program's own messages and these never meet. An exception that
    nobody catches, in whatever thread, ends the whole job by `MPI_Abort`, once its traceback is printed: without that
    the other ranks would wait for a rank that has left. So does a rank that leaves after a call was given up. That a
    rank was killed mpirun itself notices, and ends the job. A rank that ends quietly, by `sys.exit`, leaves word.

    Args:
        comm: an intracommunicator of mpi4py; by default `MPI.COMM_WORLD`.
        timeout_s: how long a call waits for the other ranks.
        cuda_aware: the MPI library reads and writes CUDA memory by itself (Open MPI: `ompi_info --parsable --all | grep
            mpi_built_with_cuda_support:value`). Else CUDA payloads are staged through host memory.

    A message is one request, and several may be under way.

    Raises:
        ModuleNotFoundError: mpi4py is not installed.
        RankFailed: in every call, when another rank has ended, ranks have not come within `timeout_s`, or MPI reports
            an error.
        ValueError: the timeout is not positive; an intercommunicator; or a launcher has started several processes of
            which MPI knows nothing, as torchrun, or the mpirun of another MPI.

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
            advice = "pip install mpi4py mpich; mpi4py alone where there is an MPI"
            raise ModuleNotFoundError(f"MPITransport needs mpi4py ({error}): {advice}") from None
        if comm is not None and comm.Is_inter():
            raise ValueError("wanted an intracommunicator, got one between two groups")
        check_not_alone(MPI.COMM_WORLD.Get_size(), f"MPI ({_version(MPI)})", f"start them with {_mpirun()}")
        self._mpi = MPI
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._line = _Line(self._comm)
        self._timeout_s = timeout_s
        self._cuda_aware = cuda_aware
        self._calls = Calls(_LIBRARY, (MPI.Exception,))
        self.rank: int = self._comm.Get_rank()
        self.world_size: int = self._comm.Get_size()
        _abort_on_exception(MPI)

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
        mine = self._at_home(payload)
        received = mine.new_empty(self.world_size, mine.shape[-1])
        return delivered(received, self._request(kind, mine, received), payload.device)

    def _at_home(self, payload: torch.Tensor) -> torch.Tensor:
        """The payload where MPI can read it, whole."""
        if payload.is_cuda:
            if self._cuda_aware:
                payload = payload.contiguous()
                torch.cuda.current_stream(payload.device).synchronize()  # MPI knows nothing of streams
                return payload
            payload = payload.cpu()  # waits for the stream by itself
        return payload.contiguous()

    def _request(self, kind: Kind, mine: torch.Tensor, received: torch.Tensor) -> Iterator[Wait]:
        with self._calls.guarded():
            number = self._calls.hold(mine, received)
            collective = self._comm.Iallgather if kind == "all_gather" else self._comm.Ialltoall
            request = collective(*([_memory(tensor), self._mpi.BYTE] for tensor in (mine, received)))
            self._line.calls = number
        yield partial(self._wait, request, number)

    def _wait(self, request: Any, number: int) -> None:
        def look() -> None:
            if gone := self._line.gone(number):
                raise ConnectionError(f"rank {', '.join(map(str, gone))} has ended")

        with self._calls.guarded():
            # No pause, but another rank may share this core.
            poll(request.Test, timeout_s=self._timeout_s, world_size=self.world_size, pause_s=0, look=look)
            self._calls.release(number)


class _Line:
    """A communicator's word that a rank has ended: the number of calls that it took part in."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._others = set(range(comm.Get_size())) - {comm.Get_rank()}
        self._left: dict[int, int] = {}
        self.calls = 0  # of this rank
        _lines.append(self)

    def _read(self) -> None:
        for rank in self._others - self._left.keys():
            if self._comm.iprobe(source=rank, tag=_LEFT):
                self._left[rank] = self._comm.recv(source=rank, tag=_LEFT)

    def gone(self, call: int) -> list[int]:
        """The ranks that have ended and will not come to the call of this number."""
        self._read()
        return sorted(rank for rank, calls in self._left.items() if calls < call)

    def leave(self) -> None:
        """Leave word, and wait a while for that of the others: no message should stay under way."""
        sent = [self._comm.isend(self.calls, rank, _LEFT) for rank in self._others]
        ends = time.monotonic() + _FAREWELL_S  # who has not ended by then is waited for in MPI_Finalize
        while time.monotonic() < ends:
            self._read()
            if len(self._left) == len(self._others) and all(each.Test() for each in sent):
                break
            time.sleep(0.001)


def _version(mpi: Any) -> str:
    return str(mpi.Get_library_version()).strip("\0\n ").partition("\n")[0]


def _mpirun() -> str:
    """The command that belongs to the MPI in use, as far as that can be told."""
    beside = Path(sys.prefix, "bin", "mpirun")
    return str(beside) if beside.exists() else "the mpirun of that MPI"


def _memory(tensor: torch.Tensor) -> Any:
    return tensor.view(-1) if tensor.is_cuda else tensor.view(-1).numpy()


def _abort_on_exception(mpi: Any) -> None:
    """An exception that nobody catches ends all ranks. Once in a process."""
    global _hooked
    if _hooked:
        return
    _hooked = True
    before, before_in_thread = sys.excepthook, threading.excepthook

    def abort() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        if mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1:
            time.sleep(_LAST_WORDS_S)
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
        if os.getpid() != process:  # a forked child is no rank
            return
        if has_failed(_LIBRARY):
            abort()
        elif mpi.Is_initialized() and not mpi.Is_finalized():
            for line in _lines:
                line.leave()

    atexit.register(leave)  # before mpi4py's own, which would wait for all ranks
