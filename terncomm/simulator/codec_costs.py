"""What a codec takes of a processor, apart from any wire: measured by running the path against an echo."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from terncomm.codecs import Codec
from terncomm.keys import Key
from terncomm.reduce import Clock, all_reduce_mean
from terncomm.segments import Segments


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
    """Seconds = fixed_s + per_element_s * n, of encoding, of adding codes up, of decoding."""

    fixed_s: tuple[float, float, float]
    per_element_s: tuple[float, float, float]

    def seconds(self, numel: int) -> tuple[float, float, float]:
        """Of a bucket with so many coded elements."""
        fixed = zip(self.fixed_s, self.per_element_s, strict=True)
        encode, add, decode = (a + b * numel for a, b in fixed)
        return encode, add, decode


FREE = Cost((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
_SIZES = (1 << 16, 1 << 20)


Meet = Callable[[], object]  # called before each round, for ranks that share a machine and must be busy together


def measure(
    codec: Codec, world_size: int, *, sizes: tuple[int, int] = _SIZES, rounds: int = 9, meet: Meet = lambda: None
) -> Cost:
    """Time the path of this machine on buckets of two sizes, and lay a line through both."""
    layers = (Segments([numel]) for numel in sizes)
    small, large = (of_bucket(codec, each, world_size, rounds=rounds, meet=meet) for each in layers)
    slopes = tuple(max(b - a, 0.0) / (sizes[1] - sizes[0]) for a, b in zip(small, large, strict=True))
    fixed = tuple(max(a - slope * sizes[0], 0.0) for a, slope in zip(small, slopes, strict=True))
    return Cost((fixed[0], fixed[1], fixed[2]), (slopes[0], slopes[1], slopes[2]))


def of_bucket(
    codec: Codec, layers: Segments, world_size: int, *, rounds: int = 9, meet: Meet = lambda: None
) -> tuple[float, float, float]:
    """Seconds to encode a bucket with these layers, to add up its codes, to decode."""
    gradient = torch.randn(layers.extent, generator=torch.Generator().manual_seed(0))
    found = []
    for step in range(rounds + 1):
        flat = gradient.clone()
        clock = Clock()
        meet()
        all_reduce_mean(flat, layers, codec, Echo(world_size), key=Key(0, step), clock=clock)
        found.append((clock.encode_s, clock.exchange_s, clock.decode_s))
    encode, add, decode = (statistics.median(times) for times in zip(*found[1:], strict=True))
    return encode, add, decode


def measure_cast(*, numel: int = 1 << 20, rounds: int = 9, meet: Meet = lambda: None) -> Cost:
    """The same for float16, which asks for a conversion there and one back."""
    values = torch.randn(numel)
    there, back = [], []
    for _ in range(rounds + 1):
        meet()
        begin = time.perf_counter()
        half = values.to(torch.float16).div_(2)
        middle = time.perf_counter()
        values.copy_(half)
        there.append(middle - begin)
        back.append(time.perf_counter() - middle)
    return Cost((0.0, 0.0, 0.0), (statistics.median(there[1:]) / numel, 0.0, statistics.median(back[1:]) / numel))
