"""What a codec is, and the laws it keeps.

A codec turns gradients into something smaller, and sums of that over ranks back into gradients. It is a frozen
dataclass whose fields are its whole configuration: it does not communicate, keeps no state, draws from no generator and
reads no environment. There are two kinds:

* :class:`IntegerCodec`: small integers under statistics that all ranks share. They add exactly, and decoding is linear.
* :class:`Half`: floats of 16 bits, added in rank order.

Laws of integer codecs (checked by `tests/laws.py` over every codec): codes lie within the alphabet; the same input and
key give the same codes; decoding is linear in the codes; inside the clip limit E[decode(encode(g))] = g; the error is
at most one step (shared scale / levels); a zero layer decodes to zeros; a layer that is not zero has a limit that is
not zero; a non-finite element makes its layer, and no other, non-finite on every rank.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NewType, NoReturn

import torch

from terncomm import ops
from terncomm.keys import Key
from terncomm.ops import Rounding
from terncomm.segments import Segments
from terncomm.wire import ByteCoder, Narrow

Local = NewType("Local", torch.Tensor)
"""Statistics that this rank measured, (..., L) float32."""

Agreed = NewType("Agreed", torch.Tensor)
"""Statistics that all ranks agreed on, (..., L) float32: the same bits everywhere. Decoding takes no other."""


class Codec(ABC):
    """How gradients travel."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What its bytes are counted as."""

    def norm_lost(self, flat: torch.Tensor, layers: Segments) -> torch.Tensor | None:
        """(L,) the share of each layer's norm that clipping takes, 1 - |clipped| / |g|; `None` if nothing clips."""
        return None

    def compress(self, *_: object) -> NoReturn:
        """Not one of Horovod's compressions: raises TypeError with the reason."""
        raise TypeError(
            f"{self!r} cannot be one of Horovod's compressions: its codes belong to a scale that ranks share, and sums "
            "of them overflow a byte. Use terncomm.horovod.DistributedOptimizer(optimizer, model, codec)"
        )


@dataclass(frozen=True)
class Half(Codec):
    """Gradients rounded to floats of 16 bits, added in rank order in float32, and rounded again: "bf16" and "fp16".

    The same bits on every rank and in every engine. PyTorch's own hooks for these types add in 16 bits.

    Args:
        bits: "bf16" (8 significant bits, the range of float32) or "fp16" (11 significant bits; magnitudes above 65504
            become infinite).

    Raises:
        ValueError: another type.
    """

    bits: Literal["bf16", "fp16"] = "bf16"

    def __post_init__(self) -> None:
        if self.bits not in ("bf16", "fp16"):
            raise ValueError(f"a half is 'bf16' or 'fp16', got {self.bits!r}")

    @property
    def name(self) -> str:
        """See :class:`Codec`."""
        return self.bits

    @property
    def dtype(self) -> torch.dtype:
        """On the wire."""
        return torch.bfloat16 if self.bits == "bf16" else torch.float16


class IntegerCodec(Codec):
    """Integers of an alphabet under statistics that ranks share; `measure`, `encode` and `decode` define it."""

    @property
    @abstractmethod
    def alphabet(self) -> tuple[int, int]:
        """The least and the largest code; 0 lies between them."""

    @property
    def planes(self) -> int:
        """Codes of an element: most codecs have one."""
        return 1

    def scaled(self, layers: Segments) -> Segments:
        """The segments of `layers` that have a scale of their own; here the layers themselves."""
        return layers

    @abstractmethod
    def measure(self, flat: torch.Tensor, segments: Segments) -> Local:
        """What this rank knows of each segment: (L,) float32, or (K, L) for K statistics.

        flat: (n,) floats; not modified. A segment with an element that is not finite measures +inf.
        """

    def agree(self, everyone: torch.Tensor) -> Agreed:
        """Statistics of all ranks, (W, ..., m) float32 in rank order -> those that count, (..., m): the maximum.

        Pure and the same on every rank; column by column, for ranks may agree on some segments each.
        """
        return Agreed(everyone.amax(dim=0))

    @abstractmethod
    def encode(
        self,
        flat: torch.Tensor,
        segments: Segments,
        local: Local,
        shared: Agreed,
        key: Key,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> torch.Tensor:
        """Flat (n,) floats, not modified -> codes within the alphabet, (n,) or (planes, n), the dense order."""

    @abstractmethod
    def decode(
        self,
        totals: torch.Tensor,
        segments: Segments,
        shared: Agreed,
        divisor: float,
        *,
        ranks: int = 1,
        begin: int = 0,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Exact sums of codes, (m,) or (planes, m) int32, of the dense elements from `begin` on, to their places.

        divisor: what the sum is divided by: W for the mean. ranks: how many ranks' codes were added; each has brought
        an offset, where the codec has one. Returns out.
        """

    def rounding(
        self, segments: Segments, local: Local, shared: Agreed, key: Key, *, rank: int, world_size: int
    ) -> Rounding | None:
        """The numbers for the kernel that encodes and packs at once; None where `encode` cannot be had from it."""
        return None

    def unit(self, shared: Agreed, divisor: float) -> torch.Tensor | None:
        """(3, L) float32, what one unit of the sum stands for, for the kernel that unpacks and decodes at once.

        In parts, see :func:`terncomm.ops.reference.split_unit`; None where `decode` is more than this product.
        """
        return None

    @property
    def byte_coder(self) -> ByteCoder | None:
        """What packed codes and sums go through on the wire; `None`: nothing, and all rows have one length."""
        return None

    def narrowing(self, world_size: int) -> Narrow | None:
        """How sums are rounded on their way back; `None`: they return exactly."""
        return None


class UniformCodec(IntegerCodec):
    """Integers in [-levels, levels] times a shared scale per segment, stochastically rounded."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """The largest code."""

    @property
    def alphabet(self) -> tuple[int, int]:
        """The least and the largest code."""
        return -self.levels, self.levels

    @abstractmethod
    def measure(self, flat: torch.Tensor, segments: Segments) -> Local:
        """(L,) float32 clip limit of each segment, which is also its local scale.

        flat: (n,) floats; not modified. The limit is 0 only where the segment is all zero, and +inf where an element is
        not finite. Limits are shared by their maximum over ranks.
        """

    def rounding(
        self, segments: Segments, local: Local, shared: Agreed, key: Key, *, rank: int, world_size: int
    ) -> Rounding:
        """Local limits and shared scales, (L,) float32, and a key -> the numbers that encoding multiplies with."""
        keys = key.streams(segments.layers, rank=rank, world_size=world_size)
        return ops.rounding(local, shared, keys.to(local.device), self.levels)

    def encode(
        self,
        flat: torch.Tensor,
        segments: Segments,
        local: Local,
        shared: Agreed,
        key: Key,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> torch.Tensor:
        """Stochastic rounding: flat (n,) floats, not modified -> (n,) int8 codes within the alphabet."""
        how = self.rounding(segments, local, shared, key, rank=rank, world_size=world_size)
        return ops.encode(flat, segments, how)

    def unit(self, shared: Agreed, divisor: float) -> torch.Tensor:
        """(L,) float32 shared scales -> (3, L) float32: what one unit of the sum stands for, divided by W for the mean.

        In parts, see :func:`terncomm.ops.reference.split_unit`.
        """
        return ops.split_unit(shared.double() / (self.levels * divisor))

    def decode(
        self,
        totals: torch.Tensor,
        segments: Segments,
        shared: Agreed,
        divisor: float,
        *,
        ranks: int = 1,
        begin: int = 0,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Exact integer sums (m,) int32 -> their places in out: the sum over ranks over the divisor."""
        ops.decode(totals.view(-1), segments, self.unit(shared, divisor), begin, out)
        return out
