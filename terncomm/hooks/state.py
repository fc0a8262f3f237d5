"""The state of the DDP hook: what averages gradients, and where that runs."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from terncomm.codecs import CodecLike
from terncomm.hooks.agreement import agree_on
from terncomm.hooks.averaging import Averaging
from terncomm.hooks.connection import Connection, connect
from terncomm.hooks.options import Options
from terncomm.hooks.stream import SideStream
from terncomm.path.message import Path
from terncomm.path.pipeline import Pipeline
from terncomm.torch_internals import default_group
from terncomm.transports import Metered, Transport


class CommState(Averaging):
    """The state that goes with :func:`comm_hook`: which codec, what travels exactly, how far training is.

    Args:
        codec: a codec, its name, or rules.
        named_parameters: of the model, for `skip`, rules and names in statistics; `register` gives them by itself.
        process_group: the group that the DDP model was made with, which a bucket does not tell; by default the
            default group. `register` gives it by itself.
        transport: moves the bytes, in place of a process group of our own; see :func:`terncomm.register`.
        options: see :class:`terncomm.hooks.options.Options`. Without a model (the plain pair of state and hook) there
            is no structure, so embeddings and the output head are not found.

    Raises:
        ValueError, TypeError: an option that cannot be.

    Note:
        Parameters that are not in `named_parameters` are numbered as they are first seen, so that the noise depends on
        how DDP cuts its buckets. In a world of one rank nothing is coded: the gradients stay as they are.
    """

    OWN = (*Averaging.OWN, "_group", "_given", "_pipeline", "_side_stream")

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
        super().__init__(Options(codec=codec, **options), named_parameters or ())

    def _detach(self) -> None:
        super()._detach()
        self._pipeline = Pipeline()
        self._side_stream = SideStream()

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self._group, self._given = None, None  # a copy is of the default group
        super().__setstate__(saved)

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Begin to average a bucket of DDP; the future holds its buffer, or raises."""
        buffer, index = bucket.buffer(), bucket.index()
        if self.transport is None:
            self._connect_late(buffer.device)
        if index == 0:
            self.begin_step()
        where = f"bucket {index} of step {self._step}"
        try:
            path = self.path(buffer, bucket.parameters(), index, final=bucket.is_last())
        except Exception as error:
            path = _raising(error)

        def failing(error: Exception, phase: str) -> Exception:
            return self.fail(error, where, phase)

        if buffer.is_cuda:
            return self._side_stream.submit(lambda: self.run_together(path, index, where), buffer.device)
        return self._pipeline.submit(path, self.transports, self.clock, failing, index)

    def meet(self, device: torch.device, configuration: dict[str, Any]) -> Connection | None:
        """Meet the other ranks, compare configurations, and use what connects them; None over a given transport.

        Raises:
            RankFailed, ConfigurationsDiffer: see :func:`terncomm.hooks.connection.connect`.
            ValueError: the transport is not among the ranks of the process group.
        """
        group = self._group or default_group()
        if self._given is None:
            connection = connect(group, device, configuration)
            self.connect(connection.transport, connection)
            return connection
        transport = Metered(self._given)
        here, there = (transport.rank, transport.world_size), (group.rank(), group.size())
        if here != there:
            raise ValueError(
                f"transport: rank {here[0]} of {here[1]}, in the model's process group {there[0]} of {there[1]}"
            )
        agree_on(configuration, transport, device=device)
        self.connect(transport)
        return None

    def _connect_late(self, device: torch.device) -> None:
        """Meet the other ranks at the first bucket, where :func:`terncomm.register` has not done so."""
        if self._had_levels:
            raise RuntimeError("this CommState was copied, without its intra_group: call terncomm.register anew")
        if self._had_transport and self._given is None:
            raise RuntimeError("this CommState was copied, without its transport: make a new one with transport=")
        self.meet(device, self.configuration())


def _raising(error: Exception) -> Path[torch.Tensor]:
    """A path that raises when its turn comes."""
    yield from ()
    raise error
