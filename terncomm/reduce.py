"""The path of one bucket: measure, share, encode, exchange, decode.

1. `codec.measure`: this rank's clip limit and scale of each layer.
2. `share`: the largest scale over ranks, and a check that all ranks are at the same place.
3. encode and pack: small integers, a fused kernel where one is bit-equal to the two steps.
4. `exchange.run`: the exact sum of the integers over ranks.
5. unpack and decode: one multiplication, back into the buffer.

What travels exactly is averaged beside it, in rank order. Everything here is straight-line blocking code; where it
runs is the hook's business.
"""

import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.profiler import record_function

from terncomm import exchange as exchanges
from terncomm import ops
from terncomm.codecs.base import Codec
from terncomm.keys import Key
from terncomm.segments import Segments
from terncomm.transports.base import Transport

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HEADER = struct.Struct("<qqqqqII")  # the fields of Header
_PROLOGUE_NBYTES = 256
_JOINING = -(1 << 62)  # in place of a step
_INLINE = (_PROLOGUE_NBYTES - _HEADER.size) // 4  # scales that fit beside the header
_NONE = Segments(())
_ALONG = 1 << 17  # elements that travel exactly, and in the same messages as the codes
_LARGE = 1 << 20  # elements of a layer that travels exactly and, between others, on its own


class Header(NamedTuple):
    """Where a rank is and what it is about to send; equal on all ranks, or it is an error."""

    seed: int
    step: int
    bucket: int
    elements: int
    coded_elements: int
    configuration: int  # a checksum of codec, exchange and dtype
    layers: int  # a checksum of which elements are which layer


class RanksDiffer(RuntimeError):
    """Ranks came to the same exchange with different seeds, steps, buckets, codecs or layers."""


class Unchecked(NamedTuple):
    """Headers that are still on their way from a CUDA device; :meth:`check` once `arrived` says so."""

    rank: int
    headers: torch.Tensor  # (W, _HEADER.size) uint8 on the host
    event: torch.cuda.Event | None

    def arrived(self) -> bool:
        """Whether the headers can be read without waiting."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def check(self) -> None:
        """Raise `RanksDiffer` unless all headers are alike."""
        headers = [Header(*_HEADER.unpack(bytes(row.tolist()))) for row in self.headers]
        if any(header != headers[self.rank] for header in headers):
            raise RanksDiffer(_difference(headers, self.rank))


class Clock:
    """Seconds spent in each phase of the path, and the phase it is in.

    A phase inside another is counted for itself alone. Each is a range in profiles, "terncomm encode, bucket 3".
    """

    def __init__(self) -> None:
        self.encode_s = self.exchange_s = self.decode_s = 0.0
        self.phase = ""  # after an error: the phase in which it came
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str, key: Key, part: str = "") -> Iterator[None]:
        """Add the time inside to `<phase>_s`. part: a narrower name, for profiles."""
        outer = self.phase
        self._enter(phase)
        with record_function(f"terncomm {part or phase}, bucket {key.bucket}"):
            yield
        self._enter(outer)

    def _enter(self, phase: str) -> None:
        now = time.perf_counter()
        if self.phase:
            name = f"{self.phase}_s"
            setattr(self, name, getattr(self, name) + now - self._since)
        self.phase, self._since = phase, now


@lru_cache(maxsize=1024)
def _checksums(
    codec: Codec | None, segments: Segments, exact: Segments, dtype: torch.dtype, exchange: str
) -> tuple[int, int]:
    spans = sorted(zip(*torch.cat([segments.table[:2], exact.table[:2]], dim=1).tolist(), strict=True))
    for (offset, size), (following, _) in pairwise(spans):
        if offset + size > following:
            raise ValueError(f"a layer is both coded and exact: elements from {following} on are in two pieces")
    layers = f"{segments.table.tolist()} {exact.table.tolist()}"
    return zlib.crc32(f"{codec!r} {dtype} {exchange}".encode()), zlib.crc32(layers.encode())


def _prologue(header: Header, device: torch.device) -> torch.Tensor:
    message = torch.zeros(_PROLOGUE_NBYTES, dtype=torch.uint8)
    message[: _HEADER.size] = torch.frombuffer(bytearray(_HEADER.pack(*header)), dtype=torch.uint8)
    return message.to(device)


def joined(number: int, transport: Transport, device: torch.device) -> list[int]:
    """A number from every rank that joins: like the first message of a bucket, so that a rank which reduces is told.

    Raises:
        RanksDiffer: some ranks reduce gradients meanwhile. They raise it too, in :func:`share`.
    """
    received = transport.all_gather(_prologue(Header(0, _JOINING, 0, number, 0, 0, 0), device)).cpu()
    headers = [Header(*_HEADER.unpack(bytes(row[: _HEADER.size].tolist()))) for row in received]
    if any(header.step != _JOINING for header in headers):
        raise RanksDiffer(_difference(headers, transport.rank))
    return [header.elements for header in headers]


def share(
    local: torch.Tensor, header: Header, transport: Transport, later: list[Unchecked] | None = None
) -> torch.Tensor:
    """(L,) float32 local scales -> their maximum over ranks, (L,) float32, once all ranks proved to be in step.

    The first message has one size whatever the layers are: the header, and the scales where they fit. More scales
    follow in a message of their own: by all-gather while that is small, else in two phases.

    With `later`, nothing waits for the host: where headers differ all scales become +inf, so that every rank gets
    non-finite gradients, and the headers are appended to be checked when they have arrived.

    Raises:
        RanksDiffer: a rank sent another header. Every rank raises, naming both sides.
    """
    message = _prologue(header, local.device)
    inline = slice(_HEADER.size, _HEADER.size + 4 * len(local) if len(local) <= _INLINE else _HEADER.size)
    message[inline] = local.view(torch.uint8)[: inline.stop - inline.start]
    received = transport.all_gather(message)
    headers = received[:, : _HEADER.size]
    if later is None:
        Unchecked(transport.rank, headers.cpu(), None).check()
        return _shared(local, received[:, inline], transport)
    event = torch.cuda.Event() if headers.is_cuda else None  # type: ignore[no-untyped-call]
    later.append(Unchecked(transport.rank, headers.to("cpu", non_blocking=True), event))
    if event is not None:
        event.record()
    shared = _shared(local, received[:, inline], transport)
    return torch.where((headers != message[: _HEADER.size]).any(), torch.inf, shared)


def _shared(local: torch.Tensor, inline: torch.Tensor, transport: Transport) -> torch.Tensor:
    """The maximum over ranks, of scales that came with the prologue, `inline` (W, 4 L), or that are sent now."""
    if len(local) <= _INLINE:
        return inline.contiguous().view(torch.float32).amax(dim=0)
    if transport.world_size * local.numel() * 4 <= exchanges.SMALL:
        return transport.all_gather(local.view(torch.uint8)).view(torch.float32).amax(dim=0)
    return exchanges.all_reduce_max(local, transport)


_DIFFERENCES = {
    "elements": "a bucket of {0} elements here, of {1} there (bucket_cap_mb and the model must be equal on all ranks)",
    "configuration": "another codec, exchange or dtype",
    "layers": "other layers, or other layers coded",
}


def _difference(headers: list[Header], rank: int) -> str:
    mine = headers[rank]
    joining = [header.step == _JOINING for header in headers]
    if any(joining) and not all(joining):
        new, old = (", ".join(str(r) for r, joins in enumerate(joining) if joins == side) for side in (True, False))
        return (
            f"ranks are not in step. Rank {new} begins with new parameters, types or options, and rank {old} reduces "
            "gradients as before: every rank must give the same in every call."
        )
    other = next(r for r, header in enumerate(headers) if header != mine)
    told = [
        _DIFFERENCES.get(name, name.replace("_", " ") + " {0} here, {1} there").format(here, there)
        for name, here, there in zip(Header._fields, mine, headers[other], strict=True)
        if here != there
    ]
    return (
        f"ranks are not in step. Rank {rank} (here) and rank {other} (there): {'; '.join(told)}. Every rank must use "
        "the same codec and options, switch it on and off at the same step, and run the same backward passes."
    )


def all_reduce_mean(
    flat: torch.Tensor,
    segments: Segments,
    codec: Codec | None,
    transport: Transport,
    *,
    key: Key | int,
    exchange: str = "auto",
    exact: Segments = _NONE,
    clock: Clock | None = None,
    later: list[Unchecked] | None = None,
) -> torch.Tensor:
    """Replace the described elements of `flat` by an estimate of their mean over ranks; the same bits on every rank.

    Args:
        flat: (n,) contiguous floats of any type, changed in place. Codes are made of the values as float32.
        segments: the layers that are coded, one scale each or finer, as the codec has it.
        codec: how; `None` only where `segments` is empty.
        transport: this rank's; every rank calls with the same arguments but `flat`.
        key: seed and step of the rounding noise; an int is `Key(seed)`. Use another step, or seed, in every call.
        exchange: "auto", "gather" or "two_phase"; all give the same bits.
        exact: layers that are averaged without a codec.
        clock: adds up the time of the phases (on CUDA, of enqueueing them).
        later: for CUDA, where checking the other ranks' headers at once would stall the device; see :func:`share`.

    Returns:
        flat.

    Raises:
        ValueError: the segments do not fit the buffer, or an unknown exchange.
        TypeError: `flat` is not of one of DTYPES.
        RanksDiffer: ranks called with different arguments.

    >>> from terncomm import Ternary
    >>> from terncomm.transports import LocalTransport
    >>> def work(transport):
    ...     gradient = torch.full((4,), 0.5)
    ...     return all_reduce_mean(gradient, Segments([4]), Ternary(clip=None), transport, key=0).tolist()
    >>> LocalTransport.run(2, work)
    [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
    """
    if flat.dtype not in DTYPES:
        raise TypeError(f"gradients must be {', '.join(map(str, DTYPES))}, got {flat.dtype}")
    if exchange not in exchanges.ALGORITHMS:
        raise ValueError(f"exchange must be one of {', '.join(exchanges.ALGORITHMS)}, got {exchange!r}")
    segments.check(flat)
    exact.check(flat)
    if codec is None and len(segments):
        raise ValueError(f"{len(segments)} segments to be coded and no codec; give a codec, or name them in exact=")
    if codec is not None and not isinstance(codec, Codec):
        raise TypeError(f"codec must be a terncomm codec such as terncomm.Ternary(), got {codec!r}")
    key = key if isinstance(key, Key) else Key(key)
    clock = clock or Clock()
    rank, world_size = transport.rank, transport.world_size
    checksums = _checksums(codec, segments, exact, flat.dtype, exchange)
    header = Header(key.seed, key.step, key.bucket, flat.numel(), segments.numel, *checksums)

    scaled = codec.scaled(segments) if codec else _NONE
    with clock("encode", key, "measure"):
        local = codec.measure(flat, scaled) if codec else torch.zeros(0, device=flat.device)
    with clock("exchange", key, "share"):
        shared = share(local, header, transport, later)
        along = exact if segments.numel and exact.numel <= _ALONG else _NONE
        for part in () if along is exact else _parts(exact):
            part.put(exchanges.all_reduce_float_mean(part.take(flat), transport), flat)
    if codec is None or segments.numel == 0:
        return flat

    with clock("encode", key, "prepare"):
        returned = codec.narrowing(scaled, key, world_size=world_size)
        plan = exchanges.choose(exchange, scaled.numel, codec.alphabet, world_size, returned)
        how = codec.rounding(scaled, local, shared, key, rank=rank, world_size=world_size)

    def fill(row: int, out: torch.Tensor) -> None:
        with clock("encode", key):
            ops.encode_pack(flat, scaled, how, plan.packing, plan.rows[row], plan.packed_length, out[None])

    with clock("exchange", key):
        values = along.take(flat)
        pieces = exchanges.run(fill, plan, returned, transport, exchanges.FloatMean(values, world_size))
        along.put(values, flat)
    with clock("decode", key):
        unit = codec.unit(shared, world_size)
        for piece in pieces:
            piece.decode(scaled, unit, flat)
    return flat


def _parts(exact: Segments) -> list[Segments]:
    return exact.parts(_LARGE) if exact.numel else []


def messages(
    segments: Segments,
    codec: Codec | None,
    world_size: int,
    *,
    exchange: str = "auto",
    exact: Segments = _NONE,
    itemsize: int = 4,
) -> list[exchanges.Message]:
    """The transport's calls that :func:`all_reduce_mean` makes for such a bucket, in order, without making them.

    segments, codec, exchange, exact: as there. itemsize: bytes of an element of the buffer. For planning.
    """
    scaled = codec.scaled(segments) if codec else _NONE
    calls = [exchanges.Message("all_gather", _PROLOGUE_NBYTES)]
    if len(scaled) > _INLINE:
        few = world_size * len(scaled) * 4 <= exchanges.SMALL
        own = [exchanges.Message("all_gather", 4 * len(scaled))]
        calls += own if few else exchanges.max_messages(len(scaled), world_size)
    coded = codec is not None and segments.numel > 0
    along = coded and exact.numel <= _ALONG
    for part in [] if along else _parts(exact):
        calls += exchanges.float_messages(part.numel, itemsize, world_size)
    if codec is None or not coded:
        return calls
    returned = codec.narrowing(scaled, Key(0), world_size=world_size)
    plan = exchanges.choose(exchange, scaled.numel, codec.alphabet, world_size, returned)
    return calls + exchanges.messages(plan, returned, along=exact.numel if along else 0, itemsize=itemsize)


def exact_traffic(exact: Segments, itemsize: int, world_size: int) -> int:
    """Bytes that each rank sends for layers that are averaged without a codec."""
    return sum(exchanges.float_traffic(part.numel, itemsize, world_size) for part in _parts(exact))


def all_reduce_mean_sparse(
    gradient: torch.Tensor,
    transport: Transport,
    *,
    key: Key | int,
    clock: Clock | None = None,
    later: list[Unchecked] | None = None,
) -> torch.Tensor:
    """A sparse gradient -> the exact mean over ranks, the same bits on every rank.

    Args:
        gradient: sparse_coo of floats, with one or more sparse dimensions; ranks may hold other rows. Not modified.
        transport, key, clock, later: see :func:`all_reduce_mean`.

    Returns:
        A coalesced sparse_coo tensor with every row that some rank has. Rows are added in rank order.

    Raises:
        RanksDiffer: shapes or types differ, or ranks are not in step.
    """
    key = key if isinstance(key, Key) else Key(key)
    clock = clock or Clock()
    world_size = transport.world_size
    with clock("encode", key):
        mine = gradient.coalesce()
        indices, values = mine.indices(), mine.values()
        kind = zlib.crc32(f"{gradient.dtype} {tuple(gradient.shape)} {gradient.sparse_dim()}".encode())
        header = Header(key.seed, key.step, key.bucket, gradient.numel(), 0, kind, 0)
        count = torch.tensor([indices.shape[1]], dtype=torch.int64, device=gradient.device)
    with clock("exchange", key):
        share(torch.zeros(0, device=gradient.device), header, transport, later)
        counts = transport.all_gather(count.view(torch.uint8)).view(torch.int64).flatten().tolist()
        rows = [_gather_padded(part, max(counts), transport) for part in (indices.T, values)]
    with clock("decode", key):
        everywhere = torch.cat([rows[0][rank, :count] for rank, count in enumerate(counts)])
        together, place = torch.unique(everywhere, dim=0, return_inverse=True)
        wide = torch.promote_types(values.dtype, torch.float32)
        total = torch.zeros(len(together), *values.shape[1:], dtype=wide, device=gradient.device)
        for rank, where in enumerate(place.split(counts)):
            total.index_add_(0, where, rows[1][rank, : counts[rank]].to(wide))
        mean = (total / world_size).to(values.dtype)
    return torch.sparse_coo_tensor(together.T, mean, gradient.shape, is_coalesced=True, check_invariants=False)


def _gather_padded(part: torch.Tensor, length: int, transport: Transport) -> torch.Tensor:
    """(k, ...) with k <= length -> (W, length, ...), zeros where a rank has less."""
    padded = part.new_zeros(length, *part.shape[1:])
    padded[: len(part)] = part
    received = transport.all_gather(padded.view(-1).view(torch.uint8))
    return received.view(part.dtype).view(transport.world_size, *padded.shape)
