"""The definition of every kernel, in plain torch, on any device. The fast kernels must equal it bit for bit.

Gradients (`flat`, `out`) are floats of any type: they are read as float32, and written rounded to their type.

Legend: `n` dense elements, `L` segments, `R` rows, `m` codes in a row.
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
    """Sum over the last dimension by halving, zero-padded to a power of two: an order that never changes."""
    length = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, length - x.shape[-1]))
    while length > 1:
        length //= 2
        x = x[..., :length] + x[..., length:]
    return x[..., 0]


def moments(flat: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Peak magnitude (L,) float32, sum and sum of squares (L,) float64 of each segment, in one fixed order.

    A segment is cut into chunks of CHUNK elements. A chunk is scaled by a power of two (exact) that brings its peak
    into [1, 2) and summed in GROUP float32 lanes, element i in lane i mod GROUP; lanes, and then chunks in float64,
    are added by halving.
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
    """(L,) float32 min(peak, clip * sigma), sigma the biased standard deviation (Wen et al., 2017, section 3.3).

    A layer with no spread (one element, or all elements alike) would be clipped to nothing: where sigma is not above
    1/256 of |mean| the limit is the peak. It is 0 only where the layer is all zero, +inf where it is not finite.
    """
    count = lengths.to(total).clamp(min=1)
    mean = total / count
    sigma = (squares / count - mean * mean).clamp(min=0).sqrt()
    limit = torch.minimum((sigma * clip).to(torch.float32), peak)
    spread = (sigma * 256 > mean.abs()) & (limit > 0)
    return torch.where(spread & torch.isfinite(peak), limit, peak)


def rounding(local: torch.Tensor, shared: torch.Tensor, keys: torch.Tensor, levels: int) -> Rounding:
    """Clip limits and shared scales, (L,) float32 -> what the encoding kernels multiply and compare with.

    `scale` is rounded up, so that a magnitude equal to the shared scale always becomes the code `levels`.
    """
    if not 1 <= levels <= 127:
        raise ValueError(f"codes are kept in 8 bits: levels must be in 1..127, got {levels}")
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
    """Counters and key words, int64 in [0, 2^32) -> 24 uniform random bits each, int64.

    Two Weyl sequences, begun at the two halves of the key, through lowbias32: the upper bits of the second are mixed
    into the first, and all of it is added again between the rounds. :mod:`terncomm.keys` names the sources. With one
    sequence, elements as far apart as its step takes to 0x80008000, a difference that lowbias32 hardly mixes, come
    out correlated.
    """
    a = (counter * 0x9E3779B9 + key0) & _MASK
    b = (counter * 0xBB67AE85 + key1) & _MASK
    x = a ^ (b >> 8)
    x = ((x ^ (x >> 16)) * 0x21F0AAAD + b) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return (x ^ (x >> 15)) >> 8


def encode(flat: torch.Tensor, segments: Segments, how: Rounding) -> torch.Tensor:
    """Stochastic rounding of the described elements of flat -> (n,) int8 codes in [-levels, levels]."""
    return _codes(flat, segments, how, 0, segments.numel)


def _codes(flat: torch.Tensor, segments: Segments, how: Rounding, begin: int, end: int) -> torch.Tensor:
    """The codes of dense elements [begin, end)."""
    segment, place, counter = segments.elements(begin, end, flat.device)
    x = flat[place].to(torch.float32)
    limit = how.limit[segment]
    magnitude = x.abs()
    magnitude = torch.where(magnitude < limit, magnitude, limit)  # NaN takes the limit, which is then 0
    fixed = ((magnitude * how.lift[segment]) * how.scale[segment]).to(torch.int64)
    fixed = fixed.clamp(max=how.levels << _FRACTION)
    keys = how.keys.to(flat.device)[segment]
    code = (fixed + noise(counter, keys[:, 0], keys[:, 1])) >> _FRACTION
    return torch.where(x < 0, -code, code).to(torch.int8)


def split_unit(unit: torch.Tensor) -> torch.Tensor:
    """(L,) float64 -> (3, L) float32: the leading 12 bits of each number, the rest, and what to multiply with at last.

    A total below 2^12 times the leading part is exact, and the rest corrects it: `decode` is then the exact product
    rounded once, without arithmetic in float64. Units so small that their parts would underflow are taken 2^100 times
    as large, and the last factor takes that back. Not finite stays so.
    """
    drop = torch.where(unit < _TINY, 2.0**-100, 1.0).to(torch.float32)
    lifted = unit / drop
    high = (lifted.to(torch.float32).view(torch.int32) & -(1 << 12)).view(torch.float32)
    low = torch.where(torch.isfinite(high), lifted - high.double(), 0.0).to(torch.float32)
    return torch.stack([high, low, drop])


def decode(totals: torch.Tensor, segments: Segments, unit: torch.Tensor, begin: int, out: torch.Tensor) -> None:
    """Integer totals of dense elements [begin, begin + len(totals)) -> out, total * unit of its segment.

    unit: (3, L) float32, from `split_unit`.
    """
    segment, place, _ = segments.elements(begin, begin + len(totals), out.device)
    high, low, drop = unit[:, segment]
    total = totals.to(torch.float32)
    out[place] = ((total * high + total * low) * drop).to(out.dtype)


def pack(codes: torch.Tensor, how: Packing, out: torch.Tensor | None = None) -> torch.Tensor:
    """Codes (m,) of any integer type -> (nbytes,) uint8; those of `out`, if given."""
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
    """(R, k) uint8 -> high and low 32 bits of each little-endian word, (R, k / word_bytes) int64."""
    octets = packed.view(packed.shape[0], -1, how.word_bytes).to(torch.int64)
    half = [octets.new_zeros(octets.shape[:2]), octets.new_zeros(octets.shape[:2])]
    for i in range(how.word_bytes):
        half[i // 4] += octets[..., i] << (8 * (i % 4))
    return half[1], half[0]


def unpack_sum(rows: torch.Tensor, how: Packing, count: int) -> torch.Tensor:
    """Packed rows (R, k) uint8 -> the sum over rows of their `count` codes each, (count,) int32.

    Here and below rows of packed codes may have any stride, so they may be columns of longer messages.
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
    """Integer sums -> codes in [-top, top] and a divisor per piece: ceil(max|sum| / top).

    A code is sum / divisor after unbiased rounding. Returns (m,) uint8 of code + top, and (L,) int32 divisors, at
    least 1. `top` is at most 127.
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
    """`narrow` undone up to its rounding: (m,) uint8 and (L,) divisors -> (m,) int32."""
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
    out: (R, nbytes(length)) uint8, of any row stride.
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
    """`decode` of `unpack_sum` of packed rows (R, k) of `length` codes; the first are elements [begin, end)."""
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
    """Packed rows (R, k) of `length` totals; row r alone holds those of dense elements [edges[r], edges[r + 1])."""
    for row, (begin, end) in zip(rows, itertools.pairwise(edges), strict=True):
        unpack_decode(row[None], how, segments, unit, begin, end, length, out)
