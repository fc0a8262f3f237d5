"""Layout of parameters in FSDP's buffers: W rows, of which rank r keeps row r."""

import itertools
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from terncomm.codecs.base import Codec, Half, IntegerCodec
from terncomm.path.bucket import Bucket
from terncomm.segments import Segments

Slices = list[list[tuple[int, int]]]  # for each row: (offset in the row, length) of each slice, ascending


class Run(NamedTuple):
    """`length` elements of a parameter that lie in one row: from its element `begin` on, at `offset` in the buffer."""

    begin: int
    offset: int
    length: int


class Parameter(NamedTuple):
    """A coded parameter: number of elements, layer number (a key of the noise), and runs in element order."""

    size: int
    number: int
    runs: tuple[Run, ...]


class CodedShards:
    """Parameters under one integer codec.

    Args:
        codec: the codec.
        parameters: and their layout, in the order in which each row holds them.
        row: elements of a row.
        world_size: W.
    """

    def __init__(self, codec: IntegerCodec, parameters: Sequence[Parameter], row: int, world_size: int) -> None:
        self.codec, self._parameters, self._row, self._world_size = codec, tuple(parameters), row, world_size

    @cached_property
    def layers(self) -> Segments:
        """One segment for each whole parameter, in a buffer that holds only these."""
        numbers = [each.number for each in self._parameters]
        return Segments([each.size for each in self._parameters], layers=numbers)

    @cached_property
    def scales(self) -> Segments:
        """One segment for each scale, in a buffer that holds only these parameters."""
        return self.codec.scaled(self.layers)

    def whole(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter from the buffer `flat`, (size,) in element order: a view if contiguous, else a copy."""
        found = []
        for size, _, runs in self._parameters:
            first, last = runs[0], runs[-1]
            if last.offset + last.length - first.offset == size:
                found.append(flat[first.offset : first.offset + size])
            else:
                found.append(torch.cat([flat[run.offset : run.offset + run.length] for run in runs]))
        return found

    def own(self, rank: int) -> Segments:
        """The segments of row `rank`; offsets count from the beginning of the row."""
        first = rank * self._row
        held = [
            (run.length, run.offset - first, number, run.begin)
            for _, number, runs in self._parameters
            for run in runs
            if first <= run.offset < first + self._row
        ]
        sizes, offsets, numbers, bases = map(list, zip(*held, strict=True)) if held else ([], [], [], [])
        return Segments(sizes, offsets=offsets, layers=numbers, bases=bases)

    @cached_property
    def cut(self) -> "ShardSegments":
        """The parameters in all rows, cut where a row or a scale of the codec ends."""
        return ShardSegments(self._parameters, self.codec, self._row, self._world_size)


class FloatShards:
    """Layers that are averaged as floats, and their slices in each row. dtype: on the wire; None: the buffer's."""

    def __init__(self, dtype: torch.dtype | None, label: str, slices: Slices, row: int) -> None:
        self.dtype, self.label, self._slices = dtype, label, slices
        places = [(rank * row + place, length) for rank, held in enumerate(slices) for place, length in held]
        offsets, sizes = map(list, zip(*places, strict=True)) if places else ([], [])
        self.segments = Segments(sizes, offsets=offsets)
        held = (sum(length for _, length in each) for each in slices)
        self.edges = tuple(itertools.accumulate(held, initial=0))

    def own(self, rank: int) -> Segments:
        """The segments of row `rank`; offsets count from the beginning of the row."""
        held = self._slices[rank]
        return Segments([length for _, length in held], offsets=[place for place, _ in held])


class Shards:
    """Layout of parameters in a buffer of W rows, one for each rank. Elements in no group become 0.

    Args:
        coded: (codec, parameters) for each integer codec.
        floats: (codec, slices) of layers that are averaged as floats; codec None: without a codec.
        row: elements of a row.
        world_size: W.
    """

    def __init__(
        self,
        coded: Sequence[tuple[IntegerCodec, Sequence[Parameter]]],
        floats: Sequence[tuple[Half | None, Slices]],
        row: int,
        world_size: int,
    ) -> None:
        self.world_size, self.row = world_size, row
        self._coded, self._floats = coded, floats
        self.coded = [CodedShards(codec, parameters, row, world_size) for codec, parameters in coded]
        self._codecs = [codec for codec, _ in floats]
        self.floats = [
            FloatShards(codec.dtype, codec.name, slices, row) if codec else FloatShards(None, "exact", slices, row)
            for codec, slices in floats
        ]
        self.configuration = repr(([codec for codec, _ in coded], self._codecs))
        self.checksum = zlib.crc32(repr((coded, floats, row)).encode())
        exact = [each.segments.numel for each, codec in zip(self.floats, self._codecs, strict=True) if codec is None]
        halves = sum(each.segments.numel for each in self.floats) - sum(exact)
        self.exact_numel = sum(exact)
        self.coded_numel = sum(group.layers.numel for group in self.coded) + halves
        self._buckets: dict[int, Bucket] = {}

    def bucket(self, rank: int) -> Bucket:
        """The bucket of row `rank`; offsets count from the beginning of the row."""
        if rank not in self._buckets:
            coded = [(group.own(rank), group.codec) for group in self.coded]
            floats = [(group.own(rank), codec) for group, codec in zip(self.floats, self._codecs, strict=True)]
            self._buckets[rank] = Bucket([*coded, *floats])
        return self._buckets[rank]

    def numel_of(self, numbers: frozenset[int]) -> int:
        """Number of elements of the parameters with these numbers that use an integer codec."""
        return sum(each.size for _, parameters in self._coded for each in parameters if each.number in numbers)

    def without_codec(self, numbers: frozenset[int]) -> "Shards":
        """The layout in which the parameters with these numbers use no integer codec."""
        groups = _Groups(self.world_size)
        for codec, parameters in self._coded:
            for each in parameters:
                if each.number not in numbers:
                    groups.add_coded(codec, *each)
                    continue
                for run in each.runs:
                    groups.add_slice(None, run.offset // self.row, run.offset % self.row, run.length)
        for half, slices in self._floats:
            for rank, held in enumerate(slices):
                for place, length in held:
                    groups.add_slice(half, rank, place, length)
        return groups.shards(self.row)

    @classmethod
    def by_chunks(
        cls,
        sizes: Sequence[int],
        chunks: Sequence[int],
        numbers: Sequence[int],
        codecs: Sequence[Codec | None],
        world_size: int,
    ) -> "Shards":
        """The layout of `fully_shard`: row r holds chunk r of each parameter, one after another, padded.

        Args:
            sizes: elements of each parameter.
            chunks: for each parameter, elements of its chunk in a row. W chunks must hold it; the rest is padding.
            numbers: layer numbers of the parameters (keys of the noise).
            codecs: of the parameters; None: averaged without a codec.
            world_size: W.

        Raises:
            ValueError: a parameter does not fit its chunks.
        """
        if any(size > world_size * chunk for size, chunk in zip(sizes, chunks, strict=True)):
            raise ValueError(f"parameters of {list(sizes)} elements do not fit {world_size} chunks of {list(chunks)}")
        row, place = sum(chunks), 0
        groups = _Groups(world_size)
        for size, chunk, number, codec in zip(sizes, chunks, numbers, codecs, strict=True):
            if isinstance(codec, IntegerCodec) and size:
                cuts = range(0, size, chunk)
                runs = [Run(begin, r * row + place, min(chunk, size - begin)) for r, begin in enumerate(cuts)]
                groups.add_coded(codec, size, number, runs)
            else:
                for rank in range(world_size):
                    groups.add_slice(codec, rank, place, chunk)
            place += chunk
        return groups.shards(row)

    @classmethod
    def in_a_row(
        cls,
        sizes: Sequence[int],
        offsets: Sequence[int],
        numbers: Sequence[int],
        codecs: Sequence[Codec | None],
        row: int,
        world_size: int,
    ) -> "Shards":
        """The layout of FSDP1's flat parameter: parameters follow one another, and a row may end inside one.

        Args:
            sizes, offsets: elements of each parameter, and where it begins in the buffer; ascending.
            numbers, codecs: see :meth:`by_chunks`.
            row: elements of a row.
            world_size: W.

        Raises:
            ValueError: a parameter does not fit the rows.
        """
        groups = _Groups(world_size)
        for size, offset, number, codec in zip(sizes, offsets, numbers, codecs, strict=True):
            if offset + size > world_size * row:
                raise ValueError(f"elements {offset} to {offset + size} do not fit {world_size} rows of {row}")
            if not size:
                continue
            cuts = [offset, *range((offset // row + 1) * row, offset + size, row), offset + size]
            runs = [Run(low - offset, low, high - low) for low, high in itertools.pairwise(cuts)]
            if isinstance(codec, IntegerCodec):
                groups.add_coded(codec, size, number, runs)
            else:
                for run in runs:
                    groups.add_slice(codec, run.offset // row, run.offset % row, run.length)
        return groups.shards(row)


class _Groups:
    """Collects parameters and slices by codec, to build :class:`Shards`."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._coded: dict[IntegerCodec, list[Parameter]] = {}
        self._floats: dict[Codec | None, Slices] = {}

    def add_coded(self, codec: IntegerCodec, size: int, number: int, runs: Sequence[Run]) -> None:
        self._coded.setdefault(codec, []).append(Parameter(size, number, tuple(runs)))

    def add_slice(self, codec: Codec | None, rank: int, place: int, length: int) -> None:
        half = codec if isinstance(codec, Half) else None
        self._floats.setdefault(half, [[] for _ in range(self._world_size)])[rank].append((place, length))

    def shards(self, row: int) -> Shards:
        floats = [
            (codec if isinstance(codec, Half) else None, [sorted(held) for held in slices])
            for codec, slices in self._floats.items()
        ]
        return Shards(list(self._coded.items()), floats, row, self._world_size)


class ShardSegments:
    """Coded parameters as segments, cut where a scale or a row ends.

    pieces: the segments, in the order of the buffer. scale: (pieces,) int64, the index of the scale of each. edges:
    (W + 1,) dense indices where rows begin, and where the last one ends.
    """

    def __init__(self, parameters: Sequence[Parameter], codec: IntegerCodec, row: int, world_size: int) -> None:
        tables, scales, first = [], [], 0
        for size, number, runs in parameters:
            starts = codec.scaled(Segments([size])).bases
            begins, offsets, _ = torch.tensor(runs, dtype=torch.int64).T.contiguous()
            begin = torch.unique(torch.cat([starts, begins]))
            end = torch.cat([begin[1:], torch.tensor([size])])
            run = torch.searchsorted(begins, begin, right=True) - 1
            offset = offsets[run] + begin - begins[run]
            tables.append(torch.stack([offset, end - begin, torch.full_like(begin, number), begin]))
            scales.append(torch.searchsorted(starts, begin, right=True) - 1 + first)
            first += len(starts)
        table = torch.cat(tables, dim=1) if tables else torch.zeros(4, 0, dtype=torch.int64)
        order = table[0].argsort()
        self.pieces = Segments.of_table(table[:, order])
        self.scale = torch.cat(scales)[order] if scales else torch.zeros(0, dtype=torch.int64)
        of_row = torch.searchsorted(self.pieces.offsets, torch.arange(world_size + 1) * row)
        self._of_row = of_row.tolist()
        self.edges: tuple[int, ...] = tuple(self.pieces.starts[of_row].tolist())
        self._row = row

    def own(self, rank: int) -> tuple[Segments, torch.Tensor]:
        """The segments of row `rank`, with offsets from the beginning of the row, and the index of each one's scale."""
        mine = slice(self._of_row[rank], self._of_row[rank + 1])
        table = self.pieces.table[:, mine].clone()
        table[0] -= rank * self._row
        return Segments.of_table(table), self.scale[mine]
