"""The header of a bucket: before ranks send gradients, they compare step, bucket, sizes and options."""

import struct
from typing import NamedTuple

import torch

from terncomm.path.account import Context

PROLOGUE_NBYTES = 256  # of the first message; fixed, so that ranks with different layers can compare headers
_HEADER = struct.Struct("<qqqqqIII")  # the fields of Header
_COMPARED_NBYTES = _HEADER.size - 4  # all fields but the last
INLINE_NBYTES = PROLOGUE_NBYTES - _HEADER.size  # room for statistics after the header
_NO_STEP = -(1 << 62)  # in place of the step, in a header that belongs to no bucket


class Header(NamedTuple):
    """Where a rank is and what it is about to send. Must be equal on all ranks, except `rhythm`."""

    seed: int
    step: int
    bucket: int
    elements: int
    coded_elements: int
    configuration: int  # a checksum of codecs, exchange and dtype
    layers: int  # a checksum of which elements are which layer
    rhythm: int = 0  # of the backward passes, see terncomm.hooks.rhythm

    @classmethod
    def carrying(cls, number: int) -> "Header":
        """A header that carries `number`; sent by a rank that begins with new parameters or options."""
        return cls(0, _NO_STEP, 0, number, 0, 0, 0)

    def prologue(self, device: torch.device) -> torch.Tensor:
        """(PROLOGUE_NBYTES,) uint8: the header, and zeros where statistics may follow."""
        message = torch.zeros(PROLOGUE_NBYTES, dtype=torch.uint8)
        message[: _HEADER.size] = torch.frombuffer(bytearray(_HEADER.pack(*self)), dtype=torch.uint8)
        return message.to(device)


class RanksDiffer(RuntimeError):
    """Ranks called the same reduction with different seeds, steps, buckets, codecs or layers."""


class Unchecked(NamedTuple):
    """Headers that are being copied from a CUDA device. Call :meth:`check` once :meth:`arrived` returns True."""

    rank: int
    headers: torch.Tensor  # (W, _HEADER.size) uint8 on the host
    event: torch.cuda.Event | None

    def arrived(self) -> bool:
        """Whether the headers can be read without waiting."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def check(self) -> list[int]:
        """Raise `RanksDiffer` unless all headers are equal. Returns each rank's `rhythm`."""
        return same(self.headers, self.rank)


def read(received: torch.Tensor) -> list[Header]:
    """Parse the headers of all ranks: (W, k) uint8 on the host, k at least the size of a header."""
    return [Header(*_HEADER.unpack(bytes(row[: _HEADER.size].tolist()))) for row in received]


def same(received: torch.Tensor, rank: int) -> list[int]:
    """Compare all ranks' prologues, (W, k) uint8 on the host. Returns each rank's `rhythm`.

    Raises:
        RanksDiffer: a rank sent a different header. The message says what differs.
    """
    headers = read(received)
    if any(header[:-1] != headers[rank][:-1] for header in headers):
        raise RanksDiffer(_difference(headers, rank))
    return [header.rhythm for header in headers]


def carried_numbers(received: torch.Tensor, rank: int) -> list[int]:
    """The number that each rank has sent with :meth:`Header.carrying`, in rank order.

    Raises:
        RanksDiffer: some ranks sent the header of a bucket instead: they are reducing gradients.
    """
    headers = read(received)
    if any(header.step != _NO_STEP for header in headers):
        raise RanksDiffer(_difference(headers, rank))
    return [header.elements for header in headers]


def check(
    received: torch.Tensor, mine: torch.Tensor, ctx: Context, unchecked: list[Unchecked] | None
) -> torch.Tensor | None:
    """Compare all ranks' prologues (W, k) with `mine` (k,), and note the ranks' rhythms in the account.

    unchecked: None: compare now and return None. A list: do not wait for the device; the headers are appended to it,
    to be checked when they have arrived on the host. Then returns a bool scalar on the device: whether they differ.

    Raises:
        RanksDiffer: see :func:`same`.
    """
    headers = received[:, : _HEADER.size]
    if received.is_meta:
        return None
    if unchecked is None:
        ctx.account.rhythms = same(headers.cpu(), ctx.rank)
        return None
    event = torch.cuda.Event() if headers.is_cuda else None  # type: ignore[no-untyped-call]
    unchecked.append(Unchecked(ctx.rank, headers.to("cpu", non_blocking=True), event))
    if event is not None:
        event.record()
    return (headers[:, :_COMPARED_NBYTES] != mine[:_COMPARED_NBYTES]).any()


_DIFFERENCES = {
    "elements": "a bucket of {0} elements here, of {1} there (bucket_cap_mb and the model must be equal on all ranks)",
    "configuration": "another codec, exchange or dtype",
    "layers": "different layers, or a different choice of coded layers",
}


def _difference(headers: list[Header], rank: int) -> str:
    headers = [header._replace(rhythm=0) for header in headers]  # it may differ
    mine = headers[rank]
    begins = [header.step == _NO_STEP for header in headers]
    if any(begins) and not all(begins):
        new, old = (", ".join(str(r) for r, new in enumerate(begins) if new == side) for side in (True, False))
        return (
            f"ranks are not in step. Rank {new} begins with new parameters, types or options, and rank {old} reduces "
            "gradients as before: every rank must pass the same parameters and options in every call."
        )
    other = next(r for r, header in enumerate(headers) if header != mine)
    told = [
        _DIFFERENCES.get(name, name.replace("_", " ") + " {0} here, {1} there").format(here, there)
        for name, here, there in zip(Header._fields, mine, headers[other], strict=True)
        if here != there
    ]
    return (
        f"ranks are not in step. Rank {rank} (here) and rank {other} (there): {'; '.join(told)}. Every rank must use "
        "the same codec and options, call enable() and disable() at the same step, and run the same backward passes."
    )
