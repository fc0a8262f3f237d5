"""The state of the DDP hook: what averages gradients, and where that runs."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from terncomm.codecs import Codec
from terncomm.hooks.averaging import Averaging
from terncomm.hooks.connection import connect
from terncomm.hooks.runner import OrderedWorker, SideStream
from terncomm.layers import GROUPS


class CommState(Averaging):
    """The state that goes with :func:`comm_hook`: which codec, what travels exactly, how far training is.

    Args:
        codec: "terngrad", "int8", or a codec such as `Ternary(clip=2.5)`.
        skip: parameters that travel exactly, beside those exempt by rule: names, names of modules, shell patterns.
        min_numel: parameters with fewer elements, or with one dimension, travel exactly (TernGrad's
            `size_to_binarize`).
        warmup_steps: first steps in which everything travels exactly (TernGrad's `floating_grad_epoch`, in steps).
        exchange: "auto", "gather" or "two_phase"; the result is the same bits.
        seed: of the rounding noise; equal on all ranks.
        exempt: groups found by the model's structure that travel exactly, of "embedding" and "head"; `()` codes them
            too, as published. Without a model (the plain pair of state and hook) there is no structure to look at.
        named_parameters: of the model, for `skip` and for names in statistics; `register` gives them by itself.
        process_group: the group that the DDP model was made with, which a bucket does not tell; by default the
            default group. `register` gives it by itself.

    Raises:
        ValueError, TypeError: an option that cannot be.

    Note:
        Parameters that are not in `named_parameters` are numbered as they are first seen, so that the noise depends on
        how DDP cuts its buckets. In a world of one rank nothing is coded: the gradients stay as they are.
    """

    _OWN = (*Averaging._OWN, "_group", "_worker", "_side_stream")

    def __init__(
        self,
        codec: str | Codec = "terngrad",
        *,
        skip: Collection[str] = (),
        min_numel: int = 1024,
        warmup_steps: int = 0,
        exchange: str = "auto",
        seed: int = 0,
        exempt: Collection[str] = GROUPS,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._group = process_group
        super().__init__(
            codec,
            skip=skip,
            min_numel=min_numel,
            warmup_steps=warmup_steps,
            exchange=exchange,
            seed=seed,
            exempt=exempt,
            named_parameters=named_parameters or (),
        )

    def _detach(self) -> None:
        super()._detach()
        self._worker = OrderedWorker()
        self._side_stream = SideStream()

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self._group = None  # a copy is of the default group
        super().__setstate__(saved)

    def _reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        if self._connection is None:
            if self._in_levels:
                raise RuntimeError("this CommState was copied, without its intra_group: call terncomm.register anew")
            group = self._group or dist.distributed_c10d._get_default_group()
            self._connect(connect(group, buffer.device, self._configuration()))
        assert self._connection is not None
        connection = self._connection
        if bucket.index() == 0:
            self._begin_step()
        where = f"bucket {bucket.index()} of step {self._step}"
        try:
            work = self._work(buffer, bucket.parameters(), bucket.index(), connection.transport)
        except Exception as error:
            work = _raising(error)
        threads = torch.get_num_threads()

        def job() -> torch.Tensor:
            if torch.get_num_threads() != threads:  # torch keeps the number per thread
                torch.set_num_threads(threads)
            try:
                return work()
            except Exception as error:
                failure = connection.fail(error, f"{where}, {self._clock.phase}")
                raise failure from (None if failure is error else error)

        if buffer.is_cuda:
            return self._side_stream.submit(job, buffer.device)
        return self._worker.submit(job)


def _raising(error: Exception) -> Callable[[], torch.Tensor]:
    def work() -> torch.Tensor:
        raise error

    return work
