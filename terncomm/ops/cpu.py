"""Numba kernels for CPU tensors, bit-equal to :mod:`terncomm.ops.reference`; the same names and arguments.

Work is cut into pieces at block edges and handed to as many threads as torch was given; every piece computes the
same bits wherever it is cut. Importing this module compiles what Numba's on-disk cache lacks.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

from terncomm.ops import _numba as kernels
from terncomm.ops.types import Packing, Rounding
from terncomm.segments import Segments

_PIECE = 1 << 18  # least number of elements worth a thread, and the most to unpack at a time
_SCRATCH = 1 << 15  # elements of another type that are made float32 at a time


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="terncomm-ops")


if hasattr(os, "register_at_fork"):  # a forked process has the pool, but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


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


def _cuts(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """[begin, end) in pieces of `step`."""
    return ((low, min(low + step, end)) for low in range(begin, end, step))


def _scratch(flat: torch.Tensor, whole: int, unit: int = 1) -> int:
    """How many elements to take at a time: all where they are float32, else at most _SCRATCH, a multiple of `unit`."""
    return max(whole, 1) if flat.dtype == torch.float32 else max(_SCRATCH // unit, 1) * unit


def _read(flat: torch.Tensor, segments: Segments, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Floats in which the dense elements [begin, end) are float32, and where each segment begins in them."""
    if flat.dtype == torch.float32:
        return flat.numpy(), segments.offsets.numpy()
    dense = torch.empty(end - begin, dtype=torch.float32)
    for at, offset, count in segments.spans(begin, end):
        dense[at : at + count] = flat[offset : offset + count]
    return dense.numpy(), segments.starts[:-1].numpy() - begin


@contextmanager
def _written(out: torch.Tensor, segments: Segments, begin: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As :func:`_read`, for floats that are written inside the block."""
    if out.dtype == torch.float32:
        yield out.numpy(), segments.offsets.numpy()
        return
    dense = torch.empty(end - begin, dtype=torch.float32)
    yield dense.numpy(), segments.starts[:-1].numpy() - begin
    for at, offset, count in segments.spans(begin, end):
        out[offset : offset + count] = dense[at : at + count]


def _factors(how: Rounding) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.int32]:
    keys = how.keys.numpy().astype(np.uint32)
    return how.limit.numpy(), how.lift.numpy(), how.scale.numpy(), keys, np.int32(how.levels << 24)


def _by_chunks(flat: torch.Tensor, chunks: Segments, size: int, work: Callable[..., None]) -> None:
    """Call work(values, offsets, begin, end) over `chunks` of at most `size` elements, whole ones at a time."""
    starts = chunks.starts.numpy()

    def piece(low: int, high: int) -> None:
        for begin, end in _cuts(low, high, max(_scratch(flat, (high - low) * size) // size, 1)):
            work(*_read(flat, chunks, int(starts[begin]), int(starts[end])), begin, end)

    _in_pieces(piece, len(chunks), 1, size)


def peaks(flat: torch.Tensor, segments: Segments) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.peaks`."""
    chunks = segments.blocks(_SCRATCH)
    sizes, tops = chunks.lengths.numpy(), np.empty(len(chunks), np.int32)

    def work(values: np.ndarray, offsets: np.ndarray, begin: int, end: int) -> None:
        kernels.peaks(values.view(np.int32), offsets, sizes, begin, end, tops)

    _by_chunks(flat, chunks, int(chunks.lengths.clamp(min=1).amax()) if len(chunks) else 1, work)
    out = torch.zeros(len(segments), dtype=torch.int32)
    np.maximum.at(out.numpy(), np.repeat(np.arange(len(out)), -(-segments.lengths.numpy() // _SCRATCH)), tops)
    return out.view(torch.float32)


def moments(flat: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`terncomm.ops.reference.moments`."""
    chunks = segments.blocks(kernels.CHUNK)
    firsts = torch.zeros(len(segments) + 1, dtype=torch.int64)
    torch.cumsum((segments.lengths + kernels.CHUNK - 1) // kernels.CHUNK, 0, out=firsts[1:])
    sizes, tops = chunks.lengths.numpy(), np.empty(len(chunks), np.int32)
    sums, squares = np.empty(len(chunks)), np.empty(len(chunks))

    def work(values: np.ndarray, offsets: np.ndarray, begin: int, end: int) -> None:
        kernels.chunk_moments(values.view(np.int32), values, offsets, sizes, begin, end, tops, sums, squares)

    _by_chunks(flat, chunks, kernels.CHUNK, work)
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
    (_, starts, bases), target = _layout(segments), out.numpy()
    *factors, top = _factors(how)

    def work(low: int, high: int) -> None:
        for at, to in _cuts(low, high, _scratch(flat, high - low)):
            here = begin + at, begin + to
            values, offsets = _read(flat, segments, *here)
            kernels.encode_bytes(values, offsets, starts, bases, *factors, top, *here, np.int32(bias), target[at:to])

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
    (_, starts, bases), target = _layout(segments), out.numpy()
    *factors, top = _factors(how)
    low, radix, digits, word = np.int32(packing.low), packing.radix, packing.digits, packing.word_bytes

    def work(first: int, last: int) -> None:
        for at, to in _cuts(first, last, _scratch(flat, last - first, kernels.GROUP * digits)):
            piece = target[packing.nbytes(at) : packing.nbytes(to)]
            here = min(begin + at, end), min(begin + to, end)
            values, offsets = _read(flat, segments, *here)
            kernels.encode_pack(
                values, offsets, starts, bases, *factors, top, *here, to - at, low, radix, digits, word, piece
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


def _unpacked(rows: torch.Tensor, how: Packing, whole: int) -> int:
    """How many codes to unpack at a time: a part of several rows is copied to be contiguous."""
    block = kernels.GROUP * how.digits
    return max(whole, 1) if len(rows) == 1 else max(_PIECE // block, 1) * block


def _columns(source: np.ndarray, how: Packing, begin: int, end: int) -> np.ndarray:
    """The packed codes [begin, end) of every row, contiguous and aligned."""
    piece = np.ascontiguousarray(source[:, how.nbytes(begin) : how.nbytes(end)])
    return piece.copy() if piece.ctypes.data % how.word_bytes else piece


def unpack_sum(rows: torch.Tensor, how: Packing, count: int) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.unpack_sum`."""
    out = torch.empty(count, dtype=torch.int32)
    source, target = rows.numpy(), out.numpy()

    def work(begin: int, end: int) -> None:
        for at, to in _cuts(begin, end, _unpacked(rows, how, end - begin)):
            piece = _columns(source, how, at, to)
            kernels.unpack_sum(piece, np.int32(how.low), how.radix, how.digits, how.word_bytes, target[at:to])

    _in_pieces(work, count, kernels.GROUP * how.digits)
    return out


def decode(totals: torch.Tensor, segments: Segments, unit: torch.Tensor, begin: int, out: torch.Tensor) -> None:
    """See :func:`terncomm.ops.reference.decode`."""
    source, starts, factors = totals.numpy(), segments.starts.numpy(), unit.numpy()

    def work(low: int, high: int) -> None:
        for at, to in _cuts(low, high, _scratch(out, high - low)):
            with _written(out, segments, begin + at, begin + to) as (target, offsets):
                kernels.decode(source[at:to], offsets, starts, factors, begin + at, begin + to, target)

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
    source, starts, factors = rows.numpy(), segments.starts.numpy(), unit.numpy()
    block = kernels.GROUP * how.digits

    def work(first: int, last: int) -> None:
        for at, to in _cuts(first, last, min(_unpacked(rows, how, last - first), _scratch(out, last - first, block))):
            here = min(begin + at, end), min(begin + to, end)
            piece = _columns(source, how, at, to)
            with _written(out, segments, *here) as (target, offsets):
                kernels.unpack_decode(
                    piece, np.int32(how.low), how.radix, how.digits, how.word_bytes,
                    offsets, starts, factors, *here, to - at, target,
                )  # fmt: skip

    _in_pieces(work, length, block)


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
