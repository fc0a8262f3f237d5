"""The definition of every kernel, in plain torch, on any device. The fast kernels must return the same bits.

`flat` and `out` are flat buffers of gradients, floats of any dtype. They are read as float32; results are rounded to
the dtype of `out`.

Legend: `n` dense elements, `L` segments, `R` rows, `m` codes in a row. The *dense* elements of a buffer are those that
the segments describe, in the order of the segments and without the gaps; see :class:`terncomm.segments.Segments`.
"""

import itertools
from collections.abc import Sequence

import torch

from terncomm.ops.types import Packing, Rounding
from terncomm.segments import Segments

GROUP = 64  # columns of a planar block, and lanes of a float sum
CHUNK = 4096  # elements summed in float32 before float64 takes over
_MASK = 0xFFFFFFFF
_FRACTION = 24  # random bits, and fractional bits of the fixed-point magnitude
_TINY = 2.0**-96  # levels * 2^24 divided by less would overflow float32


def peaks(flat: torch.Tensor, segments: Segments) -> torch.Tensor:
    """(L,) float32: the largest magnitude of each segment; +inf where an element is not finite; 0 where empty."""
    magnitude = segments.take(flat).to(torch.float32).abs()
    magnitude = torch.where(torch.isfinite(magnitude), magnitude, torch.inf)
    if len(segments) == 0 or segments.numel == 0:
        return torch.zeros(len(segments), dtype=torch.float32, device=flat.device)
    return torch.segment_reduce(magnitude, "max", lengths=segments.on(flat.device).lengths, initial=0.0)


def _tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension in a fixed order: zero-pad to a power of two, then add the halves repeatedly."""
    length = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, length - x.shape[-1]))
    while length > 1:
        length //= 2
        x = x[..., :length] + x[..., length:]
    return x[..., 0]


def moments(flat: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Peak magnitude (L,) float32, sum (L,) float64 and sum of squares (L,) float64 of each segment.

    The order of additions is fixed. A segment is cut into chunks of CHUNK elements. Each chunk is multiplied by a power
    of two (exact) that brings its peak into [1, 2). GROUP float32 lanes sum it: element i goes to lane i mod GROUP.
    `_tree_sum` adds the lanes in float32, and then the chunks in float64.
    """
    sums = torch.zeros(len(segments), dtype=torch.float64, device=flat.device)
    squares = torch.zeros_like(sums)
    for s, (offset, size) in enumerate(zip(segments.offsets.tolist(), segments.sizes, strict=True)):
        if size == 0:
            continue
        values = flat[offset : offset + size].to(torch.float32)
        chunks = torch.nn.functional.pad(values, (0, -size % CHUNK)).view(-1, CHUNK)
        bits = (chunks.view(torch.int32) & 0x7FFFFFFF).amax(dim=1)
        exponent = (bits >> 23).clamp(1, 253)
        unit = ((254 - exponent) << 23).view(torch.float32)
        lanes = torch.zeros(len(chunks), GROUP, device=flat.device)
        lanes2 = torch.zeros_like(lanes)
        for values in (chunks * unit[:, None]).view(-1, CHUNK // GROUP, GROUP).unbind(1):
            lanes = lanes + values
            lanes2 = lanes2 + values * values
        back = torch.ldexp(sums.new_ones(len(chunks)), exponent - 127)
        sums[s] = _tree_sum(_tree_sum(lanes).double() * back)
        squares[s] = _tree_sum(_tree_sum(lanes2).double() * back * back)
    return peaks(flat, segments), sums, squares


def clip_limit(
    peak: torch.Tensor, total: torch.Tensor, squares: torch.Tensor, lengths: torch.Tensor, clip: float
) -> torch.Tensor:
    """(L,) float32: min(peak, clip * sigma), sigma the biased standard deviation (Wen et al., 2017, section 3.3).

    If all elements of a segment are equal (or it has one element), sigma is 0 and the clip would erase its gradient. So
    the limit is the peak where sigma <= |mean| / 256. It is 0 only where the segment is all zero, and +inf where an
    element is not finite.

    Args:
        peak: (L,) float32, from `moments`.
        total, squares: (L,) float64 sum and sum of squares, from `moments`.
        lengths: (L,) number of elements.
        clip: in standard deviations.
    """
    count = lengths.to(total).clamp(min=1)
    mean = total / count
    sigma = (squares / count - mean * mean).clamp(min=0).sqrt()
    limit = torch.minimum((sigma * clip).to(torch.float32), peak)
    spread = (sigma * 256 > mean.abs()) & (limit > 0)
    return torch.where(spread & torch.isfinite(peak), limit, peak)


def rounding(local: torch.Tensor, shared: torch.Tensor, keys: torch.Tensor, levels: int) -> Rounding:
    """The arguments of the encoding kernels.

    `scale` is rounded up, so that a magnitude equal to the shared scale always becomes the code `levels`.

    Args:
        local: (L,) float32 clip limits of this rank.
        shared: (L,) float32 scales, equal on all ranks.
        keys: (L, 2) int64, see :meth:`terncomm.keys.Key.streams`.
        levels: the largest code, in 1..127.
    """
    if not 1 <= levels <= 127:
        raise ValueError(f"codes are stored in 8 bits: levels must be in 1..127, got {levels}")
    usable = torch.isfinite(shared) & (shared > 0)
    safe = torch.where(usable, shared, 1.0)
    lift = torch.where(safe < _TINY, 2.0**100, 1.0).to(torch.float32)
    lifted = (safe * lift).double()
    exact = levels * 2.0**_FRACTION
    scale = (exact / lifted).to(torch.float32)
    scale = torch.where(
        scale.double() * lifted < exact, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale
    )
    zero = torch.zeros_like(shared)
    limit = torch.where(usable, torch.minimum(local, shared), zero)
    return Rounding(limit, lift, torch.where(usable, scale, zero), keys, levels)


def noise(counter: torch.Tensor, key0: torch.Tensor, key1: torch.Tensor) -> torch.Tensor:
    """24 uniform random bits for each counter, int64. Counters and key words are int64 in [0, 2^32).

    The two halves of the key start two Weyl sequences, and the mixer lowbias32 combines them. The upper bits of the
    second sequence are mixed into the first before the first round. All of the second is added between the rounds.
    One sequence is not enough: lowbias32 hardly mixes the difference 0x80008000, so two elements whose values in the
    sequence differ by it would get correlated noise. :mod:`terncomm.keys` names the sources.
    """
    a = (counter * 0x9E3779B9 + key0) & _MASK
    b = (counter * 0xBB67AE85 + key1) & _MASK
    x = a ^ (b >> 8)
    x = ((x ^ (x >> 16)) * 0x21F0AAAD + b) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return (x ^ (x >> 15)) >> 8


def encode(flat: torch.Tensor, segments: Segments, how: Rounding) -> torch.Tensor:
    """Stochastic rounding of the dense elements of `flat` -> (n,) int8 codes in [-levels, levels]."""
    return _codes(flat, segments, how, 0, segments.numel)


def _codes(flat: torch.Tensor, segments: Segments, how: Rounding, begin: int, end: int) -> torch.Tensor:
    """(end - begin,) int8 codes of dense elements [begin, end)."""
    segment, place, counter = segments.elements(begin, end, flat.device)
    x = flat[place].to(torch.float32)
    limit = how.limit[segment]
    magnitude = x.abs()
    magnitude = torch.where(magnitude < limit, magnitude, limit)  # NaN becomes the limit, which is 0 then
    fixed = ((magnitude * how.lift[segment]) * how.scale[segment]).to(torch.int64)
    fixed = fixed.clamp(max=how.levels << _FRACTION)
    keys = how.keys.to(flat.device)[segment]
    code = (fixed + noise(counter, keys[:, 0], keys[:, 1])) >> _FRACTION
    return torch.where(x < 0, -code, code).to(torch.int8)


def split_unit(unit: torch.Tensor) -> torch.Tensor:
    """Split each unit for `decode`: (L,) float64 -> (3, L) float32, rows `high`, `low` and `drop`.

    unit = (high + low) * drop. `high` has the leading 12 bits, `low` the remainder. A total below 2^12 times `high` is
    exact, and total * low corrects it. So `decode` returns the exact product rounded once, without float64 arithmetic.
    If a unit is so small that its parts would underflow, the parts are 2^100 times as large and `drop` is 2^-100; else
    `drop` is 1. A unit that is not finite stays so.
    """
    drop = torch.where(unit < _TINY, 2.0**-100, 1.0).to(torch.float32)
    lifted = unit / drop
    high = (lifted.to(torch.float32).view(torch.int32) & -(1 << 12)).view(torch.float32)
    low = torch.where(torch.isfinite(high), lifted - high.double(), 0.0).to(torch.float32)
    return torch.stack([high, low, drop])


def decode(totals: torch.Tensor, segments: Segments, unit: torch.Tensor, begin: int, out: torch.Tensor) -> None:
    """Write total * unit of the segment to `out`, for the dense elements [begin, begin + m).

    Args:
        totals: (m,) int32 sums of codes.
        segments: of `out`.
        unit: (3, L) float32, from `split_unit`.
        begin: dense element of the first total.
        out: the flat buffer; its other elements are unchanged.
    """
    segment, place, _ = segments.elements(begin, begin + len(totals), out.device)
    high, low, drop = unit[:, segment]
    total = totals.to(torch.float32)
    out[place] = ((total * high + total * low) * drop).to(out.dtype)


def pack(codes: torch.Tensor, how: Packing, out: torch.Tensor | None = None) -> torch.Tensor:
    """Pack codes (m,) of any integer dtype into (nbytes,) uint8: into `out` if given, else into a new tensor."""
    digits = torch.nn.functional.pad(codes.to(torch.int64), (0, -len(codes) % how.digits)) - how.low
    body = len(codes) // (GROUP * how.digits) * (GROUP * how.digits)
    blocks = [digits[:body].view(-1, how.digits, GROUP), digits[body:].view(1, how.digits, -1)]
    words = []
    for block in blocks:
        word = torch.zeros_like(block[:, 0])
        for k in range(how.digits - 1, -1, -1):
            word = word * how.radix + block[:, k]  # wraps into the sign bit of int64 as unsigned arithmetic would
        words.append(word.flatten())
    narrow = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[how.word_bytes]
    packed = torch.cat(words).to(narrow).view(torch.uint8)
    return packed if out is None else out.copy_(packed)


def _words(packed: torch.Tensor, how: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, k) uint8 -> upper 32 bits and lower 32 bits of each little-endian word, each (R, k / word_bytes) int64."""
    octets = packed.view(packed.shape[0], -1, how.word_bytes).to(torch.int64)
    half = [octets.new_zeros(octets.shape[:2]), octets.new_zeros(octets.shape[:2])]
    for i in range(how.word_bytes):
        half[i // 4] += octets[..., i] << (8 * (i % 4))
    return half[1], half[0]


def unpack_sum(rows: torch.Tensor, how: Packing, count: int) -> torch.Tensor:
    """Unpack `count` codes from each row of (R, k) uint8, and sum them over the rows -> (count,) int32.

    Here and below, packed rows may have any row stride, so they may be a range of columns of longer messages.
    """
    high, low = _words(rows[:, : how.nbytes(count)], how)
    planes = []
    for _ in range(how.digits):
        carry = ((high % how.radix) << 32) | low
        high = high // how.radix
        planes.append(carry % how.radix)
        low = carry // how.radix
    digits = torch.stack(planes, dim=1)  # (R, digits, words)
    body = count // (GROUP * how.digits) * GROUP
    wide = digits[..., :body].view(len(rows), how.digits, -1, GROUP).transpose(1, 2).flatten(1)
    dense = torch.cat([wide, digits[..., body:].flatten(1)], dim=1)[:, :count]
    return (dense + how.low).sum(dim=0).to(torch.int32)


def narrow(totals: torch.Tensor, window: Segments, keys: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round sums to codes in [-top, top], with a divisor per segment: ceil(max|sum| / top), at least 1.

    A code is sum / divisor after unbiased stochastic rounding.

    Args:
        totals: (m,) int32 sums.
        window: the L segments of these sums.
        keys: (L, 2) int64 keys of the rounding noise.
        top: the largest code, in 1..127.

    Returns:
        (m,) uint8 of code + top, and (L,) int32 divisors.
    """
    segment, _, counter = window.elements(0, window.numel, totals.device)
    peak = torch.zeros(len(window), dtype=torch.int32, device=totals.device)
    peak = peak.scatter_reduce(0, segment, totals.abs(), "amax")
    divisor = ((peak + (top - 1)) // top).clamp(min=1)
    each = divisor[segment].to(torch.int64)
    key = keys.to(totals.device)[segment]
    offset = (noise(counter, key[:, 0], key[:, 1]) * each) >> _FRACTION  # uniform in [0, divisor)
    code = torch.div(totals + offset, each, rounding_mode="floor")
    return (code + top).to(torch.uint8), divisor


def widen(codes: torch.Tensor, window: Segments, divisor: torch.Tensor, top: int) -> torch.Tensor:
    """Undo `narrow`, except for its rounding: (m,) uint8 of code + top, (L,) divisors -> (m,) int32 sums."""
    segment, _, _ = window.elements(0, window.numel, codes.device)
    return (codes.to(torch.int32) - top) * divisor.to(torch.int32)[segment]


def encode_pack(
    flat: torch.Tensor,
    segments: Segments,
    how: Rounding,
    packing: Packing,
    edges: Sequence[int],
    length: int,
    out: torch.Tensor,
) -> None:
    """Encode and pack all rows of a message.

    Row r holds the codes of dense elements [edges[r], edges[r + 1]), padded with the code 0 to `length` codes.
    out: (R, nbytes(length)) uint8, with any row stride.
    """
    for row, (begin, end) in zip(out, itertools.pairwise(edges), strict=True):
        codes = _codes(flat, segments, how, begin, end)
        pack(torch.nn.functional.pad(codes, (0, length - len(codes))), packing, row)


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
    """Sum packed rows and decode the sums: `unpack_sum`, then `decode`.

    Each row of (R, k) uint8 holds `length` codes. The first end - begin are of dense elements [begin, end); the others
    are padding.
    """
    decode(unpack_sum(rows, how, length)[: end - begin], segments, unit, begin, out)


def decode_rows(
    rows: torch.Tensor,
    how: Packing,
    segments: Segments,
    unit: torch.Tensor,
    edges: Sequence[int],
    length: int,
    out: torch.Tensor,
) -> None:
    """Unpack and decode rows of totals, without summing over rows.

    Row r of (R, k) uint8 holds `length` totals. The first are of dense elements [edges[r], edges[r + 1]); the others
    are padding.
    """
    for row, (begin, end) in zip(rows, itertools.pairwise(edges), strict=True):
        unpack_decode(row[None], how, segments, unit, begin, end, length, out)
