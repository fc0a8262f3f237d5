"""An MPI communicator as a transport. mpi4py is imported when a transport is made, not before."""

import atexit
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from terncomm.transports.base import RankFailed
from terncomm.transports.launched import check_not_alone

_LAST_WORDS_S = 1.0  # for mpirun to pass the traceback on: at MPI_Abort it drops what it has not read yet
_hooked = False
_LOOK_S = 0.5  # how often a call that waits looks whether a rank has ended
_LEFT = 1  # the tag of the message that says so
_FAREWELL_S = 5.0
_lines: "list[_Line]" = []
_pending: list[Any] = []  # what belongs to calls that were given up; MPI may still write there


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
        self._broken = ""
        self.rank: int = self._comm.Get_rank()
        self.world_size: int = self._comm.Get_size()
        _abort_on_exception(MPI)

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        if self.world_size == 1 or payload.numel() == 0:
            return payload.expand(self.world_size, -1).clone()
        mine = self._at_home(payload)
        out = mine.new_empty(self.world_size, mine.numel())
        self._call(self._comm.Iallgather, mine, out)
        return out.to(payload.device)

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        if self.world_size == 1 or rows.numel() == 0:
            return rows.clone()
        mine = self._at_home(rows)
        out = torch.empty_like(mine)
        self._call(self._comm.Ialltoall, mine, out)
        return out.to(rows.device)

    def _at_home(self, payload: torch.Tensor) -> torch.Tensor:
        """The payload where MPI can read it, whole."""
        if payload.is_cuda:
            if self._cuda_aware:
                payload = payload.contiguous()
                torch.cuda.current_stream(payload.device).synchronize()  # MPI knows nothing of streams
                return payload
            payload = payload.cpu()  # waits for the stream by itself
        return payload.contiguous()

    def _call(self, collective: Any, mine: torch.Tensor, out: torch.Tensor) -> None:
        if self._broken:
            raise RankFailed(f"an earlier exchange over MPI failed, so none can follow: {self._broken}")
        self._line.calls += 1
        octets = [[_memory(tensor), self._mpi.BYTE] for tensor in (mine, out)]
        request = None
        try:
            request = collective(*octets)
            began, look_s = time.monotonic(), _LOOK_S
            while not request.Test():
                waited_s = time.monotonic() - began
                if waited_s > look_s:
                    look_s += _LOOK_S
                    if gone := self._line.gone():
                        raise ConnectionError(f"rank {', '.join(map(str, gone))} has ended")
                if waited_s > self._timeout_s:
                    raise TimeoutError(f"not all of {self.world_size} ranks have come within {self._timeout_s:g} s")
                time.sleep(0)  # another rank may share this core
        except BaseException as error:  # an interrupt too: MPI may still write to these buffers, or read them
            self._broken = str(error) or type(error).__name__
            _pending.extend([request, mine, out])
            if isinstance(error, (TimeoutError, ConnectionError, self._mpi.Exception)):
                raise RankFailed(f"the exchange with other ranks broke off: {self._broken}") from None
            raise


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

    def gone(self) -> list[int]:
        """The ranks that have ended and will not come to the call that this one is in."""
        self._read()
        return sorted(rank for rank, calls in self._left.items() if calls < self.calls)

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
        if _pending:
            abort()
        elif mpi.Is_initialized() and not mpi.Is_finalized():
            for line in _lines:
                line.leave()

    atexit.register(leave)  # before mpi4py's own, which would wait for all ranks
