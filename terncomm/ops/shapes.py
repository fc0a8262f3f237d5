"""The back end of device type "meta". Its kernels return meta tensors of the right shape and dtype, without values.

The path of a bucket runs with them on meta tensors, which counts its messages without sending any. A kernel that only
writes to `out` does nothing. Names and arguments are those of :mod:`terncomm.ops.reference`.
"""

from collections.abc import Sequence

import torch

from terncomm.ops.types import Packing, Rounding
from terncomm.segments import Segments


def _empty(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def peaks(flat: torch.Tensor, segments: Segments) -> torch.Tensor:
    """(L,) float32."""
    return _empty(len(segments), torch.float32)


def moments(flat: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(L,) float32, (L,) float64 and (L,) float64."""
    count = len(segments)
    return _empty(count, torch.float32), _empty(count, torch.float64), _empty(count, torch.float64)


def clip_limit(peak: torch.Tensor) -> torch.Tensor:
    """(L,) float32."""
    return torch.empty_like(peak)


def encode(flat: torch.Tensor, segments: Segments, how: Rounding) -> torch.Tensor:
    """(n,) int8."""
    return _empty(segments.numel, torch.int8)


def encode_pack(
    flat: torch.Tensor,
    segments: Segments,
    how: Rounding,
    packing: Packing,
    edges: Sequence[int],
    length: int,
    out: torch.Tensor,
) -> None:
    """Does nothing: the kernel only writes to `out`."""


def pack(codes: torch.Tensor, how: Packing, out: torch.Tensor | None = None) -> torch.Tensor:
    """(nbytes,) uint8."""
    return _empty(how.nbytes(len(codes)), torch.uint8) if out is None else out


def unpack_sum(rows: torch.Tensor, how: Packing, count: int) -> torch.Tensor:
    """(count,) int32."""
    return _empty(count, torch.int32)


def decode(totals: torch.Tensor, segments: Segments, unit: torch.Tensor, begin: int, out: torch.Tensor) -> None:
    """Does nothing: the kernel only writes to `out`."""


def unpack_decode(
    rows: torch.Tensor,
    how: Packing,
    segments: Segments,
    unit: torch.Tensor,
    begin: int,
    end: int,
    length: int,
    out: torch.Tensor,
) -> None:
    """Does nothing: the kernel only writes to `out`."""


def decode_rows(
    rows: torch.Tensor,
    how: Packing,
    segments: Segments,
    unit: torch.Tensor,
    edges: Sequence[int],
    length: int,
    out: torch.Tensor,
) -> None:
    """Does nothing: the kernel only writes to `out`."""


def narrow(totals: torch.Tensor, window: Segments, keys: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(m,) uint8 and (L,) int32."""
    return _empty(len(totals), torch.uint8), _empty(len(window), torch.int32)


def widen(codes: torch.Tensor, window: Segments, divisor: torch.Tensor, top: int) -> torch.Tensor:
    """(m,) int32."""
    return _empty(len(codes), torch.int32)
