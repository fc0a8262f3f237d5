"""The layers of one flat buffer: which travel how, and in which pieces."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from terncomm.codecs.base import Codec, Half, IntegerCodec
from terncomm.path.sums import row_edges
from terncomm.segments import Segments
from terncomm.wire import packing_for

EXCHANGES = ("auto", "gather", "two_phase")
SMALL = 8192  # bytes; about what a message round of 1 ms moves at 100 Mbit/s
PIECE = 1 << 20  # elements of a bucket that are encoded, sent and decoded while others are on their way
_RANKS = 8  # of more, pieces are larger: smaller messages to each rank cost more than they gain


class CodedGroup(NamedTuple):
    """Layers under one codec; `segments` are those that have a scale of their own."""

    codec: IntegerCodec
    layers: Segments
    segments: Segments


class FloatGroup(NamedTuple):
    """Layers that are averaged as floats, on the wire of this type, or of the buffer's if it is None."""

    segments: Segments
    dtype: torch.dtype | None
    label: str


class Cut(NamedTuple):
    """A piece of a bucket: (group, dense edges of its rows) of what travels whole, and of what travels in rows."""

    whole: tuple[tuple[int, tuple[int, ...]], ...]
    rows: tuple[tuple[int, tuple[int, ...]], ...]


class Bucket:
    """The layers of a flat buffer, in groups that travel alike.

    Args:
        groups: the layers of each group, and its codec; None averages them exactly. The groups share the messages.

    Raises:
        TypeError: what stands in a codec's place is none.
        ValueError: a layer is in two groups.

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
        self._cuts: dict[tuple[str, int, torch.dtype, int], list[Cut]] = {}
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
            raise ValueError(f"a layer is both coded and exact: elements from {first} on are in two groups")

    def check(self, flat: torch.Tensor) -> None:
        """Raise a ValueError unless the buffer holds every layer."""
        for layers in self._layers or [Segments(())]:
            layers.check(flat)

    def cuts(self, exchange: str, world_size: int, dtype: torch.dtype, piece: int | None = None) -> list[Cut]:
        """The pieces in which the bucket travels among W ranks, of a buffer of this type.

        exchange: "gather" sends codes whole, "two_phase" in rows; "auto" as sends fewer bytes, or whole where that
        costs at most SMALL bytes, for it needs one message less. Floats go in rows unless they are small.
        piece: elements of a piece; by default PIECE.

        Raises:
            ValueError: another exchange.
        """
        most = (piece or PIECE) * max(world_size, _RANKS) // _RANKS
        known = exchange, world_size, dtype, most
        if known not in self._cuts:
            check_exchange(exchange)
            chunks = [self._chunks(index, exchange, world_size, dtype, most) for index in range(len(self._layers))]
            self._cuts[known] = self._joined([chunk for group in chunks for chunk in group], most)
        return self._cuts[known]

    def _chunks(
        self, index: int, exchange: str, world_size: int, dtype: torch.dtype, most: int
    ) -> list[tuple[int, bool, tuple[int, ...]]]:
        """A group in pieces of about `most` elements: (group, whether whole, dense edges)."""
        numel = self._layers[index].numel
        if numel == 0:
            return []
        blocks = None
        if index < len(self.coded):
            codec, _, segments = self.coded[index]
            numel = segments.numel
            if (narrow := codec.narrowing(world_size)) is not None:
                blocks = segments.blocks(narrow.block)
            gather, two_phase = code_bytes(codec, numel, world_size)
            whole = exchange == "gather" or (exchange == "auto" and (gather <= two_phase or gather <= SMALL))
        else:
            itemsize = (self.floats[index - len(self.coded)].dtype or dtype).itemsize
            whole = (world_size - 1) * numel * itemsize <= SMALL
            most = min(most, PIECE)  # they take several times as much memory as codes
        pieces = max(1, round(numel / most))
        rows = 1 if whole else world_size
        edges = row_edges(numel, pieces * rows, blocks)
        return [(index, whole, edges[at * rows : (at + 1) * rows + 1]) for at in range(pieces)]

    def _joined(self, chunks: Sequence[tuple[int, bool, tuple[int, ...]]], most: int) -> list[Cut]:
        """Chunks of groups into pieces of about `most` elements; floats weigh as much as they are cut finer."""
        pieces: list[list[tuple[int, bool, tuple[int, ...]]]] = []
        held = 0
        for chunk in chunks:
            weight = 1 if chunk[0] < len(self.coded) else max(most // PIECE, 1)
            size = (chunk[2][-1] - chunk[2][0]) * weight
            if not pieces or held + size > most * 3 // 2:
                pieces.append([])
                held = 0
            pieces[-1].append(chunk)
            held += size
        return [
            Cut(
                tuple((index, edges) for index, whole, edges in piece if whole),
                tuple((index, edges) for index, whole, edges in piece if not whole),
            )
            for piece in pieces
        ]

    def clipped(self, begin: int, end: int) -> "Bucket":
        """What lies in elements [begin, end) of the buffer, as a bucket of a buffer of its own."""
        if (begin, end) not in self._clipped:
            self._clipped[begin, end] = Bucket([(layers.clipped(begin, end), codec) for layers, codec in self._groups])
        return self._clipped[begin, end]


def check_exchange(exchange: str) -> None:
    """Raise a ValueError unless it is one of EXCHANGES."""
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")


def code_bytes(codec: IntegerCodec, numel: int, world_size: int) -> tuple[int, int]:
    """Bytes that each rank sends for so many codes, whole and in rows: to choose by."""
    low, high = codec.alphabet
    up, row = packing_for(low, high), -(-numel // world_size)
    back = packing_for(low * world_size, high * world_size).nbytes(row)
    if (narrow := codec.narrowing(world_size)) is not None:
        back = narrow.nbytes(row)
    others = (world_size - 1) * codec.planes
    return others * up.nbytes(numel), others * (up.nbytes(row) + back)


def piece_for(chunk_nbytes: int | None) -> int:
    """Elements of a piece on a link whose rate fills chunks of so many bytes; None: the link was not measured.

    Small pieces overlap more, and cost more messages. Measured with TernGrad, 4 ranks on 2 cores, 12.6 M parameters: at
    100 Mbit/s (chunks of 20 kB) a step takes 600 ms in pieces of a million elements, 635 in pieces of two million; at
    1 Gbit/s 249 and 222; without a limit 231, 202, and 191 in pieces of eight million.
    """
    if chunk_nbytes is None:
        return 2 * PIECE
    return PIECE if chunk_nbytes < 1 << 16 else 2 * PIECE if chunk_nbytes < 1 << 20 else 8 * PIECE
