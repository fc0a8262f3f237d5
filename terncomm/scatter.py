"""THE PATH for sharded gradients: every rank keeps the mean of its own shard, and nothing travels back.

    rows = input.view(W, k)            # row r: what rank r keeps
    local = measure(each parameter)    # as `reduce.py`, in the parameter's own order: the same scales, the same bits
    shared = share(local)
    codes = encode(rows)               # noise by the place inside the parameter
    total = sum of row r's codes       # exact, on rank r alone
    out = total * shared / (levels * divisor)

Half of an all-reduce: what `reduce.all_reduce_mean` would give, cut into shards.
"""

import itertools
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from terncomm import exchange as exchanges
from terncomm import ops
from terncomm.codecs.base import Codec
from terncomm.keys import Key
from terncomm.reduce import DTYPES, Clock, Header, Unchecked, share
from terncomm.segments import Segments
from terncomm.transports.base import Transport
from terncomm.wire import packing_for


class Run(NamedTuple):
    """A piece of a parameter that lies in one row: elements of it from `begin` on, at `offset` in the buffer."""

    begin: int
    offset: int
    length: int


class Parameter(NamedTuple):
    """A coded parameter: its elements, its number for the noise, and its pieces in its own order."""

    size: int
    number: int
    runs: tuple[Run, ...]


class Shards:
    """How parameters lie in a buffer of W rows, one for each rank. What is neither coded nor exact becomes 0.

    Args:
        coded: the parameters that are coded, in the order in which each row holds them.
        exact: for each row the slices (place in the row, elements) that are added exactly, ascending.
        row: elements of a row.
    """

    def __init__(self, coded: Sequence[Parameter], exact: Sequence[Sequence[tuple[int, int]]], row: int) -> None:
        self.world_size, self.row = len(exact), row
        self._coded, self._exact = tuple(coded), tuple(map(tuple, exact))
        self._alike = len(set(self._exact)) == 1
        self.exact_width = max(sum(length for _, length in slices) for slices in exact)
        self.exact_numel = sum(length for slices in exact for _, length in slices)
        self.checksum = zlib.crc32(repr((self._coded, self._exact, row)).encode())
        self._cuts: dict[Codec, Cut] = {}

    @classmethod
    def by_chunks(
        cls, sizes: Sequence[int], chunks: Sequence[int], numbers: Sequence[int], coded: Sequence[bool], world_size: int
    ) -> "Shards":
        """Row r holds chunk r of each parameter, one after another, padded (`fully_shard`).

        Args:
            sizes: elements of each parameter.
            chunks: elements of a parameter's chunk in each row, so that W chunks hold it; what is over is padding.
            numbers: of the parameters, for the noise.
            coded: which parameters are coded; the others are added exactly.
            world_size: W.

        Raises:
            ValueError: a parameter does not fit its chunks.
        """
        if any(size > world_size * chunk for size, chunk in zip(sizes, chunks, strict=True)):
            raise ValueError(f"parameters of {list(sizes)} elements do not fit {world_size} chunks of {list(chunks)}")
        row, place = sum(chunks), 0
        parameters, exact = [], []
        for size, chunk, number, code in zip(sizes, chunks, numbers, coded, strict=True):
            if code and size:
                cuts = range(0, size, chunk)
                runs = (Run(begin, r * row + place, min(chunk, size - begin)) for r, begin in enumerate(cuts))
                parameters.append(Parameter(size, number, tuple(runs)))
            else:
                exact.append((place, chunk))
            place += chunk
        return cls(parameters, [exact] * world_size, row)

    @classmethod
    def in_a_row(
        cls,
        sizes: Sequence[int],
        offsets: Sequence[int],
        numbers: Sequence[int],
        coded: Sequence[bool],
        row: int,
        world_size: int,
    ) -> "Shards":
        """Parameters follow one another in the buffer, and rows are cut where they may (a flat parameter).

        Args:
            sizes, offsets: elements of each parameter, and where it begins; ascending.
            numbers, coded: see :meth:`by_chunks`.
            row: elements of a row.
            world_size: W.

        Raises:
            ValueError: a parameter does not fit the rows.
        """
        parameters: list[Parameter] = []
        exact: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
        for size, offset, number, code in zip(sizes, offsets, numbers, coded, strict=True):
            if offset + size > world_size * row:
                raise ValueError(f"elements {offset} to {offset + size} do not fit {world_size} rows of {row}")
            if not size:
                continue
            cuts = [offset, *range((offset // row + 1) * row, offset + size, row), offset + size]
            runs = tuple(Run(low - offset, low, high - low) for low, high in itertools.pairwise(cuts))
            if code:
                parameters.append(Parameter(size, number, runs))
            else:
                for run in runs:
                    exact[run.offset // row].append((run.offset % row, run.length))
        return cls(parameters, exact, row)

    @cached_property
    def layers(self) -> Segments:
        """The parameters that are coded, each whole."""
        return Segments([each.size for each in self._coded], layers=[each.number for each in self._coded])

    def whole(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The coded parameters out of the buffer, each (size,) in its own order."""
        found = []
        for size, _, runs in self._coded:
            first, last = runs[0], runs[-1]
            if last.offset + last.length - first.offset == size:
                found.append(flat[first.offset : first.offset + size])
            else:
                found.append(torch.cat([flat[run.offset : run.offset + run.length] for run in runs]))
        return found

    def exact(self, flat: torch.Tensor) -> torch.Tensor:
        """(W, exact_width): what each row holds of the exact parts; a shorter row is filled up with zeros."""
        rows = flat.view(self.world_size, self.row)
        if self._alike:
            columns = [rows[:, place : place + length] for place, length in self._exact[0]]
            return torch.cat(columns or [rows[:, :0]], dim=1)
        packed = flat.new_zeros(self.world_size, self.exact_width)
        for row, to, slices in zip(rows, packed, self._exact, strict=True):
            for here, (place, length) in zip(_places(slices), slices, strict=True):
                to[here : here + length] = row[place : place + length]
        return packed

    def put_exact(self, packed: torch.Tensor, rank: int, out: torch.Tensor) -> None:
        """Set the exact parts of one row, (row,), from what :meth:`exact` made of it, (exact_width,)."""
        slices = self._exact[rank]
        for here, (place, length) in zip(_places(slices), slices, strict=True):
            out[place : place + length] = packed[here : here + length]

    def own(self, rank: int) -> tuple[Segments, Segments]:
        """The coded and the exact layers of one row, as a buffer of its own."""
        first, exact = rank * self.row, self._exact[rank]
        held = [
            (run.length, run.offset - first, number, run.begin)
            for _, number, runs in self._coded
            for run in runs
            if first <= run.offset < first + self.row
        ]
        sizes, offsets, numbers, bases = map(list, zip(*held, strict=True)) if held else ([], [], [], [])
        coded = Segments(sizes, offsets=offsets, layers=numbers, bases=bases)
        return coded, Segments([length for _, length in exact], offsets=[place for place, _ in exact])

    def cut(self, codec: Codec) -> "Cut":
        """The pieces of all rows, for a codec's scales."""
        if codec not in self._cuts:
            self._cuts[codec] = Cut(self, self._coded, codec)
        return self._cuts[codec]


def _places(slices: Sequence[tuple[int, int]]) -> list[int]:
    """Where slices begin when they follow one another."""
    return list(itertools.accumulate((length for _, length in slices), initial=0))[:-1]


class Cut:
    """Coded parameters, cut where a scale or a row ends.

    pieces: in the order of the buffer. scale: (pieces,) which of the codec's scales is theirs. edges: (W + 1,) dense
    elements where rows begin.
    """

    def __init__(self, shards: Shards, coded: Sequence[Parameter], codec: Codec) -> None:
        tables, scales, first = [], [], 0
        for size, number, runs in coded:
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
        self.pieces = Segments._of(table[:, order])
        self.scale = torch.cat(scales)[order] if scales else torch.zeros(0, dtype=torch.int64)
        of_row = torch.searchsorted(self.pieces.offsets, torch.arange(shards.world_size + 1) * shards.row)
        self._of_row = of_row.tolist()
        self.edges = self.pieces.starts[of_row].tolist()
        self.length = max(end - begin for begin, end in itertools.pairwise(self.edges))
        self._row = shards.row

    def own(self, rank: int) -> tuple[Segments, torch.Tensor]:
        """The pieces of one row, as a buffer of its own, and which scale is theirs."""
        mine = slice(self._of_row[rank], self._of_row[rank + 1])
        table = self.pieces.table[:, mine].clone()
        table[0] -= rank * self._row
        return Segments._of(table), self.scale[mine]


def reduce_scatter(
    flat: torch.Tensor,
    shards: Shards,
    codec: Codec | None,
    transport: Transport,
    *,
    key: Key,
    divisor: float,
    out: torch.Tensor,
    clock: Clock | None = None,
    later: list[Unchecked] | None = None,
) -> None:
    """Leave the sum over ranks of this rank's row, divided by `divisor`, in `out`.

    Args:
        flat: (W k,) contiguous floats, laid out as `shards` says; not modified.
        shards: the layout.
        codec: how; None where nothing is coded.
        transport: this rank's.
        key: seed, step and bucket.
        divisor: W for the mean, 1 for the sum.
        out: (k,), of the same type; padding becomes 0.
        clock, later: see :func:`terncomm.reduce.all_reduce_mean`.

    Raises:
        ValueError: sizes do not fit.
        TypeError: not floats of a known type.
        RanksDiffer: ranks called with different arguments.
    """
    world_size, rank = transport.world_size, transport.rank
    if flat.dtype not in DTYPES:
        raise TypeError(f"gradients must be {', '.join(map(str, DTYPES))}, got {flat.dtype}")
    if flat.numel() != world_size * shards.row or out.numel() != shards.row:
        raise ValueError(
            f"wanted {world_size} rows of {shards.row} elements and room for one, got {flat.numel()} and {out.numel()}"
        )
    clock = clock or Clock()
    coded = codec is not None and shards.layers.numel > 0
    with clock("encode", key, "measure"):
        local = torch.zeros(0, device=flat.device)
        if codec is not None and coded:
            local = torch.cat([codec.measure(each, codec.scaled(Segments([len(each)]))) for each in shards.whole(flat)])
    header = Header(
        key.seed,
        key.step,
        key.bucket,
        flat.numel(),
        shards.layers.numel if coded else 0,
        zlib.crc32(f"{codec!r} {flat.dtype} scatter, over {divisor}".encode()),
        shards.checksum,
    )
    with clock("exchange", key, "share"):
        shared = share(local, header, transport, later)
        floats = shards.exact(flat)
        octets = (
            floats.contiguous().view(torch.uint8) if floats.numel() else flat.new_empty(world_size, 0).view(torch.uint8)
        )
    nbytes = 0
    if codec is not None and coded:
        cut, packing = shards.cut(codec), packing_for(*codec.alphabet)
        nbytes = packing.nbytes(cut.length)
        message = octets.new_empty(world_size, nbytes + octets.shape[1])
        with clock("encode", key):
            scale = cut.scale.to(flat.device)
            how = codec.rounding(cut.pieces, local[scale], shared[scale], key, rank=rank, world_size=world_size)
            ops.encode_pack(flat, cut.pieces, how, packing, cut.edges, cut.length, message[:, :nbytes])
        message[:, nbytes:] = octets
    else:
        message = octets
    with clock("exchange", key):
        received = transport.all_to_all(message)
    with clock("decode", key):
        out.zero_()
        if codec is not None and coded:
            own, which = cut.own(rank)
            unit = codec.unit(shared, divisor)[:, which.to(flat.device)]
            ops.unpack_decode(received[:, :nbytes], packing, own, unit, 0, own.numel, cut.length, out)
        mean = exchanges.ordered_mean(exchanges.floats_of(received[:, nbytes:], flat), divisor)
        shards.put_exact(mean, rank, out)
