"""Numba kernels for CPU tensors, bit-equal to :mod:`terncomm.ops.reference`; the same names and arguments.

Work is cut into pieces at block edges and handed to as many threads as torch was given; every piece computes the
same bits wherever it is cut. Importing this module compiles what Numba's on-disk cache lacks.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from terncomm.ops import _numba as kernels
from terncomm.ops.types import Packing, Rounding
from terncomm.segments import Segments

_PIECE = 1 << 18  # least number of elements worth a thread


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="terncomm-ops")


def _in_pieces(work: Callable[[int, int], None], count: int, unit: int, elements: int = 1) -> None:
    """Call work(begin, end) over `count` items of `elements` each, cut at multiples of `unit`, in torch's threads."""
    threads = min(torch.get_num_threads(), count * elements // _PIECE)
    if threads <= 1:
        work(0, count)
        return
    step = -(-count // (threads * unit)) * unit
    bounds = [(at, min(at + step, count)) for at in range(0, count, step)]
    list(_pool(torch.get_num_threads()).map(lambda bound: work(*bound), bounds))


def _layout(segments: Segments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return segments.offsets.numpy(), segments.starts.numpy(), segments.bases.numpy()


def _factors(how: Rounding) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.int32]:
    keys = how.keys.numpy().astype(np.uint32)
    return how.limit.numpy(), how.lift.numpy(), how.scale.numpy(), keys, np.int32(how.levels << 24)


def peaks(flat: torch.Tensor, segments: Segments) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.peaks`."""
    out = torch.empty(len(segments), dtype=torch.int32)
    bits, offsets, sizes, target = flat.view(torch.int32).numpy(), *_rows(segments), out.numpy()
    mean_size = segments.numel // max(len(segments), 1)
    _in_pieces(lambda begin, end: kernels.peaks(bits, offsets, sizes, begin, end, target), len(segments), 1, mean_size)
    return out.view(torch.float32)


def _rows(segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    return segments.offsets.numpy(), segments.lengths.numpy()


def moments(flat: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`terncomm.ops.reference.moments`."""
    chunks = segments.blocks(kernels.CHUNK)
    firsts = torch.zeros(len(segments) + 1, dtype=torch.int64)
    torch.cumsum((segments.lengths + kernels.CHUNK - 1) // kernels.CHUNK, 0, out=firsts[1:])
    tops = np.empty(len(chunks), np.int32)
    sums, squares = np.empty(len(chunks)), np.empty(len(chunks))
    values, bits = flat.numpy(), flat.view(torch.int32).numpy()
    begins, sizes = _rows(chunks)
    _in_pieces(
        lambda begin, end: kernels.chunk_moments(bits, values, begins, sizes, begin, end, tops, sums, squares),
        len(chunks),
        1,
        kernels.CHUNK,
    )
    peak = torch.empty(len(segments), dtype=torch.int32)
    total, square = torch.empty(len(segments), dtype=torch.float64), torch.empty(len(segments), dtype=torch.float64)
    kernels.combine_moments(firsts.numpy(), tops, sums, squares, peak.numpy(), total.numpy(), square.numpy())
    return peak.view(torch.float32), total, square


def encode(flat: torch.Tensor, segments: Segments, how: Rounding) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.encode`."""
    out = torch.empty(segments.numel, dtype=torch.int8)
    _encode_bytes(flat, segments, how, 0, segments.numel, 0, out.view(torch.uint8))
    return out


def _encode_bytes(
    flat: torch.Tensor, segments: Segments, how: Rounding, begin: int, end: int, bias: int, out: torch.Tensor
) -> None:
    values, layout, target = flat.numpy(), _layout(segments), out.numpy()
    *factors, top = _factors(how)

    def work(low: int, high: int) -> None:
        piece = target[low:high]
        kernels.encode_bytes(values, *layout, *factors, top, begin + low, begin + high, np.int32(bias), piece)

    _in_pieces(work, end - begin, kernels.GROUP)


def encode_pack(
    flat: torch.Tensor, segments: Segments, how: Rounding, packing: Packing, begin: int, length: int, out: torch.Tensor
) -> None:
    """`reference.pack` of codes [begin, begin + length), padded with the code 0, into out (nbytes(length),) uint8."""
    end = max(begin, min(begin + length, segments.numel))
    if packing.digits == 1 and packing.word_bytes == 1:
        _encode_bytes(flat, segments, how, begin, end, -packing.low, out[: end - begin])
        out[end - begin :] = -packing.low
        return
    values, layout, target = flat.numpy(), _layout(segments), out.numpy()
    *factors, top = _factors(how)
    low, radix, digits, word = np.int32(packing.low), packing.radix, packing.digits, packing.word_bytes

    def work(first: int, last: int) -> None:
        piece = target[packing.nbytes(first) : packing.nbytes(last)]
        stop = max(begin + first, min(begin + last, end))
        kernels.encode_pack(
            values, *layout, *factors, top, begin + first, stop, last - first, low, radix, digits, word, piece
        )

    _in_pieces(work, length, kernels.GROUP * digits)


def pack(codes: torch.Tensor, how: Packing) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.pack`."""
    out = torch.empty(how.nbytes(len(codes)), dtype=torch.uint8)
    source, target = codes.to(torch.int32).numpy(), out.numpy()

    def work(begin: int, end: int) -> None:
        piece = target[how.nbytes(begin) : how.nbytes(end)]
        kernels.pack(source[begin:end], np.int32(how.low), how.radix, how.digits, how.word_bytes, piece)

    _in_pieces(work, len(codes), kernels.GROUP * how.digits)
    return out


def unpack_sum(rows: torch.Tensor, how: Packing, count: int) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.unpack_sum`."""
    out = torch.empty(count, dtype=torch.int32)
    source, target = rows.numpy(), out.numpy()

    def work(begin: int, end: int) -> None:
        piece = np.ascontiguousarray(source[:, how.nbytes(begin) : how.nbytes(end)])
        kernels.unpack_sum(piece, np.int32(how.low), how.radix, how.digits, how.word_bytes, target[begin:end])

    _in_pieces(work, count, kernels.GROUP * how.digits)
    return out


def decode(totals: torch.Tensor, segments: Segments, unit: torch.Tensor, begin: int, out: torch.Tensor) -> None:
    """See :func:`terncomm.ops.reference.decode`."""
    offsets, starts, _ = _layout(segments)
    source, factors, target = totals.numpy(), unit.numpy(), out.numpy()

    def work(low: int, high: int) -> None:
        kernels.decode(source[low:high], offsets, starts, factors, begin + low, begin + high, target)

    _in_pieces(work, len(totals), kernels.GROUP)


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
    """See :func:`terncomm.ops.reference.unpack_decode`."""
    offsets, starts, _ = _layout(segments)
    source, factors, target = rows.numpy(), unit.numpy(), out.numpy()

    def work(first: int, last: int) -> None:
        piece = source[:, how.nbytes(first) : how.nbytes(last)]
        kernels.unpack_decode(
            np.ascontiguousarray(piece), np.int32(how.low), how.radix, how.digits, how.word_bytes,
            offsets, starts, factors, begin + first, min(begin + last, end), last - first, target,
        )  # fmt: skip

    _in_pieces(work, length, kernels.GROUP * how.digits)


def narrow(totals: torch.Tensor, window: Segments, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`terncomm.ops.reference.narrow`."""
    codes = torch.empty(len(totals), dtype=torch.uint8)
    divisors = torch.empty(len(window), dtype=torch.int32)
    _, starts, bases = _layout(window)
    words = keys.numpy().astype(np.uint32)
    kernels.narrow(totals.numpy(), starts, bases, words, codes.numpy(), divisors.numpy())
    return codes, divisors


def widen(codes: torch.Tensor, window: Segments, divisor: torch.Tensor) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.widen`."""
    out = torch.empty(len(codes), dtype=torch.int32)
    kernels.widen(codes.numpy(), window.starts.numpy(), divisor.to(torch.int32).numpy(), out.numpy())
    return out
