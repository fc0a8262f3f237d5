"""THE PATH for sharded gradients: every rank keeps the mean of its own shard, and nothing travels back.

    rows = input.view(W, k)            # row r: rank r's shard of every parameter, padded
    local = measure(each parameter)    # as `reduce.py`, in the parameter's own order: the same scales, the same bits
    shared = share(local)
    codes = encode(rows)               # noise by the place inside the parameter
    total = sum of row r's codes       # exact, on rank r alone
    out = total * shared / (levels * divisor)

Half of an all-reduce: what `reduce.all_reduce_mean` would give, cut into shards.
"""

import zlib
from collections.abc import Sequence
from functools import cached_property

import torch

from terncomm import exchange as exchanges
from terncomm import ops
from terncomm.codecs.base import Codec
from terncomm.keys import Key
from terncomm.reduce import DTYPES, Clock, Header, Unchecked, share
from terncomm.segments import Segments
from terncomm.transports.base import Transport
from terncomm.wire import packing_for


class Shards:
    """How parameters lie in a buffer of W rows: row r holds chunk r of each, one after another, padded.

    Args:
        sizes: elements of each parameter.
        chunks: elements of a parameter's chunk in each row, so that W chunks hold it; what is over is padding.
        numbers: of the parameters, for the noise.
        coded: which parameters are coded; the others are added exactly.
        world_size: W.

    Raises:
        ValueError: a parameter does not fit its chunks.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        chunks: Sequence[int],
        numbers: Sequence[int],
        coded: Sequence[bool],
        world_size: int,
    ) -> None:
        if any(size > world_size * chunk for size, chunk in zip(sizes, chunks, strict=True)):
            raise ValueError(f"parameters of {list(sizes)} elements do not fit {world_size} chunks of {list(chunks)}")
        self.world_size = world_size
        places = torch.tensor([0, *chunks]).cumsum(0).tolist()
        self.row = places.pop()
        every = list(zip(sizes, chunks, places, numbers, strict=True))
        which = [code and size > 0 for code, size in zip(coded, sizes, strict=True)]
        self._coded = [each for each, code in zip(every, which, strict=True) if code]
        self.exact = [(each[2], each[1]) for each, code in zip(every, which, strict=True) if not code]
        self.exact_numel = sum(chunk for _, chunk in self.exact)
        self.checksum = zlib.crc32(repr((every, which)).encode())
        self._cuts: dict[Codec, Cut] = {}

    @cached_property
    def layers(self) -> Segments:
        """The parameters that are coded, each whole."""
        return Segments([each[0] for each in self._coded], layers=[each[3] for each in self._coded])

    def whole(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The coded parameters out of (W, k), each (size,) in its own order."""
        return [rows[:, place : place + chunk].contiguous().view(-1)[:size] for size, chunk, place, _ in self._coded]

    def own(self, rank: int) -> tuple[Segments, Segments]:
        """The coded and the exact layers of one row, as a buffer of its own."""
        pieces = [
            (min(max(size - rank * chunk, 0), chunk), place, number, rank * chunk)
            for size, chunk, place, number in self._coded
        ]
        sizes, offsets, numbers, bases = map(list, zip(*pieces, strict=True)) if pieces else ([], [], [], [])
        coded = Segments(sizes, offsets=offsets, layers=numbers, bases=bases)
        return coded, Segments([chunk for _, chunk in self.exact], offsets=[place for place, _ in self.exact])

    def cut(self, codec: Codec) -> "Cut":
        """The pieces of all rows, for a codec's scales."""
        if codec not in self._cuts:
            self._cuts[codec] = Cut(self, self._coded, codec)
        return self._cuts[codec]


class Cut:
    """Coded parameters, cut where a scale or a row ends.

    pieces: in the order of the buffer. scale: (pieces,) which of the codec's scales is theirs. edges: (W + 1,) dense
    elements where rows begin.
    """

    def __init__(self, shards: Shards, coded: list[tuple[int, int, int, int]], codec: Codec) -> None:
        tables, scales, first = [], [], 0
        for size, chunk, place, number in coded:
            starts = codec.scaled(Segments([size])).bases
            begin = torch.unique(torch.cat([starts, torch.arange(0, size, max(chunk, 1))]))
            end = torch.cat([begin[1:], torch.tensor([size])])
            row = begin // chunk
            offset = row * shards.row + place + begin - row * chunk
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
        self.length = max(end - begin for begin, end in zip(self.edges, self.edges[1:], strict=False))
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
    rows = flat.view(world_size, shards.row)
    coded = codec is not None and shards.layers.numel > 0
    with clock("encode", key, "measure"):
        local = torch.zeros(0, device=flat.device)
        if codec is not None and coded:
            local = torch.cat([codec.measure(each, codec.scaled(Segments([len(each)]))) for each in shards.whole(rows)])
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
        floats = torch.cat([rows[:, place : place + chunk] for place, chunk in shards.exact] or [rows[:, :0]], dim=1)
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
            for row, begin in enumerate(cut.edges[:-1]):
                # What a shorter row lacks is filled up with codes of the next one, which nobody reads.
                ops.encode_pack(flat, cut.pieces, how, packing, begin, cut.length, message[row, :nbytes])
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
        begin = 0
        for place, chunk in shards.exact:
            out[place : place + chunk] = mean[begin : begin + chunk]
            begin += chunk
