"""Reductions that overlap with the backward pass, for loops without DDP: hooks of parameters, and buckets in order."""

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from terncomm.path.message import Path, Turn
from terncomm.path.pipeline import Pipeline
from terncomm.torch_internals import multiply_all

if TYPE_CHECKING:
    from terncomm.hooks.loop import GradientAverager


class Overlap:
    """Averages gradients bucket by bucket while the backward pass runs: the last layers first, one order for all.

    Hooks of parameters count gradients; a bucket is submitted when all before it are, so every rank submits the same
    buckets in the same order. Errors are raised by :meth:`finish`. Gradients on CUDA are averaged in `finish`, on the
    caller's stream.

    Args:
        averager: does the averaging.
        passes: backward passes whose gradients add up before they are averaged.
        factor: the mean is multiplied with it: W for a sum.
        densifies: sparse gradients are made dense, in place of an error.
        begin_step: begins the averager's step; by default as the averager does.
    """

    def __init__(
        self,
        averager: "GradientAverager",
        *,
        passes: int = 1,
        factor: float = 1,
        densifies: bool = False,
        begin_step: Callable[[], None] | None = None,
    ) -> None:
        self._averager = weakref.proxy(averager)
        self.passes = passes
        self._factor, self._densifies = factor, densifies
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
        """Wait for gradients anew."""
        self._left = dict.fromkeys(self._bucket_of, self.passes)
        self._missing = list(map(len, self._buckets))
        self._waits: list[Callable[[], object]] = []

    @property
    def idle(self) -> bool:
        """Whether no gradient has come since the last step."""
        return not self._waits and all(left == self.passes for left in self._left.values())

    @property
    def under_way(self) -> bool:
        """Whether a reduction was begun that nobody has waited for."""
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
                    "synchronize(): increase backward_passes_per_step to accumulate gradients"
                )
            self._left[parameter] -= 1
            if self._left[parameter] == 0:
                self._missing[self._bucket_of[parameter]] -= 1
                self._submit(lambda index: self._missing[index] == 0)

    def finish(self) -> None:
        """Submit what is left, gradients that are None as zeros, and wait for all."""
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
        """Begin the path of a bucket; returns what waits for it."""
        averager = self._averager
        where = f"bucket {index} of step {averager.step}"

        def failing(error: Exception, phase: str) -> Exception:
            self._failed = averager.fail(error, where, phase)
            return self._failed

        if on_cuda:
            return lambda: averager.run_together(path, index, where)
        return self._pipeline.submit(path, averager.transports, averager.clock, failing, index).wait

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, requires_grad=False)
        elif parameter.grad.layout != torch.strided:
            if not self._densifies:
                raise TypeError(
                    f"gradients must be dense, got one of layout {parameter.grad.layout}: use sparse_as_dense=True"
                )
            parameter.grad = parameter.grad.to_dense()
        return parameter.grad

    def _path(self, index: int, bucket: list[nn.Parameter], gradients: list[torch.Tensor]) -> Path[torch.Tensor]:
        yield Turn()  # a bucket is copied, and only those near their turn should be
        with torch.no_grad():
            final = index == len(self._buckets) - 1
            yield from self._averager.bucket_path(index, cast(list[torch.Tensor], bucket), gradients, final=final)
            if self._factor != 1:
                multiply_all(gradients, self._factor)
        return gradients[0]
