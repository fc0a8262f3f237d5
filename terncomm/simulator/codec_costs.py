"""What a codec takes of a processor, apart from any wire: measured by running the path against an echo."""

import functools
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from terncomm.codecs import Codec, codec_for
from terncomm.keys import Key
from terncomm.path.account import Clock
from terncomm.reduce import all_reduce_mean
from terncomm.segments import Segments
from terncomm.simulator.fabric import Fabric
from terncomm.simulator.reductions import Coded, Exact
from terncomm.transports import ProcessGroupTransport


class Echo:
    """A transport on which all other ranks send what this one does, at once."""

    def __init__(self, world_size: int) -> None:
        self.rank, self.world_size = 0, world_size

    def all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        return payload.expand(self.world_size, -1).contiguous()

    def all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`terncomm.transports.base.Transport`."""
        return rows[:1].expand(self.world_size, -1).contiguous()


@dataclass(frozen=True)
class Cost:
    """Seconds = fixed_s + per_element_s * n, of encoding, of adding codes up, of decoding.

    waiting: the same, (fixed, per element), of what a bucket takes beyond its arithmetic and its messages; 0 unless
    :func:`with_waiting` has measured it.
    """

    fixed_s: tuple[float, float, float]
    per_element_s: tuple[float, float, float]
    waiting: tuple[float, float] = (0.0, 0.0)

    def seconds(self, numel: int) -> tuple[float, float, float]:
        """Of a bucket with so many coded elements."""
        fixed = zip(self.fixed_s, self.per_element_s, strict=True)
        encode, add, decode = (a + b * numel for a, b in fixed)
        return encode, add, decode

    def waiting_s(self, numel: int) -> float:
        """Beyond arithmetic and messages."""
        return self.waiting[0] + self.waiting[1] * numel


FREE = Cost((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
_SIZES = (1 << 16, 1 << 20)


class Alone:
    """A process that is timed by itself."""

    def meet(self) -> None:
        """Begin at once."""

    def slowest(self, seconds: list[list[float]]) -> list[list[float]]:
        """Its own times."""
        return seconds


class Together:
    """Ranks that are timed at the same time, as they work: they may share cores and memory."""

    def __init__(self, group: Any = None) -> None:
        self._group = group

    def meet(self) -> None:
        """Begin when all are here."""
        dist.barrier(self._group)

    def slowest(self, seconds: list[list[float]]) -> list[list[float]]:
        """Of each time, the longest of all ranks."""
        times = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(times, dist.ReduceOp.MAX, group=self._group)
        found: list[list[float]] = times.tolist()
        return found


Who = Alone | Together
_ALONE = Alone()
_ROUNDS = 21
_STEP_NBYTES = 16 << 20  # hot, a bucket of TernGrad at W = 4 takes 15 % less time than in a training step
_WIRE_ROUNDS = 41  # 11 are over in 0.2 s: one slow moment of the machine was taken for what every bucket waits


def measure(codec: Codec, world_size: int, *, sizes: tuple[int, int] = _SIZES, who: Who = _ALONE) -> Cost:
    """Time the path of this machine on buckets of two sizes, and lay a line through both."""
    layers = (Segments([numel]) for numel in sizes)
    small, large = (of_bucket(codec, each, world_size, who=who) for each in layers)
    slopes = tuple(max(b - a, 0.0) / (sizes[1] - sizes[0]) for a, b in zip(small, large, strict=True))
    fixed = tuple(max(a - slope * sizes[0], 0.0) for a, slope in zip(small, slopes, strict=True))
    return Cost((fixed[0], fixed[1], fixed[2]), (slopes[0], slopes[1], slopes[2]))


@functools.cache
def _other_layers() -> torch.Tensor:
    return torch.zeros(_STEP_NBYTES, dtype=torch.uint8)


def _cool() -> None:
    """Use the caches for something else, as the layers of a backward pass do between two buckets."""
    _other_layers().add_(1)


def of_bucket(codec: Codec, layers: Segments, world_size: int, *, who: Who = _ALONE) -> tuple[float, float, float]:
    """Seconds to encode a bucket with these layers, to add up its codes, to decode."""
    gradient = torch.randn(layers.extent, generator=torch.Generator().manual_seed(0))
    found = []
    for step in range(_ROUNDS + 1):
        _cool()
        flat = gradient.clone()
        clock = Clock()
        who.meet()
        all_reduce_mean(flat, layers, codec, Echo(world_size), key=Key(0, step), clock=clock)
        found.append([clock.encode_s, clock.exchange_s, clock.decode_s])
    encode, add, decode = (statistics.median(times) for times in zip(*who.slowest(found)[1:], strict=True))
    return encode, add, decode


def with_waiting(
    cost: Cost,
    codec: Codec | None,
    fabric: Fabric,
    group: Any,
    *,
    sizes: tuple[int, int] = _SIZES,
    who: Who = _ALONE,
    budget_s: float = 3.0,
) -> Cost:
    """Time whole buckets of two sizes over a group that nobody else uses, and note what their parts do not explain.

    These are messages after a pause, threads that must wake, ranks that wait for the slowest at every message.
    Collective; takes about `budget_s` for each size. codec: None for the float16 of PyTorch's `fp16_compress_hook`.
    """
    transport = ProcessGroupTransport(group)
    transport.adapt()
    beyond = []
    for numel in sizes:
        layers = Segments([numel])
        reduction = Exact(torch.float16) if codec is None else Coded(codec)
        calls = reduction.calls(layers, Segments(()), transport.world_size)
        parts_s = sum(cost.seconds(numel)) + sum(fabric.seconds(call, transport.world_size) for call in calls)
        gradient = torch.randn(numel, generator=torch.Generator().manual_seed(0))

        def once(step: int, gradient: torch.Tensor = gradient, layers: Segments = layers) -> list[float]:
            _cool()
            flat = gradient.clone()
            who.meet()
            began = time.perf_counter()
            if codec is None:
                _float16_mean(flat, group)
            else:
                all_reduce_mean(flat, layers, codec, transport, key=Key(0, step))
            return [time.perf_counter() - began]

        first = who.slowest([once(0)])
        rounds = max(1, min(_WIRE_ROUNDS, int(budget_s / first[0][0])))
        found = who.slowest([once(step) for step in range(1, rounds + 1)])
        beyond.append(max(statistics.median(each for (each,) in found) - parts_s, 0.0))
    slope = max(beyond[1] - beyond[0], 0.0) / (sizes[1] - sizes[0])
    # What grows with a bucket is waiting for the arithmetic of other ranks. More than that is the link's own noise.
    slope = min(slope, transport.world_size * sum(cost.per_element_s))
    return replace(cost, waiting=(max(beyond[0] - slope * sizes[0], 0.0), slope))


def over_group(
    codecs: Iterable[str], fabric: Fabric, group: Any, *, sizes: tuple[int, int] = _SIZES
) -> dict[str, Cost]:
    """What codecs of these names cost this machine when all ranks of a group work at once, with waiting. Collective."""
    who, found = Together(group), {}
    for name in codecs:
        codec = None if name == "fp16" else codec_for(name)
        if codec is None:
            cost = measure_cast(numel=sizes[1], who=who)
        else:
            cost = measure(codec, dist.get_world_size(group), sizes=sizes, who=who)
        found[name] = with_waiting(cost, codec, fabric, group, sizes=sizes, who=who)
    return found


def _float16_mean(flat: torch.Tensor, group: Any) -> None:
    """As `fp16_compress_hook` goes about it: what comes back is copied on a thread of the group."""
    half = flat.to(torch.float16).div_(dist.get_world_size(group))
    summed = dist.all_reduce(half, group=group, async_op=True).get_future()
    summed.then(lambda done: flat.copy_(done.value()[0])).wait()


def measure_cast(*, numel: int = 1 << 20, who: Who = _ALONE) -> Cost:
    """The same for float16, which asks for a conversion there and one back."""
    values = torch.randn(numel)
    found = []
    for _ in range(_ROUNDS + 1):
        _cool()
        who.meet()
        began = time.perf_counter()
        half = values.to(torch.float16).div_(2)
        middle = time.perf_counter()
        values.copy_(half)
        found.append([middle - began, time.perf_counter() - middle])
    there, back = (statistics.median(times) / numel for times in zip(*who.slowest(found)[1:], strict=True))
    return Cost((0.0, 0.0, 0.0), (there, 0.0, back))
