"""The header of a bucket: every rank says where it is and what it is about to send, and a difference is an error."""

import struct
from typing import NamedTuple

import torch

PROLOGUE_NBYTES = 256  # of the first message, whatever the layers are: so ranks that differ can tell
_HEADER = struct.Struct("<qqqqqII")  # the fields of Header
INLINE_NBYTES = PROLOGUE_NBYTES - _HEADER.size  # for statistics beside the header
_JOINING = -(1 << 62)  # in place of a step


class Header(NamedTuple):
    """Where a rank is and what it is about to send; equal on all ranks, or it is an error."""

    seed: int
    step: int
    bucket: int
    elements: int
    coded_elements: int
    configuration: int  # a checksum of codecs, exchange and dtype
    layers: int  # a checksum of which elements are which layer

    @classmethod
    def joining(cls, number: int) -> "Header":
        """In place of a bucket's header, from a rank that begins with new parameters or options."""
        return cls(0, _JOINING, 0, number, 0, 0, 0)

    def prologue(self, device: torch.device) -> torch.Tensor:
        """(PROLOGUE_NBYTES,) uint8: the header, and zeros where statistics may follow."""
        message = torch.zeros(PROLOGUE_NBYTES, dtype=torch.uint8)
        message[: _HEADER.size] = torch.frombuffer(bytearray(_HEADER.pack(*self)), dtype=torch.uint8)
        return message.to(device)


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
        same(self.headers, self.rank)


def read(received: torch.Tensor) -> list[Header]:
    """(W, at least the header's size) uint8 on the host -> the headers."""
    return [Header(*_HEADER.unpack(bytes(row[: _HEADER.size].tolist()))) for row in received]


def same(received: torch.Tensor, rank: int) -> None:
    """Compare all ranks' prologues, (W, k) uint8 on the host.

    Raises:
        RanksDiffer: a rank sent another header. The message names both sides.
    """
    headers = read(received)
    if any(header != headers[rank] for header in headers):
        raise RanksDiffer(_difference(headers, rank))


def numbers_of_joining(received: torch.Tensor, rank: int) -> list[int]:
    """The number that each rank has sent by :meth:`Header.joining`.

    Raises:
        RanksDiffer: some ranks reduce gradients meanwhile.
    """
    headers = read(received)
    if any(header.step != _JOINING for header in headers):
        raise RanksDiffer(_difference(headers, rank))
    return [header.elements for header in headers]


def check(received: torch.Tensor, mine: torch.Tensor, rank: int, later: list[Unchecked] | None) -> torch.Tensor | None:
    """Compare all ranks' prologues (W, k) with `mine` (k,).

    later: None to compare at once. Else nothing waits for the host: the headers are appended to be checked when they
    have arrived, and the answer is a scalar on the device, whether they differ.

    Raises:
        RanksDiffer: see :func:`same`.
    """
    headers = received[:, : _HEADER.size]
    if received.is_meta:
        return None
    if later is None:
        same(headers.cpu(), rank)
        return None
    event = torch.cuda.Event() if headers.is_cuda else None  # type: ignore[no-untyped-call]
    later.append(Unchecked(rank, headers.to("cpu", non_blocking=True), event))
    if event is not None:
        event.record()
    return (headers != mine[: _HEADER.size]).any()


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
