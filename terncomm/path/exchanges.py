"""Exchanges: how ranks send and add up parts. Each is a generator of messages, to be used with `yield from`.

Bytes that each of W ranks sends for a part; u: bytes of a packed row, b: bytes of a total:

* whole (`gather`): every rank sends its part to all ranks, and adds up what it received: (W - 1) u.
* in rows (`two_phase`): row r goes to rank r, which adds it up and sends the total to all ranks: (W - 1) (u + b).
* :func:`reduce_scatter`: row r goes to rank r, which adds it up and keeps the total: (W - 1) u.

All parts of a piece share its messages; each part begins at a multiple of 16 bytes. Before a message with parts of
varying length (:class:`terncomm.path.compressed.Varying`), ranks all-gather the lengths and use the maximum.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from terncomm.path.account import Context
from terncomm.path.compressed import Varying
from terncomm.path.message import Message, Path, Start
from terncomm.path.parts import Part
from terncomm.wire import aligned

_AHEAD = 2  # messages in flight in each direction before the oldest is waited for


class Piece(NamedTuple):
    """Parts that share messages. whole: sent whole to all ranks. rows: in W rows, row r for rank r."""

    whole: Sequence[Part]
    rows: Sequence[Part]


class _Columns:
    """Where each part lies in a row of a message."""

    def __init__(self, widths: Iterable[int]) -> None:
        self._slices = []
        at = 0
        for width in widths:
            self._slices.append(slice(at, at + width))
            at += aligned(width)
        self.nbytes = at

    def of(self, message: torch.Tensor) -> list[torch.Tensor]:
        """The slice of each part in a message of shape (..., nbytes)."""
        return [message[..., each] for each in self._slices]

    def empty(self, *rows: int, device: torch.device) -> torch.Tensor:
        """A new message, (*rows, nbytes) uint8. The padding between parts is zero; the parts are not initialized."""
        message = torch.empty(*rows, self.nbytes, dtype=torch.uint8, device=device)
        for each, following in zip(self._slices, [*self._slices[1:], slice(self.nbytes, None)], strict=True):
            message[..., each.stop : following.start] = 0
        return message


def all_reduce(pieces: Iterable[Piece], ctx: Context, device: torch.device, *, last: bool = True) -> Path[None]:
    """All-reduce the parts of each piece; the pieces are pipelined.

    The rows of piece i + 1 are sent before the rows of piece i are waited for. The totals of piece i are sent before
    the totals of piece i - 1 are waited for. So packing, both directions and unpacking overlap. At most four messages
    are in memory.

    last: mark the final message as the last one of the path.
    """
    up: deque[tuple[Piece, Any]] = deque()
    back: deque[tuple[Piece, _Columns, Any]] = deque()
    for piece, final in _marked(pieces):
        up.append((piece, (yield from _start_rows(piece.rows, ctx, device))))
        if len(up) == _AHEAD:
            back.append((yield from _sum_rows(*up.popleft(), ctx, device)))
        if len(back) == _AHEAD:
            yield from _finish(*back.popleft(), ctx)
        if final:
            while up:
                back.append((yield from _sum_rows(*up.popleft(), ctx, device, last=last and not up)))
    while back:
        yield from _finish(*back.popleft(), ctx)


def reduce_scatter(
    parts: Sequence[Part], ctx: Context, device: torch.device, *, clear: torch.Tensor | None = None, last: bool = True
) -> Path[None]:
    """Send row r of each part to rank r, which adds it up and keeps the total.

    clear: a buffer that is set to zero before the totals are written. last: see :func:`all_reduce`.
    """
    yield from _agree_on_lengths(parts, [], [], ctx, device)
    columns = _Columns(part.up_nbytes for part in parts)
    rows = _pack(parts, columns, ctx, device)
    received = yield Message("all_to_all", rows, last=last)
    del rows
    with ctx.phase("decode"):
        if clear is not None:
            clear.zero_()
        for part, column in zip(parts, columns.of(received), strict=True):
            part.store_sum(column)


def _marked(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, bool]]:
    """Each piece, and whether it is the last."""
    held: list[Piece] = []
    for piece in pieces:
        if held:
            yield held.pop(), False
        held.append(piece)
    for piece in held:
        yield piece, True


def _pack(parts: Sequence[Part], columns: _Columns, ctx: Context, device: torch.device) -> torch.Tensor:
    """Pack all parts into one message, (W, k) uint8; row r of it holds row r of every part."""
    rows = columns.empty(ctx.world_size, device=device)
    _fill(parts, columns.of(rows), ctx)
    return rows


def _fill(parts: Sequence[Part], places: Sequence[torch.Tensor], ctx: Context) -> None:
    """Pack each part into its place in a message, (rows, up_nbytes) uint8, and count its bytes."""
    for part, place in zip(parts, places, strict=True):
        with ctx.phase("encode"):
            if not place.is_meta:
                part.pack(place)
        ctx.count(part.label, part.up_nbytes)


def _agree_on_lengths(
    up: Sequence[Part], back: Sequence[Part], received: Sequence[torch.Tensor], ctx: Context, device: torch.device
) -> Path[None]:
    """Set the sizes of varying parts to the maximum over ranks. One all-gather; none if no part varies.

    up: parts whose rows are sent next; sets `up_nbytes`. back: parts whose rows arrived as `received`; sets
    `back_nbytes`.
    """
    ups = [part for part in up if isinstance(part, Varying)]
    backs = [(part, rows) for part, rows in zip(back, received, strict=True) if isinstance(part, Varying)]
    if not ups and not backs:
        return
    with ctx.phase("encode"):
        own = [part.prepare() for part in ups]
    with ctx.phase("exchange", "add"):
        own += [part.prepare_total(rows) for part, rows in backs]
    message = torch.tensor(own, dtype=torch.int32).view(torch.uint8).to(device)
    ctx.count("lengths", message.numel())
    lengths = (yield Message("all_gather", message)).view(torch.int32)
    longest = own if lengths.is_meta else lengths.amax(dim=0).tolist()
    for part, nbytes in zip(ups, longest[: len(ups)], strict=True):
        part.up_nbytes = nbytes
    for (part, _), nbytes in zip(backs, longest[len(ups) :], strict=True):
        part.back_nbytes = nbytes


def _start_rows(parts: Sequence[Part], ctx: Context, device: torch.device) -> Path[Any]:
    """Start to send row r of each part to rank r; returns the ticket, or None if there are no parts."""
    if not parts:
        return None
    yield from _agree_on_lengths(parts, [], [], ctx, device)
    rows = _pack(parts, _Columns(part.up_nbytes for part in parts), ctx, device)
    return (yield Start(Message("all_to_all", rows)))


def _sum_rows(
    piece: Piece, ticket: Any, ctx: Context, device: torch.device, last: bool = False
) -> Path[tuple[Piece, _Columns, Any]]:
    """Wait for the rows of a piece and add them up; start to send the totals and the whole parts to all ranks."""
    received = torch.empty(0) if ticket is None else (yield ticket)
    rows = _Columns(part.up_nbytes for part in piece.rows).of(received) if piece.rows else []
    yield from _agree_on_lengths(piece.whole, piece.rows, rows, ctx, device)
    sizes = [part.up_nbytes for part in piece.whole] + [part.back_nbytes for part in piece.rows]
    columns = _Columns(sizes)
    message = columns.empty(device=device)
    places = columns.of(message)
    _fill(piece.whole, [place[None] for place in places[: len(piece.whole)]], ctx)
    if piece.rows:
        with ctx.phase("exchange", "add"):
            for part, row, place in zip(piece.rows, rows, places[len(piece.whole) :], strict=True):
                if not place.is_meta:
                    part.combine(row, place)
                ctx.count(part.label, part.back_nbytes)
    return piece, columns, (yield Start(Message("all_gather", message, last=last)))


def _finish(piece: Piece, columns: _Columns, ticket: Any, ctx: Context) -> Path[None]:
    """Wait for the totals and whole parts of all ranks, and decode them."""
    received = yield ticket
    if received.is_meta:
        return
    with ctx.phase("decode"):
        places = columns.of(received)
        for part, place in zip(piece.whole, places[: len(piece.whole)], strict=True):
            part.store_sum(place)
        for part, place in zip(piece.rows, places[len(piece.whole) :], strict=True):
            part.unpack(place)
