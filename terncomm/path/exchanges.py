"""How parts travel between ranks: generators over parts, which `yield from` composes.

Bytes that each rank sends for a part, with u bytes of a packed row and b of a total, of W ranks:

* whole (`gather`): everyone gets what everyone has, and adds it up: (W - 1) u.
* in rows (`two_phase`): row r goes to rank r, which adds it up and sends the total to everyone: (W - 1) (u + b).
* :func:`reduce_scatter`: row r goes to rank r, which keeps the total: (W - 1) u.

The parts of a piece share its messages; each part begins at a multiple of 16 bytes. Before a message with parts whose
rows differ in length (:class:`terncomm.path.compressed.Varying`), all ranks gather the lengths of the longest.
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

_AHEAD = 2  # pieces whose rows are on their way before the first of them is waited for


class Piece(NamedTuple):
    """Parts that travel together."""

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
        """Each part's slice of a message, (..., nbytes)."""
        return [message[..., each] for each in self._slices]

    def empty(self, *rows: int, device: torch.device) -> torch.Tensor:
        """A message to be filled, zeros where no part lies."""
        message = torch.empty(*rows, self.nbytes, dtype=torch.uint8, device=device)
        for each, following in zip(self._slices, [*self._slices[1:], slice(self.nbytes, None)], strict=True):
            message[..., each.stop : following.start] = 0
        return message


def all_reduce(pieces: Iterable[Piece], ctx: Context, device: torch.device, *, last: bool = True) -> Path[None]:
    """Parts of each piece: from every rank, to every rank.

    The rows of the next piece are on their way before those of a piece are waited for, and its totals before the totals
    of the piece before: packing, both ways and unpacking overlap, and at most four messages are held.

    last: no message of the path follows.
    """
    up: deque[tuple[Piece, Any]] = deque()
    back: deque[tuple[Piece, _Columns, Any]] = deque()
    for piece, final in _marked(pieces):
        up.append((piece, (yield from _start_rows(piece.rows, ctx, device))))
        if len(up) == _AHEAD:
            back.append((yield from _turn(*up.popleft(), ctx, device)))
        if len(back) == _AHEAD:
            yield from _finish(*back.popleft(), ctx)
        if final:
            while up:
                back.append((yield from _turn(*up.popleft(), ctx, device, last=last and not up)))
    while back:
        yield from _finish(*back.popleft(), ctx)


def reduce_scatter(
    parts: Sequence[Part], ctx: Context, device: torch.device, *, clear: torch.Tensor | None = None, last: bool = True
) -> Path[None]:
    """Row r of each part to rank r, which keeps its total.

    clear: set to zero before the totals are put in their places.
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
            part.keep(column)


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
    """(W, k) uint8: row r of every part."""
    rows = columns.empty(ctx.world_size, device=device)
    _fill(parts, columns.of(rows), ctx)
    return rows


def _fill(parts: Sequence[Part], places: Sequence[torch.Tensor], ctx: Context) -> None:
    """Pack parts to their places in a message, each (rows, up_nbytes) uint8."""
    for part, place in zip(parts, places, strict=True):
        with ctx.phase("encode"):
            if not place.is_meta:
                part.pack(place)
        ctx.count(part.label, part.up_nbytes)


def _agree_on_lengths(
    up: Sequence[Part], back: Sequence[Part], received: Sequence[torch.Tensor], ctx: Context, device: torch.device
) -> Path[None]:
    """Of parts that vary: the largest row of any rank, of those that go up, and total, of those whose rows came."""
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
    """The rows of parts to their owners; a ticket, or None where there are none."""
    if not parts:
        return None
    yield from _agree_on_lengths(parts, [], [], ctx, device)
    rows = _pack(parts, _Columns(part.up_nbytes for part in parts), ctx, device)
    return (yield Start(Message("all_to_all", rows)))


def _turn(
    piece: Piece, ticket: Any, ctx: Context, device: torch.device, last: bool = False
) -> Path[tuple[Piece, _Columns, Any]]:
    """The rows of a piece have come: add them up, and send to everyone the totals, and what travels whole."""
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
    """Everyone's message of a piece has come: decode it."""
    received = yield ticket
    if received.is_meta:
        return
    with ctx.phase("decode"):
        places = columns.of(received)
        for part, place in zip(piece.whole, places[: len(piece.whole)], strict=True):
            part.keep(place)
        for part, place in zip(piece.rows, places[len(piece.whole) :], strict=True):
            part.unpack(place)
