"""The bytes that each rank sends for a bucket, by a formula of the tests' own, which shares nothing with the path.

A bucket here is no larger than a piece of the path. Each part of a message begins at a multiple of 16 bytes.
"""

from collections.abc import Sequence
from itertools import pairwise

from terncomm import Ternary
from terncomm.codecs import IntegerCodec

HEADER = 256  # of which 52 are the header itself, and the others hold statistics where they fit
SMALL = 8192


def _over(numel: int, parts: int) -> int:
    return -(-numel // parts)


def aligned(nbytes: int) -> int:
    return 16 * _over(nbytes, 16)


def packed(top: int, numel: int) -> int:
    """Bytes of integers in [-top, top], in the word of 8 to 64 bits that holds the most of them per bit."""
    radix, best = 2 * top + 1, (0, 1)
    for octets in (1, 2, 4, 8):
        digits = max(d for d in range(8 * octets + 1) if radix**d <= 256**octets)
        if digits * best[1] > best[0] * octets:
            best = digits, octets
    return _over(numel, best[0]) * best[1]


def top_of(codec: IntegerCodec) -> int:
    return 1 if isinstance(codec, Ternary) else 127


def narrows(codec: IntegerCodec, world_size: int) -> bool:
    """Whether sums come back in 8 bits, with a byte for every 256 of a scale's elements."""
    return getattr(codec, "returned", "exact") == "int8" and world_size > 2


def _is_small(nbytes: int, numel: int, world_size: int, itemsize: int) -> bool:
    """Whether elements that take `nbytes` may be sent whole: no more than an all-reduce of the floats would send."""
    return (world_size - 1) * nbytes <= SMALL and aligned(nbytes) <= 2 * aligned(_over(numel, world_size) * itemsize)


def goes_whole(codec: IntegerCodec, numel: int, world_size: int, exchange: str = "auto") -> bool:
    """Whether codes of float32 gradients are sent whole, and not in rows."""
    row, top = _over(numel, world_size), top_of(codec)
    back = row + _over(row, 256) if narrows(codec, world_size) else packed(world_size * top, row)
    whole, rows = packed(top, numel), packed(top, row) + back
    small = _is_small(whole, numel, world_size, 4)
    return exchange == "gather" or (exchange == "auto" and (whole <= rows or small))


def _longest_row(scaled: Sequence[int], world_size: int, narrow: bool) -> tuple[int, int]:
    """Elements of the longest row, and the most blocks in a row."""
    numel = sum(scaled)
    if not narrow:
        return _over(numel, world_size), 0
    starts = [0]
    for size in scaled:
        first = starts[-1]
        starts += [first + min(at + 256, size) for at in range(0, size, 256)]
    nearest = [
        min(range(len(starts)), key=lambda i: abs(starts[i] - row * numel // world_size)) for row in range(world_size)
    ]
    nearest.append(len(starts) - 1)
    pairs = list(pairwise(nearest))
    return max(starts[b] - starts[a] for a, b in pairs), max(b - a for a, b in pairs)


def codes(codec: IntegerCodec, scaled: Sequence[int], world_size: int, exchange: str = "auto") -> tuple[int, int]:
    """Bytes to each other rank, on the way up in rows (0 if whole) and on the way back, of codes in these scales."""
    numel, top = sum(scaled), top_of(codec)
    if goes_whole(codec, numel, world_size, exchange):
        return 0, packed(top, numel)
    narrow = narrows(codec, world_size)
    row, blocks = _longest_row(scaled, world_size, narrow)
    return packed(top, row), (row + blocks if narrow else packed(world_size * top, row))


def floats(numel: int, itemsize: int, world_size: int) -> tuple[int, int]:
    """Bytes to each other rank, on the way up in rows (0 if whole) and on the way back, of floats.

    Those of 2 bytes may be "bf16" or "fp16" for float32 gradients, or gradients of that type; tests do not use sizes
    where that matters.
    """
    if _is_small(numel * itemsize, numel, world_size, itemsize):
        return 0, numel * itemsize
    return (_over(numel, world_size) * itemsize,) * 2


def float_bytes(numel: int, itemsize: int, world_size: int) -> int:
    """Bytes that a rank sends for floats."""
    return (world_size - 1) * sum(floats(numel, itemsize, world_size))


def statistics(scales: Sequence[int], world_size: int) -> int:
    """Bytes to each other rank for the statistics of groups with so many scales, beside the header."""
    if 4 * sum(scales) <= HEADER - 52:
        return 0
    if world_size * 4 * sum(scales) <= SMALL:
        return sum(aligned(4 * each) for each in scales)
    return 2 * sum(aligned(4 * _over(each, world_size)) for each in scales)


def bucket(
    coded: Sequence[tuple[IntegerCodec, Sequence[int]]],
    exact: Sequence[tuple[int, int]],
    world_size: int,
    exchange: str = "auto",
) -> int:
    """Bytes that a rank sends for a bucket.

    coded: codecs, each with the elements under each of its scales. exact: (elements, bytes of each) that travel as
    floats.
    """
    parts = [codes(codec, scaled, world_size, exchange) for codec, scaled in coded if sum(scaled)]
    parts += [floats(numel, itemsize, world_size) for numel, itemsize in exact if numel]
    beside = statistics([len(scaled) for _, scaled in coded], world_size)
    return (world_size - 1) * (HEADER + beside + sum(aligned(up) + aligned(back) for up, back in parts))
