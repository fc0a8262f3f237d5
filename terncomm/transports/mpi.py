"""An MPI communicator as a transport. mpi4py is imported when a transport is made, not before."""

import atexit
import sys
import threading
import time
from types import TracebackType
from typing import Any

import torch

from terncomm.transports.base import RankFailed

_LAST_WORDS_S = 1.0  # for mpirun to pass the traceback on: at MPI_Abort it drops what it has not read yet
_hooked = False
_pending: list[Any] = []  # what belongs to calls that were given up; MPI may still write there


class MPITransport:
    """Bytes over an MPI communicator, for jobs that mpirun or srun started; torch.distributed is not needed.

    Works on a duplicate of the communicator, so the program's own messages and these never meet. An exception that
    nobody catches, in whatever thread, ends the whole job by `MPI_Abort`, once its traceback is printed: without that
    the other ranks would wait for a rank that has left. So does a rank that leaves after a call was given up. That a
    rank was killed mpirun itself notices, and ends the job. `sys.exit` on one rank alone nobody notices before the
    timeout.

    Args:
        comm: an intracommunicator of mpi4py; by default `MPI.COMM_WORLD`.
        timeout_s: how long a call waits for the other ranks.
        cuda_aware: the MPI library reads and writes CUDA memory by itself (Open MPI: `ompi_info --parsable --all | grep
            mpi_built_with_cuda_support:value`). Else CUDA payloads are staged through host memory.

    Raises:
        ModuleNotFoundError: mpi4py is not installed.
        RankFailed: in every call, when other ranks have not come within `timeout_s`, or MPI reports an error.
        ValueError: the timeout is not positive, or an intercommunicator.

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
            raise ModuleNotFoundError(f"MPITransport needs mpi4py ({error}): pip install 'terncomm[mpi]'") from None
        if comm is not None and comm.Is_inter():
            raise ValueError("wanted an intracommunicator, got one between two groups")
        self._mpi = MPI
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
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
        octets = [[_memory(tensor), self._mpi.BYTE] for tensor in (mine, out)]
        request = None
        try:
            request = collective(*octets)
            ends = time.monotonic() + self._timeout_s
            while not request.Test():
                if time.monotonic() > ends:
                    raise TimeoutError(f"not all of {self.world_size} ranks have come within {self._timeout_s:g} s")
                time.sleep(0)  # another rank may share this core
        except BaseException as error:  # an interrupt too: MPI may still write to these buffers, or read them
            self._broken = str(error) or type(error).__name__
            _pending.extend([request, mine, out])
            if isinstance(error, (TimeoutError, self._mpi.Exception)):
                raise RankFailed(f"the exchange with other ranks broke off: {self._broken}") from None
            raise


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
    atexit.register(lambda: abort() if _pending else None)  # before mpi4py's own, which would wait for all ranks
