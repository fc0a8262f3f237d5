"""Horovod as a transport. horovod is imported when a transport is made, not before."""

import itertools
import time
from typing import Any

import torch

from terncomm.transports.base import RankFailed
from terncomm.transports.launched import check_not_alone

_POLL_S = 5e-5  # Horovod's own wait sleeps for 1 ms at a time
_numbers: "dict[tuple[int, ...], itertools.count[int]]" = {}  # of the transports over these ranks, alike on all of them
_pending: list[Any] = []  # buffers of calls that were given up; Horovod may still write there

RECIPE = "bash launch/build_horovod.sh in terncomm's repository builds it for the torch that is installed"


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
    """Bytes over Horovod's `allgather` and `alltoall`, for jobs that horovodrun or mpirun started.

    Calls go by a name in Horovod's queue, so the program's own reductions may run at the same time.

    Args:
        process_set: the ranks that take part; by default all. Made with `hvd.add_process_set` or given to `hvd.init`.
        timeout_s: how long a call waits for the other ranks.

    Raises:
        ModuleNotFoundError: Horovod is not installed.
        ValueError: `hvd.init()` has not been called, this rank is not in the process set, the timeout is not positive,
            or a launcher has started several processes of which Horovod knows nothing.
        RankFailed: in every call, when other ranks have not come within `timeout_s`.
        horovod.common.exceptions.HorovodInternalError: in every call, when Horovod says that a rank is lost, or that
            sizes differ.

    References:
        A. Sergeev and M. Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow", 2018,
        arXiv:1802.05799.
    """

    def __init__(self, process_set: Any = None, *, timeout_s: float = 600.0) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self._hvd = hvd = horovod_torch()
        if not hvd.is_initialized():
            raise ValueError("Horovod is not initialized: call hvd.init() first")
        check_not_alone(hvd.size(), "Horovod", "start them with horovodrun, or the mpirun of the MPI it was built with")
        self._process_set = hvd.global_process_set if process_set is None else process_set
        if not self._process_set.included():
            raise ValueError(f"rank {hvd.rank()} is not in {self._process_set}")
        self.rank: int = self._process_set.rank()
        self.world_size: int = self._process_set.size()
        self._timeout_s = timeout_s
        self._broken = ""
        ranks = tuple(self._process_set.ranks or range(hvd.size()))
        number = next(_numbers.setdefault(ranks, itertools.count()))
        self._name = f"terncomm.{'-'.join(map(str, ranks)) if process_set is not None else 'all'}.{number}"

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        if self.world_size == 1 or payload.numel() == 0:
            return payload.expand(self.world_size, -1).clone()
        return self._call("allgather", payload.contiguous().unsqueeze(0))

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        if self.world_size == 1 or rows.numel() == 0:
            return rows.clone()
        return self._call("alltoall", rows.contiguous())

    def _call(self, kind: str, mine: torch.Tensor) -> torch.Tensor:
        if self._broken:
            raise RankFailed(f"an earlier exchange over Horovod failed, so none can follow: {self._broken}")
        hvd, handle = self._hvd, None
        try:
            # One name for all calls of a kind: ranks that are not in step meet in it, and are told that sizes differ.
            collective = getattr(hvd, f"{kind}_async")
            handle = collective(mine, name=f"{self._name}.{kind}", process_set=self._process_set)
            ends = time.monotonic() + self._timeout_s
            while not hvd.poll(handle):
                if time.monotonic() > ends:
                    raise TimeoutError(f"not all of {self.world_size} ranks have come within {self._timeout_s:g} s")
                time.sleep(_POLL_S)
            out = hvd.synchronize(handle)
            received: torch.Tensor = out[0] if isinstance(out, tuple) else out  # alltoall tells splits too
            return received
        except BaseException as error:  # an interrupt too: Horovod may still write to these buffers, or read them
            self._broken = str(error) or type(error).__name__
            _pending.extend([handle, mine])
            if isinstance(error, TimeoutError):
                raise RankFailed(f"the exchange with other ranks broke off: {self._broken}") from None
            raise
