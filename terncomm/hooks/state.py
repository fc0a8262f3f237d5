"""The state of the DDP hook. It averages buckets on threads of its own (CPU) or on a side stream (CUDA)."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from terncomm.codecs import CodecLike
from terncomm.hooks.agreement import agree_on
from terncomm.hooks.connection import Connection, connect
from terncomm.hooks.options import Options
from terncomm.hooks.reducer import GradientReducer
from terncomm.hooks.stream import SideStream
from terncomm.hooks.use_watch import DDP_ALONE
from terncomm.path.message import Path
from terncomm.path.pipeline import Pipeline
from terncomm.torch_internals import backward_pass, default_group, models_with_hook_state
from terncomm.transports import Metered, Transport


class CommState(GradientReducer):
    """The state of :func:`comm_hook`: options, step counter and statistics.

    Args:
        codec: a codec, its name, or rules.
        named_parameters: of the model, for `skip`, rules and names in statistics. `register` passes them.
        process_group: the process group of the DDP model, which its buckets do not contain; by default the default
            group. `register` passes it. A model of another group is refused at its first bucket.
        transport: sends the bytes, in place of a private process group; see :func:`terncomm.register`.
        options: see :class:`terncomm.hooks.options.Options`. Without `register` the state does not see the model's
            structure, so `exempt` finds no embeddings and no output head: name them in `skip`.

    Raises:
        ValueError, TypeError: an option is invalid.

    Note:
        Parameters that are not in `named_parameters` are numbered in the order in which they are first seen. Their
        rounding noise then depends on DDP's buckets. With a single rank nothing is compressed: gradients do not change.
    """

    PROCESS_LOCAL = (
        *GradientReducer.PROCESS_LOCAL,
        "_group",
        "_given",
        "_pipeline",
        "_side_stream",
        "_index",
        "_ended",
        "_pass",
    )
    UNUSED = DDP_ALONE

    def __init__(
        self,
        codec: CodecLike = "terngrad",
        *,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
        process_group: dist.ProcessGroup | None = None,
        transport: Transport | None = None,
        **options: Any,
    ) -> None:
        self._group, self._given, self._had_transport = process_group, transport, transport is not None
        self.skips_buckets = False  # whether DDP has skip_all_reduce_unused_params
        super().__init__(Options(codec=codec, **options), named_parameters or ())

    def _detach(self) -> None:
        super()._detach()
        self._pipeline = Pipeline()
        self._side_stream = SideStream()
        self._ended, self._index, self._pass = True, 0, -1  # of the last bucket that came; see _begins_step

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self._group, self._given = None, None  # a copy uses the default group
        super().__setstate__(saved)

    @property
    def _place(self) -> tuple[int, int]:
        if self.transport is None and self._group is not None:
            return self._group.rank(), self._group.size()
        return super()._place

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Begin to average a bucket of DDP.

        Returns:
            A future of the mean: the bucket's buffer, (n,), changed in place, or a new tensor if it is sparse.
        """
        buffer = bucket.buffer().detach()  # with backward(create_graph=True) it has a graph
        index = bucket.index()
        if self.transport is None:
            self._connect_late(buffer.device)
        if self._begins_step(bucket):
            self.begin_step()
        where = f"bucket {index} of step {self._step}"
        try:
            path = self.path(buffer, bucket.parameters(), index, final=bucket.is_last())
        except Exception as error:
            path = _raising(error)

        def failing(error: Exception, phase: str) -> Exception:
            return self.fail(error, where, phase)

        if buffer.is_cuda:
            return self._side_stream.submit(lambda: self.run_reporting(path, index, where), buffer.device)
        return self._pipeline.submit(path, self.transports, self.clock, failing, index)

    @property
    def counts_passes(self) -> bool:
        """Not a pass in which a rank without inputs takes part for the others' sake, inside DDP's join()."""
        return backward_pass() >= 0

    def _begins_step(self, bucket: GradBucket) -> bool:
        """Whether this is the first bucket of a step. DDP may skip any bucket, also the first and the last."""
        index, number = bucket.index(), backward_pass() if self.skips_buckets else -1
        begins = self._ended or index <= self._index or number != self._pass
        self._index, self._ended, self._pass = index, bucket.is_last(), number
        return begins

    def meet(self, device: torch.device, configuration: dict[str, Any]) -> Connection | None:
        """Connect to the other ranks, and compare configurations.

        Returns:
            The connection; None with a transport of the user's own.

        Raises:
            RankFailed, ConfigurationsDiffer: see :func:`terncomm.hooks.connection.connect`.
            ValueError: rank or world size of the transport are not those of the process group.
        """
        self.get_ready(device)
        group = self._group or default_group()
        if self._given is None:
            connection = connect(group, device, configuration)
            self.connect(connection.transport, connection)
            return connection
        transport = Metered(self._given)
        here, there = (transport.rank, transport.world_size), (group.rank(), group.size())
        if here != there:
            raise ValueError(
                f"transport: wanted rank {there[0]} of {there[1]}, as in the model's process group, got rank {here[0]} "
                f"of {here[1]}"
            )
        agree_on(configuration, transport, device=device)
        self.connect(transport)
        return None

    def _connect_late(self, device: torch.device) -> None:
        """Connect at the first bucket, if :func:`terncomm.register` was not called."""
        if self._had_nodes:
            raise RuntimeError("this CommState was copied, without its intra_group: call terncomm.register again")
        if self._had_transport and self._given is None:
            raise RuntimeError("this CommState was copied, without its transport: make a new one with transport=")
        self._check_group()
        self.meet(device, self.configuration())
        self.announce()

    def _check_group(self) -> None:
        """Check that this state knows the process group of its model. With another, it could meet another model's.

        Raises:
            ValueError: it has another group than a DDP model that uses it.
        """
        known = self._group or default_group()
        for model in models_with_hook_state(self):
            if model.process_group is not known:
                raise ValueError(
                    f"this DDP model has a process group of its own, over ranks {_ranks(model.process_group)}, and "
                    f"CommState has {'the default one' if self._group is None else 'another'}, over ranks "
                    f"{_ranks(known)}: give CommState(process_group=), or use terncomm.register"
                )


def _ranks(group: dist.ProcessGroup) -> str:
    return ", ".join(map(str, dist.get_process_group_ranks(group)))


def _raising(error: Exception) -> Path[torch.Tensor]:
    """A path that raises when its turn comes."""
    yield from ()
    raise error
