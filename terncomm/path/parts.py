"""Parts: what a bucket holds of one kind, cut into rows. Bytes in, bytes out; the buffer is changed last.

A part travels in one of three ways, and :mod:`terncomm.path.exchanges` has them:

* whole: one row, which every rank gets from all ranks: `pack`, then `keep` everywhere.
* in rows: W rows, row r to rank r, which adds it up; the totals return: `pack`, `combine`, `unpack`.
* scattered: W rows, row r to rank r, which keeps its total: `pack`, `keep`.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch

from terncomm import ops
from terncomm.codecs.base import Agreed, IntegerCodec, Local
from terncomm.keys import Key
from terncomm.ops import Rounding
from terncomm.path.sums import NarrowRows
from terncomm.segments import Segments
from terncomm.wire import aligned, packing_for

_AT_A_TIME = 1 << 16  # floats added at a time: their sum may need wider ones


class Part(Protocol):
    """One kind of thing in a bucket, or in a piece of it. All packed rows have one size, and so have all totals."""

    label: str  # what its bytes are counted as
    up_nbytes: int  # of a packed row
    back_nbytes: int  # of a total

    def pack(self, out: torch.Tensor) -> None:
        """This rank's contribution -> out, (rows, up_nbytes) uint8, whose rows may be slices of longer ones."""

    def combine(self, received: torch.Tensor, out: torch.Tensor) -> None:
        """This rank's row as all ranks sent it, (W, up_nbytes) uint8 -> its total for everyone, out (back_nbytes,)."""

    def unpack(self, totals: torch.Tensor) -> None:
        """The totals of all rows, (rows, back_nbytes) uint8, to their places."""

    def keep(self, received: torch.Tensor) -> None:
        """One row as all ranks sent it, (W, up_nbytes) uint8: its total to its place, and nothing travels back."""


class Target(NamedTuple):
    """Where decoded values go: `segments` of `out`, with a shared scale each."""

    out: torch.Tensor
    segments: Segments
    shared: Agreed


class Coding:
    """A group of layers under one codec in this step: what the pieces of the group have in common.

    Args:
        flat: (n,) floats; read, and not changed unless it is the target.
        segments: those that have a scale of their own.
        codec: how.
        local, shared: (..., L) float32 statistics of this rank, and those that all ranks agreed on.
        key, rank, world_size: of the rounding noise.
        divisor: what the sum is divided by; by default W, for the mean.
        target: where decoded values go; by default back into `flat`.
    """

    def __init__(
        self,
        flat: torch.Tensor,
        segments: Segments,
        codec: IntegerCodec,
        local: Local,
        shared: Agreed,
        *,
        key: Key,
        rank: int,
        world_size: int,
        divisor: float | None = None,
        target: Target | None = None,
    ) -> None:
        self.flat, self.segments, self.codec = flat, segments, codec
        self.key, self.rank, self.world_size = key, rank, world_size
        self._local, self._shared = local, shared
        self.target = target or Target(flat, segments, shared)
        self.divisor = world_size if divisor is None else divisor

    @cached_property
    def rounding(self) -> Rounding | None:
        """For the kernel that encodes and packs at once."""
        where = {"rank": self.rank, "world_size": self.world_size}
        return self.codec.rounding(self.segments, self._local, self._shared, self.key, **where)

    @cached_property
    def unit(self) -> torch.Tensor | None:
        """For the kernel that unpacks and decodes at once."""
        return self.codec.unit(self.target.shared, self.divisor)

    @cached_property
    def codes(self) -> torch.Tensor:
        """(planes, n) codes of all segments, for a codec that has no fused kernel."""
        return self._encode().view(self.codec.planes, -1)

    def _encode(self) -> torch.Tensor:
        where = {"rank": self.rank, "world_size": self.world_size}
        return self.codec.encode(self.flat, self.segments, self._local, self._shared, self.key, **where)

    def own(self) -> torch.Tensor:
        """What this rank's codes alone decode to, (n,) float32 in the places of `flat`; the gaps hold anything."""
        codes = self.codes if self.rounding is None else self._encode()
        out = torch.empty_like(self.flat, dtype=torch.float32)
        return self.codec.decode(codes.to(torch.int32), self.segments, self._shared, 1.0, out=out)

    def decode(self, totals: torch.Tensor, begin: int) -> None:
        """(planes, m) int32 totals of the target's dense elements from `begin` on, to their places."""
        out, segments, shared = self.target
        if self.unit is not None:
            ops.decode(totals[0], segments, self.unit, begin, out)
        else:
            ranks = self.world_size
            self.codec.decode(totals, segments, shared, self.divisor, ranks=ranks, begin=begin, out=out)


class Codes:
    """Integers of a coding: packed codes up, packed sums back.

    edges: (rows + 1,) dense elements of the coding, where rows begin and the last ends.
    kept: the target's dense [begin, end) that `keep` fills; by default those of the single row.
    """

    def __init__(self, coding: Coding, edges: Sequence[int], *, kept: tuple[int, int] | None = None) -> None:
        codec, world_size = coding.codec, coding.world_size
        self.label = codec.name
        self._coding = coding
        self._edges = tuple(edges)
        self._length = max(end - begin for begin, end in pairwise(edges))
        self._kept = (edges[0], edges[-1]) if kept is None else kept
        self._scatters = kept is not None
        low, high = codec.alphabet
        self._up = packing_for(low, high)
        self._back = packing_for(low * world_size, high * world_size)
        self._narrow = None
        if (how := codec.narrowing(world_size)) is not None and not self._scatters:
            largest = max(-low, high) * world_size
            self._narrow = NarrowRows(how, coding.segments, coding.key, world_size, largest, self._edges)
        self._planes = codec.planes
        self._up_plane, self._back_plane = self._up.nbytes(self._length), self._back.nbytes(self._length)
        if self._narrow is not None:
            self._back_plane = self._narrow.nbytes
        if self._planes > 1:
            self._up_plane, self._back_plane = aligned(self._up_plane), aligned(self._back_plane)
        self.up_nbytes, self.back_nbytes = self._planes * self._up_plane, self._planes * self._back_plane

    def pack(self, out: torch.Tensor) -> None:
        """See :class:`Part`."""
        coding, length = self._coding, self._length
        if coding.rounding is not None:
            ops.encode_pack(coding.flat, coding.segments, coding.rounding, self._up, self._edges, length, out)
            return
        for row, (begin, end) in enumerate(pairwise(self._edges)):
            for plane, codes in enumerate(coding.codes):
                padded = torch.nn.functional.pad(codes[begin:end], (0, length - (end - begin)))
                ops.pack(padded, self._up, out[row, plane * self._up_plane :][: self._up.nbytes(length)])

    def combine(self, received: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Part`."""
        rank = self._coding.rank
        for plane, total in enumerate(self._totals(received)):
            place = out[plane * self._back_plane :]
            if self._narrow is not None:
                own = self._edges[rank + 1] - self._edges[rank]
                self._narrow.pack(rank, total[:own], place[: self._narrow.nbytes])
            else:
                ops.pack(total, self._back, place[: self._back.nbytes(self._length)])

    def unpack(self, totals: torch.Tensor) -> None:
        """See :class:`Part`."""
        coding = self._coding
        if self._narrow is None and coding.unit is not None:
            where = self._edges, self._length, coding.target.out
            ops.decode_rows(totals, self._back, coding.target.segments, coding.unit, *where)
            return
        for row, (begin, end) in enumerate(pairwise(self._edges)):
            planes = [self._returned(row, totals[row, plane * self._back_plane :]) for plane in range(self._planes)]
            coding.decode(torch.stack(planes)[:, : end - begin], begin)

    def keep(self, received: torch.Tensor) -> None:
        """See :class:`Part`."""
        coding, (begin, end) = self._coding, self._kept
        if self._narrow is None and coding.unit is not None:
            where = begin, end, self._length, coding.target.out
            ops.unpack_decode(received, self._up, coding.target.segments, coding.unit, *where)
            return
        totals = [total[: end - begin] for total in self._totals(received)]
        if self._narrow is not None:
            totals = [self._narrow.rounded(0, total) for total in totals]
        coding.decode(torch.stack(totals), begin)

    def _totals(self, received: torch.Tensor) -> list[torch.Tensor]:
        """One row of all ranks -> the sum of each plane, (length,) int32."""
        octets = self._up.nbytes(self._length)
        places = [plane * self._up_plane for plane in range(self._planes)]
        return [ops.unpack_sum(received[:, at : at + octets], self._up, self._length) for at in places]

    def _returned(self, row: int, packed: torch.Tensor) -> torch.Tensor:
        if self._narrow is not None:
            return self._narrow.unpack(row, packed[: self._narrow.nbytes])
        return ops.unpack_sum(packed[None, : self._back.nbytes(self._length)], self._back, self._length)


class Floats:
    """Layers that travel without a codec: floats up, their mean in rank order back; the same bits in every engine.

    Added in float64 for float64 and else in float32, divided, then cast back.

    Args:
        flat: (n,) floats; read, and changed unless there is a target.
        segments: the layers.
        edges: see :class:`Codes`.
        divisor: what the sum is divided by: W for the mean.
        dtype: on the wire; by default that of `flat`.
        target: the buffer and the segments of it that `keep` fills; by default those of the single row in `flat`.
    """

    def __init__(
        self,
        flat: torch.Tensor,
        segments: Segments,
        edges: Sequence[int],
        *,
        divisor: float,
        label: str = "exact",
        dtype: torch.dtype | None = None,
        target: tuple[torch.Tensor, Segments] | None = None,
    ) -> None:
        self.label = label
        self._flat, self._segments, self._edges = flat, segments, tuple(edges)
        self._dtype, self._divisor, self._target = dtype or flat.dtype, divisor, target
        self._length = max(end - begin for begin, end in pairwise(edges))
        self.up_nbytes = self.back_nbytes = self._length * self._dtype.itemsize

    def pack(self, out: torch.Tensor) -> None:
        """See :class:`Part`."""
        for row, (begin, end) in zip(out.view(self._dtype), pairwise(self._edges), strict=True):
            for at, offset, count in self._segments.spans(begin, end):
                row[at : at + count] = self._flat[offset : offset + count]
            row[end - begin :] = 0

    def combine(self, received: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Part`."""
        ordered_mean(received.view(self._dtype), self._divisor, out.view(self._dtype))

    def unpack(self, totals: torch.Tensor) -> None:
        """See :class:`Part`."""
        for row, (begin, end) in zip(totals.view(self._dtype), pairwise(self._edges), strict=True):
            for at, offset, count in self._segments.spans(begin, end):
                self._flat[offset : offset + count] = row[at : at + count]

    def keep(self, received: torch.Tensor) -> None:
        """See :class:`Part`."""
        mean = received.new_empty(self._length, dtype=self._dtype)
        ordered_mean(received.view(self._dtype), self._divisor, mean)
        out, segments = self._target or (self._flat, self._segments)
        begin, end = (0, segments.numel) if self._target else (self._edges[0], self._edges[-1])
        for at, offset, count in segments.spans(begin, end):
            out[offset : offset + count] = mean[at : at + count]


def ordered_mean(rows: torch.Tensor, divisor: float, out: torch.Tensor) -> None:
    """(W, m) floats, added row by row, over `divisor` -> out (m,) of their type."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    for begin in range(0, rows.shape[1], _AT_A_TIME):
        piece = rows[:, begin : begin + _AT_A_TIME]
        total = piece[0].to(wide, copy=True)
        for row in piece[1:]:
            total += row
        out[begin : begin + _AT_A_TIME] = total / divisor


class Statistics:
    """What ranks measured of a group's segments, up; what they agree on, back.

    Args:
        local: (..., L) float32; not modified.
        agree: (W, ..., m) statistics of some segments, in rank order -> (..., m), the same on all ranks.
        edges: (rows + 1,) segments.
    """

    label = "scales"

    def __init__(self, local: Local, agree: Callable[[torch.Tensor], Agreed], edges: Sequence[int]) -> None:
        self._local, self._agree, self._edges = local, agree, tuple(edges)
        self._length = max(end - begin for begin, end in pairwise(edges))
        self._shape = (*local.shape[:-1], self._length)
        self.shared = Agreed(torch.zeros_like(local))
        self.up_nbytes = self.back_nbytes = 4 * torch.Size(self._shape).numel()

    def pack(self, out: torch.Tensor) -> None:
        """See :class:`Part`."""
        for row, (begin, end) in zip(out.view(torch.float32), pairwise(self._edges), strict=True):
            padded = torch.nn.functional.pad(self._local[..., begin:end], (0, self._length - (end - begin)))
            row.copy_(padded.flatten())

    def combine(self, received: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Part`."""
        out.view(torch.float32).copy_(self._agreed(received).flatten())

    def unpack(self, totals: torch.Tensor) -> None:
        """See :class:`Part`."""
        for row, (begin, end) in zip(totals.view(torch.float32), pairwise(self._edges), strict=True):
            self.shared[..., begin:end] = row.view(self._shape)[..., : end - begin]

    def keep(self, received: torch.Tensor) -> None:
        """See :class:`Part`."""
        self.shared.copy_(self._agreed(received))

    def _agreed(self, received: torch.Tensor) -> Agreed:
        return self._agree(received.view(torch.float32).view(len(received), *self._shape))
