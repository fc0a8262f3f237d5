"""Parts: the data of one kind in a bucket, cut into rows that are packed into bytes.

A part is sent in one of three ways, see :mod:`terncomm.path.exchanges`:

* whole: one row; every rank sends it to all ranks. Calls: `pack`, then `store_sum` on every rank.
* in rows: W rows; row r goes to rank r, which adds it up and sends the total back. Calls: `pack`, `combine`, `unpack`.
* scattered: W rows; row r goes to rank r, which adds it up and keeps the total. Calls: `pack`, `store_sum`.

Only `unpack` and `store_sum` write to the buffer.
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

_AT_A_TIME = 1 << 16  # elements added at a time: bounds the memory for a sum in a wider type


class Part(Protocol):
    """Data of one kind in a bucket, or in a piece of it. All packed rows have the same size, and so have all totals."""

    label: str  # its bytes are counted under this name
    up_nbytes: int  # of a packed row
    back_nbytes: int  # of a total

    def pack(self, out: torch.Tensor) -> None:
        """Pack this rank's rows into `out`, (rows, up_nbytes) uint8, which may be a slice of a wider tensor."""

    def combine(self, received: torch.Tensor, out: torch.Tensor) -> None:
        """Add up this rank's row and pack the total.

        received: (W, up_nbytes) uint8, the row as each rank sent it. out: (back_nbytes,) uint8, for all ranks.
        """

    def unpack(self, totals: torch.Tensor) -> None:
        """Write the totals of all rows, (rows, back_nbytes) uint8, to their places."""

    def store_sum(self, received: torch.Tensor) -> None:
        """Add up one row, (W, up_nbytes) uint8 as each rank sent it, and write the total to its place."""


class Target(NamedTuple):
    """Where decoded values go: to `segments` of `out`. `shared`: (..., L) float32, their agreed statistics."""

    out: torch.Tensor
    segments: Segments
    shared: Agreed


class Coding:
    """One group of layers under one codec, in one step. Shared by all pieces of the group.

    Args:
        flat: (n,) floats; not changed unless it is the target.
        segments: the layers, cut so that each segment has one scale.
        codec: the codec of the group.
        local, shared: (..., L) float32 statistics of this rank, and those that all ranks agreed on.
        key, rank, world_size: of the rounding noise.
        divisor: the sum over ranks is divided by it; by default W, for the mean.
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
        """The arguments of the fused kernel that encodes and packs; None: the codec has no fused kernel."""
        where = {"rank": self.rank, "world_size": self.world_size}
        return self.codec.rounding(self.segments, self._local, self._shared, self.key, **where)

    @cached_property
    def unit(self) -> torch.Tensor | None:
        """The factors of the fused kernel that unpacks and decodes; None: the codec has no fused kernel."""
        return self.codec.unit(self.target.shared, self.divisor)

    @cached_property
    def codes(self) -> torch.Tensor:
        """(planes, n) codes of all segments, for a codec that has no fused kernel."""
        return self._encode().view(self.codec.planes, -1)

    def _encode(self) -> torch.Tensor:
        where = {"rank": self.rank, "world_size": self.world_size}
        codes = self.codec.encode(self.flat, self.segments, self._local, self._shared, self.key, **where)
        planes, n = self.codec.planes, self.segments.numel
        shapes = [(planes, n), (n,)] if planes == 1 else [(planes, n)]
        if codes.shape not in shapes or codes.is_floating_point():
            raise ValueError(
                f"{self.codec!r}.encode: wanted {planes} x {n} integers (planes is {planes}), got shape "
                f"{tuple(codes.shape)}, {codes.dtype}"
            )
        low, high = self.codec.alphabet
        if codes.numel() and not codes.is_meta and not codes.is_cuda:  # on CUDA the host would wait
            least, most = (int(each) for each in codes.aminmax())
            if least < low or most > high:
                raise ValueError(f"{self.codec!r}.encode: wanted codes in {low}..{high}, got {least}..{most}")
        return codes

    def own(self) -> torch.Tensor:
        """Decode only this rank's codes: (n,) float32, laid out like `flat`; gaps between segments are undefined."""
        codes = self.codes if self.rounding is None else self._encode().view(self.codec.planes, -1)
        out = torch.empty_like(self.flat, dtype=torch.float32)
        return self.codec.decode(codes.to(torch.int32), self.segments, self._shared, 1.0, out=out)

    def decode(self, totals: torch.Tensor, begin: int) -> None:
        """Decode totals, (planes, m) int32, and write them to the target's dense elements from `begin` on."""
        out, segments, shared = self.target
        if self.unit is not None:
            ops.decode(totals[0], segments, self.unit, begin, out)
        else:
            ranks = self.world_size
            self.codec.decode(totals, segments, shared, self.divisor, ranks=ranks, begin=begin, out=out)


class Codes:
    """The codes of a coding, as a part: packed codes are sent up, packed sums are sent back.

    edges: (rows + 1,) dense indices of the coding where rows begin, and where the last one ends.
    target_range: for a reduce-scatter, the target's dense elements [begin, end) that `store_sum` writes; by default the
        single row.
    """

    def __init__(self, coding: Coding, edges: Sequence[int], *, target_range: tuple[int, int] | None = None) -> None:
        codec, world_size = coding.codec, coding.world_size
        self.label = codec.name
        self._coding = coding
        self._edges = tuple(edges)
        self._length = max(end - begin for begin, end in pairwise(edges))
        self._target_range = (edges[0], edges[-1]) if target_range is None else target_range
        self._scatters = target_range is not None
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

    def store_sum(self, received: torch.Tensor) -> None:
        """See :class:`Part`."""
        coding, (begin, end) = self._coding, self._target_range
        if self._narrow is None and coding.unit is not None:
            where = begin, end, self._length, coding.target.out
            ops.unpack_decode(received, self._up, coding.target.segments, coding.unit, *where)
            return
        totals = [total[: end - begin] for total in self._totals(received)]
        if self._narrow is not None:
            totals = [self._narrow.rounded(0, total) for total in totals]
        coding.decode(torch.stack(totals), begin)

    def _totals(self, received: torch.Tensor) -> list[torch.Tensor]:
        """Add up one row over ranks, (W, up_nbytes) uint8: (length,) int32 for each plane."""
        octets = self._up.nbytes(self._length)
        places = [plane * self._up_plane for plane in range(self._planes)]
        return [ops.unpack_sum(received[:, at : at + octets], self._up, self._length) for at in places]

    def _returned(self, row: int, packed: torch.Tensor) -> torch.Tensor:
        if self._narrow is not None:
            return self._narrow.unpack(row, packed[: self._narrow.nbytes])
        return ops.unpack_sum(packed[None, : self._back.nbytes(self._length)], self._back, self._length)


class Floats:
    """Layers that are averaged as floats, as a part: without a codec, or under "bf16" or "fp16".

    Floats are added in rank order, so every engine gives the same bits. They are added in float64 if they are float64,
    else in float32. The sum is divided and then cast back.

    Args:
        flat: (n,) floats; changed unless there is a target.
        segments: the layers.
        edges: see :class:`Codes`.
        divisor: the sum over ranks is divided by it; W for the mean.
        label: see :class:`Part`.
        dtype: on the wire; by default that of `flat`.
        target: (buffer, segments) that `store_sum` writes; by default the single row in `flat`.
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

    def store_sum(self, received: torch.Tensor) -> None:
        """See :class:`Part`."""
        mean = received.new_empty(self._length, dtype=self._dtype)
        ordered_mean(received.view(self._dtype), self._divisor, mean)
        out, segments = self._target or (self._flat, self._segments)
        begin, end = (0, segments.numel) if self._target else (self._edges[0], self._edges[-1])
        for at, offset, count in segments.spans(begin, end):
            out[offset : offset + count] = mean[at : at + count]


def ordered_mean(rows: torch.Tensor, divisor: float, out: torch.Tensor) -> None:
    """Add up rows, (W, m) floats, in their order, and divide by `divisor`. out: (m,) of the same dtype.

    Where a sum of finite numbers overflows, rows are divided before they are added, as DDP does.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    for begin in range(0, rows.shape[1], _AT_A_TIME):
        piece = rows[:, begin : begin + _AT_A_TIME]
        mean = _sum(piece, wide) / divisor
        finite = torch.isfinite(mean)
        if mean.is_cuda or not finite.all():  # on CUDA, to look would make the host wait
            mean = torch.where(finite, mean, _sum(piece.to(wide) / divisor, wide))
        out[begin : begin + _AT_A_TIME] = mean


def _sum(rows: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    total = rows[0].to(wide, copy=True)
    for row in rows[1:]:
        total += row
    return total


class Statistics:
    """The statistics of a group's segments, as a part: those of each rank are sent up, the agreed ones back.

    Args:
        local: (..., L) float32; not modified.
        agree: :meth:`IntegerCodec.agree` of the group's codec, (W, ..., m) in rank order -> (..., m).
        edges: (rows + 1,) numbers of the segments where rows begin, and where the last one ends.
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

    def store_sum(self, received: torch.Tensor) -> None:
        """See :class:`Part`."""
        self.shared.copy_(self._agreed(received))

    def _agreed(self, received: torch.Tensor) -> Agreed:
        agreed = self._agree(received.view(torch.float32).view(len(received), *self._shape))
        if agreed.shape != self._shape or agreed.dtype != torch.float32:
            name = getattr(self._agree, "__qualname__", "agree")
            raise ValueError(
                f"{name}: wanted shape {tuple(self._shape)}, torch.float32, got {tuple(agreed.shape)}, {agreed.dtype}"
            )
        return agreed
