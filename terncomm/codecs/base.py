"""What a codec is, and the laws it keeps.

A codec turns gradients into small integers under a scale that all ranks share, and integer sums back into gradients.
It is a frozen dataclass whose fields are its whole configuration: it does not communicate, keeps no state, draws from
no generator and reads no environment.

Laws (checked by `tests/laws.py` over every codec): codes lie within the alphabet; the same input and key give the same
codes; decoding is linear in the codes; inside the clip limit E[decode(encode(g))] = g; the error is at most one step
(shared scale / levels); a zero layer decodes to zeros; a layer that is not zero has a limit that is not zero; a
non-finite element makes its layer, and no other, non-finite on every rank.
"""

from abc import ABC, abstractmethod
from typing import NoReturn

import torch

from terncomm import ops
from terncomm.keys import Key
from terncomm.ops import Rounding
from terncomm.segments import Segments
from terncomm.wire import SumFormat


class Codec(ABC):
    """Integers in [-levels, levels] times a shared scale per segment."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """The largest code."""

    @property
    def alphabet(self) -> tuple[int, int]:
        """The least and the largest code."""
        return -self.levels, self.levels

    def scaled(self, layers: Segments) -> Segments:
        """The segments of `layers` that have a scale of their own; here the layers themselves."""
        return layers

    @abstractmethod
    def measure(self, flat: torch.Tensor, segments: Segments) -> torch.Tensor:
        """What this rank knows of each segment: (L,) float32 clip limit, which is also its local scale.

        flat: (n,) float32; not modified. The limit is 0 only where the segment is all zero, and +inf where an element
        is not finite. Limits are shared by their maximum over ranks.
        """

    def rounding(
        self, segments: Segments, local: torch.Tensor, shared: torch.Tensor, key: Key, *, rank: int, world_size: int
    ) -> Rounding:
        """Local limits and shared scales, (L,) float32, and a key -> the numbers that encoding multiplies with."""
        keys = key.streams(segments.layers, rank=rank, world_size=world_size)
        return ops.rounding(local, shared, keys.to(local.device), self.levels)

    def encode(
        self,
        flat: torch.Tensor,
        segments: Segments,
        local: torch.Tensor,
        shared: torch.Tensor,
        key: Key,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> torch.Tensor:
        """Stochastic rounding: flat (n,) float32, not modified -> (n,) int8 codes within the alphabet."""
        how = self.rounding(segments, local, shared, key, rank=rank, world_size=world_size)
        return ops.encode(flat, segments, how)

    def unit(self, shared: torch.Tensor, divisor: float) -> torch.Tensor:
        """(L,) float32 shared scales -> (3, L) float32: what one unit of the sum stands for, divided by W for the mean.

        In parts, see :func:`terncomm.ops.reference.split_unit`.
        """
        return ops.split_unit(shared.double() / (self.levels * divisor))

    def decode(
        self, total: torch.Tensor, segments: Segments, shared: torch.Tensor, world_size: int, *, out: torch.Tensor
    ) -> torch.Tensor:
        """Exact integer sums (n,) int32 over `world_size` ranks -> out, float32: the mean gradient."""
        ops.decode(total, segments, self.unit(shared, world_size), 0, out)
        return out

    def norm_lost(self, flat: torch.Tensor, layers: Segments) -> torch.Tensor | None:
        """(L,) the share of each layer's norm that clipping takes, 1 - |clipped| / |g|; `None` if nothing clips."""
        return None

    def narrowing(self, segments: Segments, key: Key, *, world_size: int) -> SumFormat | None:
        """How sums are rounded on their way back; `None`: they return exactly."""
        return None

    def compress(self, *_: object) -> NoReturn:
        """Not one of Horovod's compressions: raises TypeError with the reason."""
        raise TypeError(
            f"{self!r} cannot be one of Horovod's compressions: its codes belong to a scale that ranks share, and sums "
            "of them overflow a byte. Use terncomm.horovod.DistributedOptimizer(optimizer, model, codec)"
        )
