"""W workers that train one network in one process, and exchange gradients as W processes would."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from terncomm.keys import Key
from terncomm.layers import Layers, in_memory_order
from terncomm.path.account import Context
from terncomm.path.drivers import Call, lockstep, sent
from terncomm.segments import Segments
from terncomm.simulator.buckets import first_buckets, rebuilt_buckets
from terncomm.simulator.reductions import Reduction

_SAMPLED = 10


class Bucket:
    """Parameters whose gradients travel together: the elements [begin, end) of a worker's flat gradient."""

    def __init__(self, parameters: Sequence[Tensor], begin: int, layers: Layers) -> None:
        self.parameters = parameters
        self.begin = begin
        self.end = begin + sum(parameter.numel() for parameter in parameters)
        self.coded, self.exact = layers.of_bucket(parameters)

    def layers(self, warmup: bool = False) -> tuple[Segments, Segments]:
        """The layers that are coded, and those that travel exactly: in warm-up, all."""
        return (Segments(()), Segments([self.end - self.begin])) if warmup else (self.coded, self.exact)


class VirtualWorkers:
    """W workers in lockstep. All hold the same weights at all times, so there is one network, and W gradients of it.

    What DDP does is done here: a first iteration with one bucket, then buckets in the order in which gradients were
    ready; every step begins with the buffers of worker 0; gradients of several micro-steps add up before one exchange.
    A worker has random numbers of its own.

    Args:
        network: trained in place; float32 parameters.
        workers: W, at least 1.
        reduction: how a bucket is averaged.
        seed: of the rounding noise and of the workers' random numbers.
        bucket_cap_mb: as of DDP.
        warmup_steps: first exchanges in which nothing is coded.

    Raises:
        ValueError: no workers, no parameters to train, or such as are not float32.
    """

    def __init__(
        self,
        network: nn.Module,
        workers: int,
        reduction: Reduction,
        *,
        seed: int = 0,
        bucket_cap_mb: float | None = None,
        warmup_steps: int = 0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.network = network
        self.workers = workers
        self.reduction = reduction
        self.layers = Layers(network.named_parameters())
        self.layers.adopt(network)
        self.parameters = cast(list[nn.Parameter], self.layers.trainable)
        for parameter in self.parameters:
            if parameter.dtype != torch.float32:
                name = self.layers.name_of(parameter)
                raise ValueError(f"gradients must be torch.float32 in a simulation; {name} is {parameter.dtype}")
        if not self.parameters:
            raise ValueError("the network has no parameters that require a gradient")
        self.buckets = self._lay_out(first_buckets(self.parameters))
        self.sent_bytes = 0  # per worker, since the start
        self.exchanges = 0
        self.errors: list[float] = []  # of every _SAMPLED-th averaged gradient, and of the first
        self._seed = seed
        self._cap_mb = bucket_cap_mb
        self._warmup_steps = warmup_steps
        self._ready: list[Tensor] = []
        self._gradients = torch.zeros(workers, sum(parameter.numel() for parameter in self.parameters))
        self._random = [torch.Generator().manual_seed(seed * workers + rank).get_state() for rank in range(workers)]

    def _lay_out(self, groups: list[list[Tensor]]) -> list[Bucket]:
        buckets: list[Bucket] = []
        for group in groups:
            buckets.append(Bucket(group, buckets[-1].end if buckets else 0, self.layers))
        return buckets

    @contextmanager
    def acting_as(self, rank: int) -> Iterator[None]:
        """Random numbers inside are this worker's."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._random[rank])
        try:
            yield
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"in virtual worker {rank} of {self.workers}, exchange {self.exchanges}")
            raise
        finally:
            self._random[rank] = torch.get_rng_state()
            torch.set_rng_state(before)

    def step(self, losses: Callable[[int], Sequence[Callable[[], Tensor]]]) -> float:
        """Leave the mean gradient in `parameter.grad`; return the mean loss.

        losses: given a worker's rank, its micro-steps; each runs the forward pass and returns the loss.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        total = 0.0
        for rank in range(self.workers):
            with self.acting_as(rank), torch.no_grad():
                for buffer, before in buffers if rank else ():
                    buffer.copy_(before)
                with torch.enable_grad():
                    total += self._backward(losses(rank))
                self._collect(rank)
                if rank == 0:
                    after = [buffer.clone() for buffer, _ in buffers]
        for (buffer, _), kept in zip(buffers, after, strict=True):
            buffer.copy_(kept)
        self._exchange()
        return total / self.workers

    def _backward(self, micro_steps: Sequence[Callable[[], Tensor]]) -> float:
        total = 0.0
        for parameter in self.parameters:
            parameter.grad = None
        watched = [] if self._ready else [_on_gradient(p, self._note) for p in self.parameters]
        try:
            for run in micro_steps:
                loss = run()
                torch.autograd.backward(loss / len(micro_steps) if len(micro_steps) > 1 else loss)
                total += float(loss.detach()) / len(micro_steps)
        finally:
            for handle in watched:
                handle.remove()
        return total

    def _note(self, parameter: Tensor) -> None:
        if not any(parameter is seen for seen in self._ready):
            self._ready.append(parameter)

    def _collect(self, rank: int) -> None:
        for bucket in self.buckets:
            place = bucket.begin
            for parameter in bucket.parameters:
                into = self._gradients[rank, place : place + parameter.numel()]
                if parameter.grad is None:
                    into.zero_()
                elif parameter.grad.layout != torch.strided:
                    raise ValueError("a simulation has no sparse gradients; make the embedding with sparse=False")
                else:
                    in_memory_order(into, parameter).copy_(parameter.grad)
                place += parameter.numel()

    def _exchange(self) -> None:
        wanted = self._gradients.mean(dim=0) if self.exchanges % _SAMPLED == 0 or not self.errors else None
        if self.workers > 1:
            for index, bucket in enumerate(self.buckets):
                self._reduce(bucket, Key(self._seed, self.exchanges, index))
        if wanted is not None:
            self.errors.append(self._error(wanted))
        self.exchanges += 1
        for bucket in self.buckets:
            place = bucket.begin
            for parameter in bucket.parameters:
                mean = self._gradients[0, place : place + parameter.numel()]
                parameter.grad = in_memory_order(mean, parameter).clone()
                place += parameter.numel()
        if self.exchanges == 1:
            unseen = [each for each in self.parameters if not any(each is seen for seen in self._ready)]
            silent = [self.layers.name_of(each) for each in unseen]
            if silent:
                raise ValueError(f"DDP takes no parameters without gradients; got none for {', '.join(silent[:5])}")
            self.buckets = self._lay_out(rebuilt_buckets(self._ready, self._cap_mb))

    def _reduce(self, bucket: Bucket, key: Key) -> None:
        """Average a bucket over the workers, and count what each sends."""
        calls: list[Call] = []
        paths = []
        for rank, gradient in enumerate(self._gradients):
            ctx = Context(key, rank, self.workers)
            layers = bucket.layers(self.exchanges < self._warmup_steps)
            paths.append(self.reduction.path(gradient[bucket.begin : bucket.end], *layers, ctx))
        lockstep(paths, calls=calls)
        self.sent_bytes += sent(calls, self.workers)

    def _error(self, wanted: Tensor) -> float:
        """|error|^2 / |exact mean|^2, the mean over the layers that may be coded."""
        found = []
        for bucket in self.buckets:
            for offset, size in zip(bucket.coded.offsets.tolist(), bucket.coded.lengths.tolist(), strict=True):
                place = slice(bucket.begin + offset, bucket.begin + offset + size)
                error, power = (self._gradients[0, place] - wanted[place]).square().sum(), wanted[place].square().sum()
                if power > 0:
                    found.append(float(error / power))
        return sum(found) / len(found) if found else 0.0


def _on_gradient(parameter: Tensor, note: Callable[[Tensor], None]) -> Any:
    return parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
