"""Overlaps gradient reduction with the backward pass, for training loops without DDP, by hooks of parameters."""

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from terncomm.path.message import Path, WaitForTurn
from terncomm.path.pipeline import Pipeline
from terncomm.torch_internals import multiply_all

if TYPE_CHECKING:
    from terncomm.hooks.loop import GradientAverager


class Overlap:
    """Averages gradients bucket by bucket while the backward pass runs, the last layers first.

    Hooks of parameters count gradients. A bucket is submitted when its gradients are there and all earlier buckets are
    submitted, so the order is the same on every rank. Errors are raised by :meth:`finish`. Gradients on CUDA are
    averaged in `finish`, on the caller's stream.

    Args:
        averager: gives the paths of the buckets.
        passes: backward passes per step; their gradients are accumulated before they are averaged.
        factor: the mean is multiplied by it; W gives the sum.
        sparse_as_dense: whether sparse gradients are made dense; otherwise they are an error.
        begin_step: called before the first bucket of a step; by default the averager's `begin_step`.
    """

    def __init__(
        self,
        averager: "GradientAverager",
        *,
        passes: int = 1,
        factor: float = 1,
        sparse_as_dense: bool = False,
        begin_step: Callable[[], None] | None = None,
    ) -> None:
        self._averager = weakref.proxy(averager)
        self.passes = passes
        self._scale, self._sparse_as_dense = factor, sparse_as_dense
        self._begin_step = begin_step or self._averager.begin_step
        parameters = cast(list[nn.Parameter], averager.parameters)
        self._buckets = [[parameters[place] for place in places] for places in averager.buckets(list(parameters))]
        self._bucket_of = {each: index for index, bucket in enumerate(self._buckets) for each in bucket}
        self._lock = threading.Lock()  # autograd has a thread for each device
        self._pipeline = Pipeline()
        self._failed: Exception | None = None
        self.next_step()
        self._take_gradients()

    def _take_gradients(self) -> None:
        myself = weakref.ref(self)

        def arrived(parameter: torch.Tensor) -> None:
            if (overlap := myself()) is not None:
                overlap.arrived(cast(nn.Parameter, parameter))

        hooks = [each.register_post_accumulate_grad_hook(arrived) for each in self._bucket_of]  # type: ignore[no-untyped-call]
        weakref.finalize(self, lambda: [hook.remove() for hook in hooks])

    def next_step(self) -> None:
        """Reset the counters of gradients for the next step."""
        self._left = dict.fromkeys(self._bucket_of, self.passes)
        self._missing = list(map(len, self._buckets))
        self._waits: list[Callable[[], object]] = []

    @property
    def idle(self) -> bool:
        """Whether no gradient has arrived since the last step."""
        return not self._waits and all(left == self.passes for left in self._left.values())

    @property
    def has_pending(self) -> bool:
        """Whether reductions have begun for which :meth:`finish` has not waited yet."""
        return bool(self._waits)

    def arrived(self, parameter: nn.Parameter) -> None:
        """Count a gradient; submit the buckets that are complete, in their order.

        Raises:
            RuntimeError: gradients were computed more often than `passes` before they were averaged.
        """
        with self._lock:
            if self._left[parameter] == 0:
                raise RuntimeError(
                    f"gradients were computed more than backward_passes_per_step={self.passes} times before step() or "
                    "synchronize(): increase backward_passes_per_step to accumulate gradients. With GradientAverager, "
                    "call reduce() after every backward pass, or accumulate with overlap=False"
                )
            self._left[parameter] -= 1
            if self._left[parameter] == 0:
                self._missing[self._bucket_of[parameter]] -= 1
                self._submit(lambda index: self._missing[index] == 0)

    def finish(self) -> None:
        """Submit the remaining buckets, with zeros for gradients that are None, and wait for all buckets.

        Raises:
            Exception: the error of the first bucket that failed.
        """
        with self._lock:
            self._submit(lambda index: True)
        try:
            for wait in self._waits:
                wait()
        except Exception:
            if self._failed is None:
                raise
            raise self._failed from self._failed.__cause__
        self.next_step()

    def _submit(self, ready: Callable[[int], bool]) -> None:
        while (index := len(self._waits)) < len(self._buckets) and ready(index):
            if index == 0:
                self._begin_step()
            bucket = self._buckets[index]
            gradients = [self._gradient(each) for each in bucket]
            self._waits.append(self._begin(index, self._path(index, bucket, gradients), gradients[0].is_cuda))

    def _begin(self, index: int, path: Path[torch.Tensor], on_cuda: bool) -> Callable[[], object]:
        """Begin the path of a bucket. Returns a function that waits until the path has ended."""
        averager = self._averager
        where = f"bucket {index} of step {averager.step}"

        def failing(error: Exception, phase: str) -> Exception:
            self._failed = averager.fail(error, where, phase)
            return self._failed

        if on_cuda:
            return lambda: averager.run_reporting(path, index, where)
        return self._pipeline.submit(path, averager.transports, averager.clock, failing, index).wait

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, requires_grad=False)
        elif parameter.grad.layout != torch.strided:
            if not self._sparse_as_dense:
                raise TypeError(
                    f"gradients must be dense, got one of layout {parameter.grad.layout}: use sparse_as_dense=True, or "
                    "overlap=False with a GradientAverager"
                )
            parameter.grad = parameter.grad.to_dense()
        return parameter.grad

    def _path(self, index: int, bucket: list[nn.Parameter], gradients: list[torch.Tensor]) -> Path[torch.Tensor]:
        yield WaitForTurn()  # the path copies its bucket: wait, so that few copies exist at a time
        with torch.no_grad():
            final = index == len(self._buckets) - 1
            yield from self._averager.bucket_path(index, cast(list[torch.Tensor], bucket), gradients, final=final)
            if self._scale != 1:
                multiply_all(gradients, self._scale)
        return gradients[0]
