"""The layers of one flat buffer: how each is sent, and in which pieces."""

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from terncomm.codecs.base import Codec, Half, IntegerCodec
from terncomm.path.sums import row_edges
from terncomm.segments import Segments
from terncomm.wire import aligned, packing_for

EXCHANGES = ("auto", "gather", "two_phase")
SMALL = 8192  # bytes; about what a 100 Mbit/s link sends in the latency of a small message, 1 ms
PIECE = 1 << 20  # elements of a piece: while one piece is sent, others are encoded or decoded
_LEAST_PIECE = 1 << 18  # elements; smaller pieces do not save memory worth their messages
_RANKS = 8  # with more ranks, pieces grow in proportion: else the messages to each rank get too small


class CodedGroup(NamedTuple):
    """Layers under one integer codec. `segments`: the layers, cut so that each segment has one scale."""

    codec: IntegerCodec
    layers: Segments
    segments: Segments


class FloatGroup(NamedTuple):
    """Layers that are averaged as floats. `dtype`: on the wire; None: that of the buffer. `label`: see `Account`."""

    segments: Segments
    dtype: torch.dtype | None
    label: str


class PieceLayout(NamedTuple):
    """A piece of a bucket: which elements of which groups it holds, as (group, edges) pairs.

    whole: groups that every rank sends whole to every rank, edges (2,). rows: groups in W rows, row r for rank r, edges
    (W + 1,). group: its index, first the coded groups, then the float groups. edges: dense indices where rows begin,
    and where the last one ends.
    """

    whole: tuple[tuple[int, tuple[int, ...]], ...]
    rows: tuple[tuple[int, tuple[int, ...]], ...]


class Bucket:
    """The layers of a flat buffer, in one group for each codec.

    Args:
        groups: (layers, codec) pairs; codec None: averaged without a codec. All groups share the same messages.

    Raises:
        TypeError: a codec is neither a terncomm codec nor None.
        ValueError: an element is in two groups.

    >>> from terncomm import Int8, Ternary
    >>> Bucket([(Segments([3000]), Ternary()), (Segments([100], offsets=[3000]), None)]).coded_numel
    3000
    """

    def __init__(self, groups: Sequence[tuple[Segments, Codec | None]]) -> None:
        groups = [(layers, codec) for layers, codec in groups if len(layers)]
        for _, codec in groups:
            if codec is not None and not isinstance(codec, Codec):
                raise TypeError(f"codec must be a terncomm codec such as terncomm.Ternary(), got {codec!r}")
        self.coded = [
            CodedGroup(codec, layers, codec.scaled(layers))
            for layers, codec in groups
            if isinstance(codec, IntegerCodec)
        ]
        self.floats = [
            FloatGroup(layers, codec.dtype, codec.name)
            if isinstance(codec, Half)
            else FloatGroup(layers, None, "exact")
            for layers, codec in groups
            if codec is None or isinstance(codec, Half)
        ]
        self._layers = [group.layers for group in self.coded] + [group.segments for group in self.floats]
        self.coded_numel = sum(layers.numel for layers, codec in groups if codec is not None)
        self.numel = sum(layers.numel for layers in self._layers)
        self.extent = max((layers.extent for layers in self._layers), default=0)
        self.configuration = repr([codec for _, codec in groups])
        self.checksum = zlib.crc32(repr([layers.table.tolist() for layers in self._layers]).encode())
        self._cuts: dict[tuple[str, int, torch.dtype, int], list[PieceLayout]] = {}
        self._clipped: dict[tuple[int, int], Bucket] = {}
        self._groups = groups
        self._refuse_overlaps()

    def _refuse_overlaps(self) -> None:
        if len(self._layers) < 2:
            return
        table = torch.cat([layers.table[:2] for layers in self._layers], dim=1)
        table = table[:, table[1] > 0]
        offsets, sizes = table[:, table[0].argsort()]
        if (clash := offsets[:-1] + sizes[:-1] > offsets[1:]).any():
            first = int(offsets[1:][clash][0])
            raise ValueError(
                f"a layer is both coded and exact: elements from {first} on are in two groups; put each layer in one"
            )

    def check(self, flat: torch.Tensor) -> None:
        """Raise a ValueError unless the buffer holds every layer."""
        for layers in self._layers or [Segments(())]:
            layers.check(flat)

    def cuts(self, exchange: str, world_size: int, dtype: torch.dtype, piece: int | None = None) -> list[PieceLayout]:
        """The pieces in which the bucket is sent.

        Args:
            exchange: for codes. "gather" sends them whole to every rank, "two_phase" in rows. "auto" takes what sends
                fewer bytes. It also takes "gather" if that sends at most SMALL bytes, and no more than an all-reduce of
                the floats would, because "gather" needs one message fewer. Floats are sent whole on this last
                condition, else in rows.
            world_size: W. With more than 8 ranks, pieces grow in proportion.
            dtype: of the buffer.
            piece: elements of a piece; by default PIECE.

        Raises:
            ValueError: unknown exchange.
        """
        most = (piece or PIECE) * max(world_size, _RANKS) // _RANKS
        known = exchange, world_size, dtype, most
        if known not in self._cuts:
            check_exchange(exchange)
            groups = [self._sent(index, exchange, world_size, dtype) for index in range(len(self._layers))]
            least = self._least_pieces([sizes for sizes, _ in groups], world_size, dtype)
            chunks = [self._chunks(index, whole, world_size, most, least) for index, (_, whole) in enumerate(groups)]
            self._cuts[known] = self._pieces([chunk for group in chunks for chunk in group], most)
        return self._cuts[known]

    def _sent(self, index: int, exchange: str, world_size: int, dtype: torch.dtype) -> tuple["_Sizes", bool]:
        """How many bytes group `index` takes, and whether it is sent whole."""
        if index < len(self.coded):
            codec, _, segments = self.coded[index]
            numel, sizes = segments.numel, _code_sizes(codec, segments.numel, world_size)
            fewer = sizes.whole <= sizes.row + sizes.total
        else:
            numel, itemsize = self._layers[index].numel, (self.floats[index - len(self.coded)].dtype or dtype).itemsize
            row = -(-numel // world_size) * itemsize
            sizes, fewer, exchange = _Sizes(numel * itemsize, row, row), False, "auto"
        row_of_floats = -(-numel // world_size) * dtype.itemsize
        small = (world_size - 1) * sizes.whole <= SMALL and aligned(sizes.whole) <= 2 * aligned(row_of_floats)
        return sizes, exchange == "gather" or (exchange == "auto" and (fewer or small))

    def _least_pieces(self, groups: Sequence["_Sizes"], world_size: int, dtype: torch.dtype) -> int:
        """Pieces into which large groups are cut, for the messages to take no more memory than the bucket.

        A single piece holds its rows twice, as they are sent and as they arrive. Of several pieces, up to two are on
        their way in each direction: about six times the rows of one.
        """
        once = sum(world_size * max(sizes.row, sizes.total) for sizes in groups)
        bucket = self.numel * dtype.itemsize
        return 1 if 2 * once <= bucket * 3 // 4 else -(-6 * once // bucket)

    def _chunks(
        self, index: int, whole: bool, world_size: int, most: int, least: int
    ) -> list[tuple[int, bool, tuple[int, ...]]]:
        """Cut group `index` into chunks of about `most` elements: (index, whether sent whole, dense edges of rows).

        least: number of chunks, at least, of _LEAST_PIECE elements or more.
        """
        numel = self._layers[index].numel
        if numel == 0:
            return []
        blocks = None
        if index < len(self.coded):
            codec, _, segments = self.coded[index]
            numel = segments.numel
            if (narrow := codec.narrowing(world_size)) is not None:
                blocks = segments.blocks(narrow.block)
        pieces = max(1, round(numel / most), min(least, numel // _LEAST_PIECE))
        rows = 1 if whole else world_size
        edges = row_edges(numel, pieces * rows, blocks)
        return [(index, whole, edges[at * rows : (at + 1) * rows + 1]) for at in range(pieces)]

    def _pieces(self, chunks: Sequence[tuple[int, bool, tuple[int, ...]]], most: int) -> list[PieceLayout]:
        """Join chunks to pieces of about `most` elements. A chunk of a group that is cut fills a piece."""
        pieces: list[list[tuple[int, bool, tuple[int, ...]]]] = []
        held = 0
        cut = {index for index, count in Counter(index for index, _, _ in chunks).items() if count > 1}
        for chunk in chunks:
            size = most if chunk[0] in cut else chunk[2][-1] - chunk[2][0]
            if not pieces or held + size > most * 3 // 2:
                pieces.append([])
                held = 0
            pieces[-1].append(chunk)
            held += size
        return [
            PieceLayout(
                tuple((index, edges) for index, whole, edges in piece if whole),
                tuple((index, edges) for index, whole, edges in piece if not whole),
            )
            for piece in pieces
        ]

    def numel_of(self, numbers: frozenset[int]) -> int:
        """Number of elements of the layers with these numbers that use an integer codec."""
        return sum(int(each.layers.lengths[each.layers.belong_to(numbers)].sum()) for each in self.coded)

    def without_codec(self, numbers: frozenset[int]) -> "Bucket":
        """The bucket in which the layers with these numbers use no integer codec."""
        groups: list[tuple[Segments, Codec | None]] = []
        moved = [torch.zeros(4, 0, dtype=torch.int64)]
        for layers, codec in self._groups:
            if codec is None:
                moved.append(layers.table)
            elif isinstance(codec, IntegerCodec):
                among = layers.belong_to(numbers)
                moved.append(layers.table[:, among])
                left = Segments.of_table(layers.table[:, ~among])
                groups += [(left, codec)] if left.numel else []
            else:
                groups.append((layers, codec))
        table = torch.cat(moved, dim=1)
        return Bucket([*groups, (Segments.of_table(table[:, table[0].argsort(stable=True)]), None)])

    def clipped(self, begin: int, end: int) -> "Bucket":
        """The bucket of elements [begin, end) of the buffer; its offsets count from `begin`."""
        if (begin, end) not in self._clipped:
            self._clipped[begin, end] = Bucket([(layers.clipped(begin, end), codec) for layers, codec in self._groups])
        return self._clipped[begin, end]


def check_exchange(exchange: str) -> None:
    """Raise a ValueError unless `exchange` is one of EXCHANGES."""
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")


class _Sizes(NamedTuple):
    """Estimated bytes of a group's elements: packed whole, in one of W rows, and as the total of a row."""

    whole: int
    row: int
    total: int


def _code_sizes(codec: IntegerCodec, numel: int, world_size: int) -> _Sizes:
    low, high = codec.alphabet
    up, row = packing_for(low, high), -(-numel // world_size)
    total = packing_for(low * world_size, high * world_size).nbytes(row)
    if (narrow := codec.narrowing(world_size)) is not None:
        total = narrow.nbytes(row)
    return _Sizes(*(codec.planes * nbytes for nbytes in (up.nbytes(numel), up.nbytes(row), total)))


def piece_for(chunk_nbytes: int | None) -> int:
    """Elements of a piece on a link. chunk_nbytes: size of the transport's transfers; None: it does not say.

    The size of transfers is what the link sends in 4 ms. Small pieces overlap more, but need more messages. Measured
    with TernGrad, 4 ranks on 2 cores, 12.6 M parameters, in transfers of 1.6 ms: at 100 Mbit/s a step takes 600 ms with
    pieces of 1 M elements and 635 ms with 2 M; at 1 Gbit/s 249 ms and 222 ms; without a rate limit 231 ms, 202 ms, and
    191 ms with 8 M.
    """
    if chunk_nbytes is None:
        return 2 * PIECE
    return PIECE if chunk_nbytes < 5 << 15 else 2 * PIECE if chunk_nbytes < 5 << 19 else 8 * PIECE
