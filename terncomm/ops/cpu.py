"""Numba kernels for CPU tensors, bit-equal to :mod:`terncomm.ops.reference`, with the same names and arguments.

The work is cut at block edges and runs in up to `torch.get_num_threads()` threads. The result does not depend on where
it is cut. Importing this module compiles the kernels that Numba's on-disk cache lacks.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

from terncomm.ops import _numba as kernels
from terncomm.ops import denormals
from terncomm.ops.types import Packing, Rounding
from terncomm.segments import Segments

_PIECE = 1 << 18  # elements: a thread is used only for this many or more
_SCRATCH = 1 << 15  # elements: dtypes other than float32 are converted in copies of this size


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="terncomm-ops", initializer=denormals.keep)


if hasattr(os, "register_at_fork"):  # a forked process inherits the pool without its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _in_pieces(work: Callable[[int, int], None], count: int, unit: int, elements: int = 1) -> None:
    """Call work(begin, end) for ranges that cover `count` items of `elements` elements each.

    The ranges are cut at multiples of `unit` items. There are at most `torch.get_num_threads()`, each in a thread of
    the pool. If there are too few elements for two threads, one call on this thread does all.
    """
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
    """The ranges of `step` that [begin, end) consists of; the last one may be shorter."""
    return ((low, min(low + step, end)) for low in range(begin, end, step))


def _scratch(flat: torch.Tensor, whole: int, unit: int = 1) -> int:
    """Elements to process at a time: all, `whole`, if they are float32; else about _SCRATCH, a multiple of `unit`."""
    return max(whole, 1) if flat.dtype == torch.float32 else max(_SCRATCH // unit, 1) * unit


def _read(flat: torch.Tensor, segments: Segments, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """An array with dense elements [begin, end) as float32, and the index in it at which each segment begins.

    If `flat` is float32 this is `flat` itself, else a dense copy; indices of earlier segments are then negative.
    """
    if flat.dtype == torch.float32:
        return flat.numpy(), segments.offsets.numpy()
    dense = torch.empty(end - begin, dtype=torch.float32)
    for at, offset, count in segments.spans(begin, end):
        dense[at : at + count] = flat[offset : offset + count]
    return dense.numpy(), segments.starts[:-1].numpy() - begin


@contextmanager
def _written(out: torch.Tensor, segments: Segments, begin: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Like :func:`_read`, for writing: a copy is rounded to the dtype of `out` when the context ends."""
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
    """Call work(values, offsets, begin, end) for ranges of `chunks`, in several threads; no chunk is cut.

    A chunk has at most `size` elements. values, offsets: from `_read`, for chunks [begin, end).
    """
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


def _memory(rows: torch.Tensor) -> np.ndarray:
    """The memory from row 0 to the end of the last row as a flat array, without a copy. Each row must be contiguous."""
    length = (len(rows) - 1) * rows.stride(0) + rows.shape[1] if rows.numel() else 0
    return rows.as_strided((length,), (1,)).numpy()


def _aligned(rows: torch.Tensor, how: Packing) -> bool:
    """Whether the words of all rows (R, k) lie at multiples of the word size in memory."""
    word = how.word_bytes
    return word == 1 or not (rows.data_ptr() % word or (len(rows) > 1 and rows.stride(0) % word))


def _readable(rows: torch.Tensor, how: Packing, count: int) -> torch.Tensor:
    """The bytes of `count` codes in each row: a view if the kernels can read it, else an aligned copy."""
    nbytes = how.nbytes(count)
    rows = rows if rows.shape[1] == nbytes else rows[:, :nbytes]
    if (nbytes == 1 or rows.stride(1) == 1) and _aligned(rows, how):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _in_tiles(
    work: Callable[[int, int, int, int], None], like: torch.Tensor, rows: int, length: int, unit: int
) -> None:
    """Call work(row, end_row, begin, end) for tiles, in several threads.

    A tile is codes [begin, end) of rows [row, end_row). Tiles are cut at multiples of `unit` codes. If the buffer
    `like` is float32, a tile has all rows. Else its elements are copied, so a tile has about _SCRATCH elements or
    fewer: a part of one row, or some whole rows.
    """
    if like.dtype == torch.float32:
        _in_pieces(lambda begin, end: work(0, rows, begin, end), length, unit, rows)
        return
    step = _scratch(like, length, unit)
    if length > step:
        tiles = [(row, row + 1, *cut) for row in range(rows) for cut in _cuts(0, length, step)]
    else:
        tiles = [(*cut, 0, length) for cut in _cuts(0, rows, step // max(length, 1))]

    def several(begin: int, end: int) -> None:
        for tile in tiles[begin:end]:
            work(*tile)

    _in_pieces(several, len(tiles), 1, min(step, rows * length))


def _held(edges: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """First dense element of a tile, and the end: codes [begin, end) of the rows that `edges` bound."""
    return min(int(edges[0]) + begin, int(edges[1])), min(int(edges[-2]) + end, int(edges[-1]))


def encode(flat: torch.Tensor, segments: Segments, how: Rounding) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.encode`."""
    out = torch.empty(segments.numel, dtype=torch.int8)
    (_, starts, bases), target = _layout(segments), out.view(torch.uint8).numpy()
    *factors, top = _factors(how)

    def work(low: int, high: int) -> None:
        for at, to in _cuts(low, high, _scratch(flat, high - low)):
            values, offsets = _read(flat, segments, at, to)
            kernels.encode_bytes(values, offsets, starts, bases, *factors, top, at, to, np.int32(0), target[at:to])

    _in_pieces(work, segments.numel, kernels.GROUP)
    return out


def encode_pack(
    flat: torch.Tensor,
    segments: Segments,
    how: Rounding,
    packing: Packing,
    edges: Sequence[int],
    length: int,
    out: torch.Tensor,
) -> None:
    """See :func:`terncomm.ops.reference.encode_pack`."""
    if not _aligned(out, packing):
        packed = torch.empty(out.shape, dtype=torch.uint8)
        encode_pack(flat, segments, how, packing, edges, length, packed)
        out.copy_(packed)
        return
    (_, starts, bases), memory, stride = _layout(segments), _memory(out), out.stride(0)
    *factors, top = _factors(how)
    layout = np.int32(packing.low), packing.radix, packing.digits, packing.word_bytes
    bounds = np.array(edges, np.int64)

    def work(row: int, end_row: int, begin: int, end: int) -> None:
        here = bounds[row : end_row + 1]
        values, offsets = _read(flat, segments, *_held(here, begin, end))
        target = memory[row * stride + packing.nbytes(begin) :]
        kernels.encode_pack(values, offsets, starts, bases, *factors, top, here, begin, end, *layout, target, stride)

    if len(out):
        _in_tiles(work, flat, len(out), length, kernels.GROUP * packing.digits)


def pack(codes: torch.Tensor, how: Packing, out: torch.Tensor | None = None) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.pack`."""
    if out is not None and not _aligned(out[None], how):
        return out.copy_(pack(codes, how))
    out = torch.empty(how.nbytes(len(codes)), dtype=torch.uint8) if out is None else out
    source, target = codes.to(torch.int32).numpy(), out.numpy()

    def work(begin: int, end: int) -> None:
        piece = target[how.nbytes(begin) : how.nbytes(end)]
        kernels.pack(source[begin:end], np.int32(how.low), how.radix, how.digits, how.word_bytes, piece)

    _in_pieces(work, len(codes), kernels.GROUP * how.digits)
    return out


def unpack_sum(rows: torch.Tensor, how: Packing, count: int) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.unpack_sum`."""
    rows = _readable(rows, how, count)
    out = torch.empty(count, dtype=torch.int32)
    memory, target, before = _memory(rows), out.numpy(), (len(rows) - 1) * rows.stride(0)

    def work(begin: int, end: int) -> None:
        kernels.unpack_sum(
            memory[how.nbytes(begin) : before + how.nbytes(end)], rows.stride(0), len(rows),
            np.int32(how.low), how.radix, how.digits, how.word_bytes, target[begin:end],
        )  # fmt: skip

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
    rows = _readable(rows, how, length)
    memory, starts, factors, before = (
        _memory(rows),
        segments.starts.numpy(),
        unit.numpy(),
        (len(rows) - 1) * rows.stride(0),
    )
    block = kernels.GROUP * how.digits

    def work(first: int, last: int) -> None:
        for at, to in _cuts(first, last, _scratch(out, last - first, block)):
            here = min(begin + at, end), min(begin + to, end)
            with _written(out, segments, *here) as (target, offsets):
                kernels.unpack_decode(
                    memory[how.nbytes(at) : before + how.nbytes(to)], rows.stride(0), len(rows),
                    np.int32(how.low), how.radix, how.digits, how.word_bytes,
                    offsets, starts, factors, *here, to - at, target,
                )  # fmt: skip

    _in_pieces(work, length, block)


def decode_rows(
    rows: torch.Tensor,
    how: Packing,
    segments: Segments,
    unit: torch.Tensor,
    edges: Sequence[int],
    length: int,
    out: torch.Tensor,
) -> None:
    """See :func:`terncomm.ops.reference.decode_rows`."""
    rows = _readable(rows, how, length)
    memory, stride, starts, factors = _memory(rows), rows.stride(0), segments.starts.numpy(), unit.numpy()
    layout = np.int32(how.low), how.radix, how.digits, how.word_bytes
    bounds = np.array(edges, np.int64)

    def work(row: int, end_row: int, begin: int, end: int) -> None:
        here = bounds[row : end_row + 1]
        source = memory[row * stride + how.nbytes(begin) :]
        with _written(out, segments, *_held(here, begin, end)) as (target, offsets):
            kernels.decode_rows(source, stride, *layout, offsets, starts, factors, here, begin, end, target)

    if len(rows):
        _in_tiles(work, out, len(rows), length, kernels.GROUP * how.digits)


def narrow(totals: torch.Tensor, window: Segments, keys: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`terncomm.ops.reference.narrow`."""
    codes = torch.empty(len(totals), dtype=torch.uint8)
    divisors = torch.empty(len(window), dtype=torch.int32)
    _, starts, bases = _layout(window)
    words = keys.numpy().astype(np.uint32)
    kernels.narrow(totals.numpy(), starts, bases, words, np.int32(top), codes.numpy(), divisors.numpy())
    return codes, divisors


def widen(codes: torch.Tensor, window: Segments, divisor: torch.Tensor, top: int) -> torch.Tensor:
    """See :func:`terncomm.ops.reference.widen`."""
    out = torch.empty(len(codes), dtype=torch.int32)
    divisors = divisor.to(torch.int32).numpy()
    kernels.widen(codes.numpy(), window.starts.numpy(), divisors, np.int32(top), out.numpy())
    return out
