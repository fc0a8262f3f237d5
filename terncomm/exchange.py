"""Adding integers across ranks, exactly: an all-reduce that never sees a float.

Two algorithms, bit-equal to each other on every rank. Bytes each rank sends for n codes, W ranks:

* `gather`: all ranks get all packed codes and add them. (W - 1) * packed(n).
* `two_phase`: row r of the codes goes to rank r, which adds and sends the packed sums of its row to everyone.
  (W - 1) * (packed(n / W) + packed sums(n / W)).

`auto` takes the one that sends fewer bytes, and `gather` where that costs at most SMALL bytes more, for it has one
message round less.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from terncomm import ops
from terncomm.segments import Segments
from terncomm.transports.base import Transport
from terncomm.wire import Packing, SumFormat, packing_for

ALGORITHMS = ("auto", "gather", "two_phase")
SMALL = 8192  # bytes; about what a message round of 1 ms moves at 100 Mbit/s
_PIECE = 1 << 16  # floats added at a time


ALL_REDUCE = "all_reduce"  # of floats, as DDP has it without a hook
ALL_REDUCE_HALF = "all_reduce_half"  # of float16: a processor takes longer to add these


class Message(NamedTuple):
    """One collective call: each rank sends `nbytes` to each other rank."""

    kind: str  # "all_gather" or "all_to_all", of a transport; else ALL_REDUCE or ALL_REDUCE_HALF, of a back end
    nbytes: int


def sent(messages: list[Message], world_size: int) -> int:
    """Bytes that each rank sends in these calls."""
    return sum((world_size - 1) * message.nbytes for message in messages)


@dataclass(frozen=True)
class Plan:
    """How the codes of W ranks travel: packed by `packing`, in rows that ranks own."""

    algorithm: str
    packing: Packing
    edges: tuple[int, ...]  # (W + 1,): rank r owns the dense elements [edges[r], edges[r + 1])

    @property
    def world_size(self) -> int:
        """W."""
        return len(self.edges) - 1

    @property
    def owned(self) -> list[tuple[int, int]]:
        """Dense [begin, end) of the row that each rank owns."""
        return list(zip(self.edges, self.edges[1:], strict=False))

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Dense [begin, end) of what is packed on its own: the rows of `two_phase`, or everything."""
        return [(0, self.edges[-1])] if self.algorithm == "gather" else self.owned

    @property
    def packed_length(self) -> int:
        """Codes in one packed row: those of the longest, the others are padded."""
        return max(end - begin for begin, end in self.rows)


def _plan(algorithm: str, numel: int, alphabet: tuple[int, int], world_size: int, returned: SumFormat | None) -> Plan:
    row = -(-numel // world_size)
    even = tuple(min(r * row, numel) for r in range(world_size + 1))
    return Plan(algorithm, packing_for(*alphabet), even if returned is None else returned.edges)


def traffic(
    algorithm: str, numel: int, alphabet: tuple[int, int], world_size: int, returned: SumFormat | None = None
) -> int:
    """Bytes that each rank sends for `numel` codes; `returned`: the format of the sums, if they are not exact."""
    return sent(messages(choose(algorithm, numel, alphabet, world_size, returned), returned), world_size)


def messages(plan: Plan, returned: SumFormat | None = None, *, along: int = 0, itemsize: int = 4) -> list[Message]:
    """The calls that :func:`run` makes, in order, with `along` floats of `itemsize` bytes that travel in them."""
    row = _float_row(along, itemsize, plan.world_size)
    floats = row * itemsize
    payload = (along - (plan.world_size - 1) * row) * itemsize
    codes = plan.packing.nbytes(plan.packed_length)
    if plan.algorithm == "gather":
        first = [Message("all_to_all", floats)] if floats else []
        return [*first, Message("all_gather", codes + payload)]
    sums = _sum_packing(plan).nbytes(plan.packed_length) if returned is None else returned.nbytes
    return [Message("all_to_all", codes + floats), Message("all_gather", sums + payload)]


def choose(
    algorithm: str, numel: int, alphabet: tuple[int, int], world_size: int, returned: SumFormat | None = None
) -> Plan:
    """The plan for these codes; `algorithm` is one of ALGORITHMS.

    Raises:
        ValueError: another algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"exchange must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if algorithm == "auto":
        gather = traffic("gather", numel, alphabet, world_size, returned)
        two_phase = traffic("two_phase", numel, alphabet, world_size, returned)
        algorithm = "gather" if gather <= two_phase or gather <= SMALL else "two_phase"
    return _plan(algorithm, numel, alphabet, world_size, returned)


def _sum_packing(plan: Plan) -> Packing:
    low, high = plan.packing.low, plan.packing.low + plan.packing.radix - 1
    return packing_for(low * plan.world_size, high * plan.world_size)


@dataclass(frozen=True)
class Piece:
    """Sums of dense elements [begin, end), as packed rows that add up to them or as totals."""

    begin: int
    end: int
    rows: torch.Tensor
    packing: Packing | None = None  # None: `rows` is (end - begin,) int32 totals
    packed_length: int = 0  # codes in each packed row, padding included

    def totals(self) -> torch.Tensor:
        """(end - begin,) int32."""
        if self.packing is None:
            return self.rows
        return ops.unpack_sum(self.rows, self.packing, self.packed_length)[: self.end - self.begin]

    def decode(self, segments: Segments, unit: torch.Tensor, out: torch.Tensor) -> None:
        """The totals times their segment's unit, to their places in `out`."""
        if self.packing is None:
            ops.decode(self.rows, segments, unit, self.begin, out)
        else:
            where = self.begin, self.end, self.packed_length
            ops.unpack_decode(self.rows, self.packing, segments, unit, *where, out)


class FloatMean:
    """The mean of floats over ranks, as two messages in which other things may travel too.

    Everyone sends row r to rank r, which adds in rank order and sends the mean of its row to all; the few elements that
    make no whole row everyone sends to all. So are all, where they fit one message. Same bits in every engine: added
    in float64 for float64 and else in float32, divided by W, then cast back.
    """

    def __init__(self, values: torch.Tensor, world_size: int) -> None:
        """values: (n,) contiguous floats, replaced by their mean in :meth:`finish`."""
        self._values = values
        self._row = _float_row(values.numel(), values.element_size(), world_size)
        self._whole = self._row * world_size
        self._world_size = world_size

    def rows(self) -> torch.Tensor:
        """(W, k) uint8: row r for rank r."""
        octets = self._row * self._values.element_size()
        return self._values[: self._whole].view(torch.uint8).view(self._world_size, octets)

    def payload(self, received: torch.Tensor) -> torch.Tensor:
        """The rows that came, (W, k) uint8 -> (m,) uint8 for everyone."""
        mean = ordered_mean(floats_of(received, self._values))
        return torch.cat([mean, self._values[self._whole :]]).view(torch.uint8)

    def finish(self, received: torch.Tensor) -> None:
        """Everyone's payload, (W, m) uint8 -> the mean, in place."""
        floats = floats_of(received, self._values)
        self._values[: self._whole].view(self._world_size, self._row).copy_(floats[:, : self._row])
        self._values[self._whole :] = ordered_mean(floats[:, self._row :])


def floats_of(octets: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(W, k) uint8 -> (W, m) of the type of `like`."""
    flat = octets.flatten()
    if flat.storage_offset() % like.element_size():
        flat = flat.clone()
    return flat.view(like.dtype).view(len(octets), octets.shape[1] // like.element_size())


def _float_row(numel: int, itemsize: int, world_size: int) -> int:
    """Elements of the row that a rank adds up; none if all go in one message."""
    return 0 if (world_size - 1) * numel * itemsize <= SMALL else numel // world_size


def run(
    fill: Callable[[int, torch.Tensor], None],
    plan: Plan,
    returned: SumFormat | None,
    transport: Transport,
    along: FloatMean,
) -> Iterator[Piece]:
    """This rank's codes -> the sums over ranks, piece by piece.

    fill: called with a row and its place, (k,) uint8, to pack the codes plan.rows[row] there.
    returned: the format in which sums travel back, `None` for exact.
    along: floats (n,), perhaps none, that travel in the same messages and are finished too.
    All collectives are done before the first piece.
    """
    owned, length = plan.owned, plan.packed_length
    nbytes = plan.packing.nbytes(length)
    floats = along.rows()
    if plan.algorithm == "gather":
        payload = along.payload(transport.all_to_all(floats) if floats.numel() else floats)
        message = payload.new_empty(nbytes + len(payload))
        fill(0, message[:nbytes])
        message[nbytes:] = payload
        received = transport.all_gather(message)
        along.finish(received[:, nbytes:])
        whole = Piece(0, plan.edges[-1], received[:, :nbytes], plan.packing, length)
        if returned is None:
            return iter([whole])
        totals = whole.totals()
        return (
            Piece(begin, end, returned.unpack(row, returned.pack(row, totals[begin:end])))
            for row, (begin, end) in enumerate(owned)
        )
    packed = floats.new_empty(plan.world_size, nbytes + floats.shape[1])
    for row in range(plan.world_size):
        fill(row, packed[row, :nbytes])
    packed[:, nbytes:] = floats
    received = transport.all_to_all(packed)
    del packed
    payload = along.payload(received[:, nbytes:])
    mine = ops.unpack_sum(received[:, :nbytes], plan.packing, length)
    del received
    if returned is not None:
        begin, end = owned[transport.rank]
        sums = transport.all_gather(torch.cat([returned.pack(transport.rank, mine[: end - begin]), payload]))
        nbytes = returned.nbytes
        along.finish(sums[:, nbytes:])
        return (Piece(b, e, returned.unpack(row, sums[row, :nbytes])) for row, (b, e) in enumerate(owned))
    packing = _sum_packing(plan)
    nbytes = packing.nbytes(length)
    sums = transport.all_gather(torch.cat([ops.pack(mine, packing), payload]))
    along.finish(sums[:, nbytes:])
    return (Piece(b, e, sums[row : row + 1, :nbytes], packing, length) for row, (b, e) in enumerate(owned))


def all_reduce(
    codes: torch.Tensor, alphabet: tuple[int, int], transport: Transport, *, algorithm: str = "auto"
) -> torch.Tensor:
    """Codes (n,) of any integer type, within the alphabet -> their exact sum over ranks, (n,) int32, on every rank.

    >>> from terncomm.transports import LocalTransport
    >>> codes = torch.tensor([1, 0, -1])
    >>> LocalTransport.run(2, lambda t: all_reduce(codes, (-1, 1), t).tolist())
    [[2, 0, -2], [2, 0, -2]]
    """
    plan = choose(algorithm, len(codes), alphabet, transport.world_size)
    length = plan.packed_length

    def fill(row: int, out: torch.Tensor) -> None:
        begin, end = plan.rows[row]
        out.copy_(ops.pack(torch.nn.functional.pad(codes[begin:end], (0, length - (end - begin))), plan.packing))

    nothing = FloatMean(torch.empty(0, device=codes.device), transport.world_size)
    return torch.cat([piece.totals() for piece in run(fill, plan, None, transport, nothing)])


def all_reduce_max(values: torch.Tensor, transport: Transport) -> torch.Tensor:
    """(n,) float32 without NaN -> the maximum over ranks, exact in any order; for many scales: 2 (W - 1) / W * 4 n."""
    length = -(-len(values) // transport.world_size)
    rows = torch.nn.functional.pad(values, (0, transport.world_size * length - len(values)))
    received = transport.all_to_all(rows.view(torch.uint8).view(transport.world_size, 4 * length))
    largest = received.view(torch.float32).amax(dim=0)
    return transport.all_gather(largest.view(torch.uint8)).view(torch.float32).flatten()[: len(values)]


def max_messages(numel: int, world_size: int) -> list[Message]:
    """The calls that :func:`all_reduce_max` makes for `numel` scales."""
    nbytes = 4 * -(-numel // world_size)
    return [Message("all_to_all", nbytes), Message("all_gather", nbytes)]


def all_reduce_float_mean(values: torch.Tensor, transport: Transport) -> torch.Tensor:
    """Replace (n,) contiguous floats by their mean over ranks; the bytes of a ring all-reduce. See :class:`FloatMean`.

    Takes as much memory as `values` have.
    """
    if transport.world_size > 1 and len(values):
        mean = FloatMean(values, transport.world_size)
        mean.finish(transport.all_gather(mean.payload(transport.all_to_all(mean.rows()))))
    return values


def float_messages(numel: int, itemsize: int, world_size: int) -> list[Message]:
    """The calls that :func:`all_reduce_float_mean` makes for `numel` floats."""
    if world_size == 1 or numel == 0:
        return []
    row = _float_row(numel, itemsize, world_size)
    payload = (numel - (world_size - 1) * row) * itemsize
    return [*([Message("all_to_all", row * itemsize)] if row else []), Message("all_gather", payload)]


def float_traffic(numel: int, itemsize: int, world_size: int) -> int:
    """Bytes that each rank sends for `numel` floats in :func:`all_reduce_float_mean`."""
    return sent(float_messages(numel, itemsize, world_size), world_size)


def ordered_mean(rows: torch.Tensor, divisor: float | None = None) -> torch.Tensor:
    """(W, m) floats -> (m,) of their type, added row by row, over W or `divisor`; in pieces, for sums may be wider."""
    mean = rows.new_empty(rows.shape[1])
    wide = torch.promote_types(rows.dtype, torch.float32)
    for begin in range(0, rows.shape[1], _PIECE):
        piece = rows[:, begin : begin + _PIECE]
        total = piece[0].to(wide, copy=True)
        for row in piece[1:]:
            total += row
        mean[begin : begin + _PIECE] = total / (len(rows) if divisor is None else divisor)
    return mean
