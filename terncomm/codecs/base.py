"""Base classes of codecs, and the laws of integer codecs.

A codec compresses gradients, and decodes sums of compressed gradients over ranks. It is a frozen dataclass whose fields
are its whole configuration. It does not communicate, keeps no state, and uses no random generator and no environment
variable. There are two kinds:

* :class:`IntegerCodec`: small integers, scaled by statistics that all ranks share. They add exactly. Decoding
  multiplies their sum, and may add an offset.
* :class:`Half`: floats of 16 bits, added in rank order.

Laws of integer codecs (`tests/laws.py` checks them for every codec with symmetric levels and one plane):

* Codes lie in the alphabet. The same input and key give the same codes.
* Decoding is linear in the sum of codes, or with an offset affine, for a given number of ranks.
* Inside the clip limit E[decode(encode(g))] = g. The error is at most one step of the codec's grid.
* A zero layer decodes to zeros. A layer that is not zero has a limit that is not zero.
* A non-finite element makes its segment (a layer, or a block of it) non-finite on every rank, and no other layer.
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
"""Statistics that all ranks agreed on, (..., L) float32: the same bits on every rank. Decoding uses only these."""


class Codec(ABC):
    """Base class of codecs: how gradients are compressed."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name, under which its bytes are counted."""

    def norm_lost(self, flat: torch.Tensor, layers: Segments) -> torch.Tensor | None:
        """(L,) float64: share of each layer's norm lost by clipping, 1 - |clipped| / |g|; `None`: no clipping."""
        return None

    def compress(self, *_: object) -> NoReturn:
        """Always raise a TypeError, because a codec cannot be one of Horovod's compressions."""
        raise TypeError(
            f"{self!r} cannot be one of Horovod's compressions: its codes need a scale that all ranks share, and their "
            "sums overflow a byte. Use terncomm.horovod.DistributedOptimizer(optimizer, model, codec)"
        )


@dataclass(frozen=True)
class Half(Codec):
    """Gradients rounded to floats of 16 bits, added in rank order in float32, and rounded again: "bf16" and "fp16".

    The result has the same bits on every rank, with DDP, FSDP or a training loop. PyTorch's own hooks for these types
    add in 16 bits.

    Args:
        bits: "bf16" (8 significant bits, the range of float32) or "fp16" (11 significant bits; magnitudes above 65504
            become infinite).

    Raises:
        ValueError: `bits` is neither "bf16" nor "fp16".
    """

    bits: Literal["bf16", "fp16"] = "bf16"

    def __post_init__(self) -> None:
        if self.bits not in ("bf16", "fp16"):
            raise ValueError(f"bits must be 'bf16' or 'fp16', got {self.bits!r}")

    @property
    def name(self) -> str:
        """See :class:`Codec`."""
        return self.bits

    @property
    def dtype(self) -> torch.dtype:
        """The dtype on the wire."""
        return torch.bfloat16 if self.bits == "bf16" else torch.float16


class IntegerCodec(Codec):
    """Base class of integer codecs: codes are integers, scaled by statistics that all ranks share.

    A subclass defines `name`, `alphabet`, `measure`, `encode` and `decode`. :func:`terncomm.testing.check_codec` checks
    it. What `measure` and `encode` get as `flat`, and `decode` as `out`, is the buffer of a whole bucket. Other layers
    may lie before, between and behind those of `segments`. Segment s is the elements from `segments.offsets[s]` on, as
    many as `segments.sizes[s]`.
    """

    @property
    @abstractmethod
    def alphabet(self) -> tuple[int, int]:
        """The least and the largest code; 0 must be in this range."""

    @property
    def planes(self) -> int:
        """Number of codes for each element; 1 for most codecs."""
        return 1

    def scaled(self, layers: Segments) -> Segments:
        """Cut `layers` into segments that have one scale each. By default one scale per layer."""
        return layers

    @abstractmethod
    def measure(self, flat: torch.Tensor, segments: Segments) -> Local:
        """Measure this rank's statistics of each segment: (L,) float32, or (K, L) for K statistics.

        flat: (n,) floats; not modified. All statistics of a segment with a non-finite element must be +inf. To share a
        minimum, give its negative: the maximum over ranks, the default of :meth:`agree`, then keeps +inf.
        """

    def agree(self, everyone: torch.Tensor) -> Agreed:
        """Combine the statistics of all ranks, (W, ..., m) float32 in rank order -> (..., m). By default the maximum.

        Must be a pure function, and must treat each of the m segments separately: a rank may get only some of them. So
        the result of a segment must not depend on m; add up floats in rank order.
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
        """Encode `flat`, floats, not modified -> codes in the alphabet, (n,) or (planes, n), in dense order.

        n is `segments.numel`; the codes are integers of any type. local, shared: (..., L) float32 statistics of this
        rank, and those that all agreed on. key, rank, world_size: of the rounding noise, see :func:`uniform`.
        """

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
        """Decode sums of codes and write them to `out`, at the dense elements of `segments` from `begin` on.

        totals: (planes, m) int32, also for one plane. divisor: the sum is divided by it; W for the mean. ranks: number
        of ranks whose codes were added; a codec with an offset corrects for it `ranks` times, before the division.
        Returns out.
        """

    def rounding(
        self, segments: Segments, local: Local, shared: Agreed, key: Key, *, rank: int, world_size: int
    ) -> Rounding | None:
        """The arguments of the fused kernel that encodes and packs; None: this kernel cannot replace `encode`."""
        return None

    def unit(self, shared: Agreed, divisor: float) -> torch.Tensor | None:
        """The gradient value of one unit of the sum, (3, L) float32, for the fused kernel that unpacks and decodes.

        Each number is split into three, see :func:`terncomm.ops.reference.split_unit`. None: `decode` is not only a
        multiplication by this number.
        """
        return None

    @property
    def byte_coder(self) -> ByteCoder | None:
        """The lossless coder of packed codes and sums; `None`: no coder, and all rows have the same length."""
        return None

    def narrowing(self, world_size: int) -> Narrow | None:
        """How sums are rounded before they are sent back; `None`: exact sums are sent back."""
        return None


def check_frozen(what: str, thing: object, why: str, *, told_by_repr: bool = False) -> None:
    """Raise a TypeError unless the class of `thing` is a frozen dataclass itself, not only by inheritance.

    what, why: for the message: what `thing` is, and why it must be. told_by_repr: it must have the repr of a dataclass.
    """
    own = vars(type(thing)).get("__dataclass_params__")
    if own is None or not own.frozen or (told_by_repr and not own.repr):
        raise TypeError(
            f"{what}: {type(thing).__name__} must be a frozen dataclass itself, @dataclass(frozen=True): {why}"
        )


def uniform(segments: Segments, key: Key, *, rank: int, world_size: int, device: torch.device) -> torch.Tensor:
    """Rounding noise for `encode`: (segments.numel,) float32 in [0, 1), in dense order, multiples of 2^-24.

    The same for the same seed, step, layer, place in the layer, rank and world size, wherever the layer lies.
    """
    segment, _, counter = segments.elements(0, segments.numel, device)
    streams = key.streams(segments.layers, rank=rank, world_size=world_size).to(device)
    return ops.reference.noise(counter, *streams[segment].T).to(torch.float32) / (1 << 24)


class UniformCodec(IntegerCodec):
    """Base class of codecs with codes in [-levels, levels], one shared scale per segment, and stochastic rounding.

    A subclass defines `name`, `levels` and `measure`.
    """

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
        """The clip limit of each segment, (L,) float32: the largest magnitude to be represented, and the local scale.

        flat: (n,) floats; not modified. The limit must be 0 only if all elements of the segment are 0, and +inf if one
        is not finite. :func:`terncomm.ops.peaks` gives max |g|. The shared scale is what :meth:`agree` makes of the
        limits, by default the maximum; values above it are clipped to it.
        """

    def rounding(
        self, segments: Segments, local: Local, shared: Agreed, key: Key, *, rank: int, world_size: int
    ) -> Rounding:
        """The arguments of the encoding kernels. local, shared: (L,) float32 clip limits and shared scales."""
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
        """Stochastic rounding: flat, floats, not modified -> (segments.numel,) int8 codes in the alphabet."""
        how = self.rounding(segments, local, shared, key, rank=rank, world_size=world_size)
        return ops.encode(flat, segments, how)

    def unit(self, shared: Agreed, divisor: float) -> torch.Tensor:
        """The gradient value of one unit of the sum, shared / (levels * divisor): (L,) float32 -> (3, L) float32.

        Each number is split into three, see :func:`terncomm.ops.reference.split_unit`.
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
        """Decode sums of codes, (m,) int32, and write sum * shared / (levels * divisor) to their places in `out`."""
        ops.decode(totals.view(-1), segments, self.unit(shared, divisor), begin, out)
        return out
