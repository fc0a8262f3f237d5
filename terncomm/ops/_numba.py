"""The loops of :mod:`terncomm.ops.cpu`: serial, `nogil` Numba functions, bit-equal to `reference.py`.

Every kernel works on one contiguous range, so that callers can give ranges to threads. Every kernel has an explicit
signature: importing this module compiles the kernels that the on-disk cache lacks, and nothing compiles later. Inner
loops have a constant trip count, typed constants, and selects instead of branches, so that the compiler can vectorise
them.

Arguments shared by the kernels:
    offsets, starts, bases: (L,), (L + 1,), (L,) int64; the first element of each segment, as an index into the flat
        buffer, among the dense elements, and inside its layer.
    limit, lift, scale: (L,) float32; keys: (L, 2) uint32; see :class:`terncomm.ops.types.Rounding`.
    top: in the encoding kernels, int32 levels << 24; in `narrow` and `widen`, the largest code.
    low, radix, digits, word_bytes: see :class:`terncomm.ops.types.Packing`.
    unit: (3, L) float32; see :func:`terncomm.ops.reference.split_unit`.
    memory, stride: rows of bytes; row r begins at memory[r * stride]. The array is flat because Numba does not
        vectorise loops over a two-dimensional array whose rows are not adjacent.
    edges: (R + 1,) int64; row r holds the dense elements [edges[r], edges[r + 1]).
"""

import numba
import numpy as np

from terncomm.ops import caching

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I32, I64, F32, F64 = np.int32, np.int64, np.float32, np.float64

GROUP = 64  # columns of a planar block, and lanes of a float sum
CHUNK = 4096  # elements summed in float32 before float64 takes over
BYTES = 1024  # one-byte codes that are summed over the rows at a time

_W0, _W1 = U32(0x9E3779B9), U32(0xBB67AE85)  # increments of the two Weyl sequences of the noise
_LANES0, _LANES1 = (np.arange(GROUP, dtype=np.uint32) * step for step in (_W0, _W1))
_C1, _C2 = U32(0x21F0AAAD), U32(0x735A2D97)
_S8, _S15, _S16 = U32(8), U32(15), U32(16)
_SIGN_OFF = I32(0x7FFFFFFF)
_INF_BITS = I32(0x7F800000)
_S23, _S24 = I32(23), I32(24)
_ZERO = F32(0)


def _jit(signature):
    return numba.njit(signature, nogil=True, cache=caching.enabled, error_model="numpy", boundscheck=False)


_inline = numba.njit(inline="always", nogil=True, error_model="numpy", boundscheck=False)


@_inline
def _mix(a, b):
    """24 random bits from one value of each Weyl sequence; see `noise` in `reference.py`.

    Every result is cast back to uint32, because Numba widens uint32 arithmetic to 64 bits.
    """
    x = U32(a ^ U32(b >> _S8))
    x = U32(U32(U32(x ^ U32(x >> _S16)) * _C1) + b)
    x = U32(U32(x ^ U32(x >> _S15)) * _C2)
    return U32(U32(x ^ U32(x >> _S15)) >> _S8)


@_inline
def _begin(counter, key0, key1):
    """The values of both Weyl sequences at `counter`; those at counter + j are _LANES0[j] and _LANES1[j] higher."""
    return U32(U32(counter * _W0) + key0), U32(U32(counter * _W1) + key1)


@_inline
def _noise(counter, key0, key1):
    a, b = _begin(counter, key0, key1)
    return _mix(a, b)


@_inline
def _round(value, limit, lift, scale, top, chance):
    """The code of one value: clamp |value|, scale it to 24 fractional bits, add 24 random bits, floor, restore sign."""
    magnitude = abs(value)
    magnitude = magnitude if magnitude < limit else limit
    fixed = I32((magnitude * lift) * scale)
    fixed = fixed if fixed < top else top
    code = I32(I32(fixed + I32(chance)) >> _S24)
    return I32(-code) if value < _ZERO else code


@_jit("int64(int64[::1], int64)")
def _find(starts, position):
    """Index of the last segment that begins at or before dense element `position`."""
    low, high = 0, len(starts) - 2
    while low < high:
        middle = (low + high + 1) >> 1
        if starts[middle] <= position:
            low = middle
        else:
            high = middle - 1
    return low


_LAYOUT = "int64[::1], int64[::1], int64[::1]"
_FACTORS = "float32[::1], float32[::1], float32[::1], uint32[:, ::1]"


@_jit(f"void(float32[::1], {_LAYOUT}, {_FACTORS}, int32, int64, int64, int32, uint8[::1])")
def encode_bytes(flat, offsets, starts, bases, limit, lift, scale, keys, top, begin, end, bias, out):
    """Encode dense elements [begin, end) and write code + bias, modulo 256, to `out`, (end - begin,)."""
    if begin >= end:
        return
    s = _find(starts, begin)
    position = begin
    while position < end:
        while starts[s + 1] <= position:
            s += 1
        stop = min(end, starts[s + 1])
        inside = position - starts[s]
        at, counter, to, count = offsets[s] + inside, U32(bases[s] + inside), position - begin, stop - position
        lim, lif, sca, k0, k1 = limit[s], lift[s], scale[s], keys[s, 0], keys[s, 1]
        whole = count - count % GROUP
        for i in range(0, whole, GROUP):
            a, b = _begin(U32(counter + U32(i)), k0, k1)
            for j in range(GROUP):
                x = flat[U64(at + i) + U64(j)]
                chance = _mix(U32(a + _LANES0[j]), U32(b + _LANES1[j]))
                code = _round(x, lim, lif, sca, top, chance)
                out[U64(to + i) + U64(j)] = U8(I32(code + bias))
        for i in range(whole, count):
            chance = _noise(U32(counter + U32(i)), k0, k1)
            out[to + i] = U8(_round(flat[at + i], lim, lif, sca, top, chance) + bias)
        position = stop


@_inline
def _plane_width(length, begin, digits):
    """Columns of the block at code `begin`: GROUP, or ceil(remaining codes / digits) if fewer than a block remain."""
    rest = length - begin
    return GROUP if rest >= digits * GROUP else (rest + digits - 1) // digits


# A scratch block holds plane k of its codes at [k * GROUP, (k + 1) * GROUP), so that every loop over columns has the
# constant trip count GROUP. Only the last block of a row has fewer columns, `width`. Its codes are dense outside these
# loops: `_spread` moves plane k from k * width to k * GROUP, `_squeeze` moves it back.
@_jit("void(int32[::1], int64, int64)")
def _spread(block, width, digits):
    for k in range(digits - 1, -1, -1):
        for j in range(width - 1, -1, -1):
            block[k * GROUP + j] = block[k * width + j]


@_jit("void(int32[::1], int64, int64)")
def _squeeze(block, width, digits):
    for k in range(digits):
        for j in range(width):
            block[k * width + j] = block[k * GROUP + j]


@_inline
def _store_block(block, wide, width, radix, digits, word_bytes, out, word):
    """Write a block of digits to the words `word`, `word + 1`, ... of `out`.

    Word j is the sum over k of block[k * GROUP + j] * radix^k. wide: scratch, (GROUP,) uint64.
    """
    if word_bytes == 1 and digits == 5 and width == GROUP:  # ternary codes, the layout of the hot path
        b1 = I32(radix)
        b2, b3, b4 = I32(b1 * b1), I32(b1 * b1 * b1), I32(b1 * b1 * b1 * b1)
        for j in range(GROUP):
            low = I32(block[U64(j)] + b1 * block[U64(64 + j)] + b2 * block[U64(128 + j)])
            out[U64(word) + U64(j)] = U8(I32(low + b3 * block[U64(192 + j)] + b4 * block[U64(256 + j)]))
    elif word_bytes < 8:
        acc = wide.view(np.uint32)
        base = U32(radix)
        last = U64((digits - 1) * GROUP)
        for j in range(GROUP):
            acc[j] = U32(block[last + U64(j)])
        for k in range(digits - 2, -1, -1):
            at = U64(k * GROUP)
            for j in range(GROUP):
                acc[j] = U32(U32(acc[j] * base) + U32(block[at + U64(j)]))
        if word_bytes == 1:
            if width == GROUP:
                for j in range(GROUP):
                    out[U64(word) + U64(j)] = U8(acc[j])
            else:
                for j in range(width):
                    out[U64(word) + U64(j)] = U8(acc[j])
        elif word_bytes == 2:
            out16 = out.view(np.uint16)
            for j in range(width):
                out16[U64(word) + U64(j)] = U16(acc[j])
        else:
            out32 = out.view(np.uint32)
            for j in range(width):
                out32[U64(word) + U64(j)] = acc[j]
    else:
        base64 = U64(radix)
        for j in range(GROUP):
            wide[j] = U64(0)
        for k in range(digits - 1, -1, -1):
            at = U64(k * GROUP)
            for j in range(GROUP):
                wide[j] = wide[j] * base64 + U64(block[at + U64(j)])
        out64 = out.view(np.uint64)
        for j in range(width):
            out64[U64(word) + U64(j)] = wide[j]


@_inline
def _peel(cur, radix, digits, first, bias, block, plane):
    """Add the base-radix digits of GROUP numbers below 2^21 to the planes `plane`, `plane + 1`, ... of `block`.

    `cur` holds the numbers, uint32, and is overwritten. `first`: store digit + bias in `block` instead of adding. The
    division is a multiplication in float32: (x + 1/2) / radix is never within the rounding error of an integer for
    x < 2^21, so truncation is exact.
    """
    base, inverse, half = U32(radix), F32(1.0) / F32(radix), F32(0.5)
    for k in range(digits):
        to = U64((plane + k) * GROUP)
        if k == digits - 1:
            if first:
                for j in range(GROUP):
                    block[to + U64(j)] = I32(I32(cur[j]) + bias)
            else:
                for j in range(GROUP):
                    block[to + U64(j)] += I32(cur[j])
        elif first:
            for j in range(GROUP):
                quotient = U32(I32((F32(I32(cur[j])) + half) * inverse))
                block[to + U64(j)] = I32(I32(cur[j] - U32(quotient * base)) + bias)
                cur[j] = quotient
        else:
            for j in range(GROUP):
                quotient = U32(I32((F32(I32(cur[j])) + half) * inverse))
                block[to + U64(j)] += I32(cur[j] - U32(quotient * base))
                cur[j] = quotient


@_jit("UniTuple(int64, 2)(int64, int64)")
def _largest_power(radix, bound):
    """The largest power of radix that is at most `bound`, and its exponent."""
    power, exponent = 1, 0
    while power * radix <= bound:
        power *= radix
        exponent += 1
    return power, exponent


@_jit("void(uint8[::1], int64, int64, int64, int64, int32, int64, int64, int64, uint32[::1], uint64[::1], int32[::1])")
def _sum_block(memory, stride, count, word, width, low, radix, digits, word_bytes, cur, wide, block):
    """Sum the codes of one block over `count` rows, into `block` in dense order; its first word is `word` in each row.

    cur, wide: scratch, (GROUP,) uint32 and (2 * GROUP,) uint64.
    """
    bias = I32(low * I32(count))
    # Words of 32 and 64 bits are split into parts below 2^31 (by 64-bit division), and these into parts below 2^21 (by
    # multiplication in float64).
    part, part_digits = _largest_power(radix, 1 << 31)
    short, short_digits = _largest_power(radix, 1 << 21)
    rest = wide[GROUP:].view(np.uint32)
    inverse, half, size = F64(1.0) / F64(short), F64(0.5), U32(short)
    for r in range(count):
        at = r * (stride // word_bytes) + word
        if word_bytes == 1:
            if width == GROUP:
                for j in range(GROUP):
                    cur[j] = U32(memory[U64(at) + U64(j)])
            else:
                for j in range(width):
                    cur[j] = U32(memory[U64(at) + U64(j)])
            _peel(cur, radix, digits, r == 0, bias, block, 0)
        elif word_bytes == 2:
            packed16 = memory.view(np.uint16)
            for j in range(width):
                cur[j] = U32(packed16[U64(at) + U64(j)])
            _peel(cur, radix, digits, r == 0, bias, block, 0)
        else:
            if word_bytes == 4:
                packed32 = memory.view(np.uint32)
                for j in range(width):
                    wide[j] = U64(packed32[U64(at) + U64(j)])
            else:
                packed64 = memory.view(np.uint64)
                for j in range(width):
                    wide[j] = packed64[U64(at) + U64(j)]
            done = 0
            while done < digits:
                if digits - done > part_digits:
                    for j in range(GROUP):
                        quotient = wide[j] // U64(part)
                        rest[j] = U32(wide[j] - quotient * U64(part))
                        wide[j] = quotient
                else:
                    for j in range(GROUP):
                        rest[j] = U32(wide[j])
                stop = min(done + part_digits, digits)
                while done < stop:
                    some = min(short_digits, stop - done)
                    for j in range(GROUP):
                        quotient32 = U32(I32((F64(I32(rest[j])) + half) * inverse))
                        cur[j] = U32(rest[j] - U32(quotient32 * size))
                        rest[j] = quotient32
                    _peel(cur, radix, some, r == 0, bias, block, done)
                    done += some
    if width < GROUP:
        _squeeze(block, width, digits)


@_jit("void(int32[::1], int32, int64, int64, int64, uint8[::1])")
def pack(codes, low, radix, digits, word_bytes, out):
    """Pack codes (m,) in [low, low + radix) into planar base-radix words; see :mod:`terncomm.wire`."""
    length = len(codes)
    block = np.empty(digits * GROUP, np.int32)
    wide = np.empty(GROUP, np.uint64)
    begin = 0
    while begin < length:
        width = _plane_width(length, begin, digits)
        size = digits * width
        count = min(length - begin, size)
        for i in range(count):
            block[i] = I32(codes[U64(begin) + U64(i)] - low)
        for i in range(count, size):
            block[i] = I32(-low)
        if width < GROUP:
            _spread(block, width, digits)
        _store_block(block, wide, width, radix, digits, word_bytes, out, begin // digits)
        begin += size


@_jit(f"void(float32[::1], {_LAYOUT}, {_FACTORS}, int32, int64, int64, int64, int32, int64, int64, int64, uint8[::1])")
def _encode_row(
    flat, offsets, starts, bases, limit, lift, scale, keys, top, begin, end, length, low, radix, digits, word_bytes, out
):
    """Encode dense elements [begin, end), pad with the code 0 to `length` codes, and pack them into `out`."""
    block = np.empty(digits * GROUP, np.int32)
    wide = np.empty(GROUP, np.uint64)
    s = _find(starts, begin)
    done = 0
    while done < length:
        width = _plane_width(length, done, digits)
        size = digits * width
        column = 0
        stop = min(begin + done + size, end)
        position = begin + done
        while position < stop:
            while starts[s + 1] <= position:
                s += 1
            count = min(stop, starts[s + 1]) - position
            inside = position - starts[s]
            at, counter = offsets[s] + inside, U32(bases[s] + inside)
            lim, lif, sca, k0, k1 = limit[s], lift[s], scale[s], keys[s, 0], keys[s, 1]
            whole = count - count % GROUP
            for i in range(0, whole, GROUP):
                a, b = _begin(U32(counter + U32(i)), k0, k1)
                for j in range(GROUP):
                    x = flat[U64(at + i) + U64(j)]
                    chance = _mix(U32(a + _LANES0[j]), U32(b + _LANES1[j]))
                    code = _round(x, lim, lif, sca, top, chance)
                    block[U64(column + i) + U64(j)] = I32(code - low)
            for i in range(whole, count):
                code = _round(flat[at + i], lim, lif, sca, top, _noise(U32(counter + U32(i)), k0, k1))
                block[column + i] = I32(code - low)
            column += count
            position += count
        for i in range(column, size):
            block[i] = I32(-low)
        if width < GROUP:
            _spread(block, width, digits)
        _store_block(block, wide, width, radix, digits, word_bytes, out, done // digits)
        done += size


@_jit(
    f"void(float32[::1], {_LAYOUT}, {_FACTORS}, int32, int64[::1], int64, int64, int32, int64, int64, int64,"
    "uint8[::1], int64)"
)
def encode_pack(
    flat, offsets, starts, bases, limit, lift, scale, keys, top,
    edges, first, last, low, radix, digits, word_bytes, memory, stride,
):  # fmt: skip
    """Encode and pack the codes [first, last) of every row, padded with the code 0; `first` is at a block edge."""
    nbytes = (last - first + digits - 1) // digits * word_bytes
    for r in range(len(edges) - 1):
        begin, end = min(edges[r] + first, edges[r + 1]), min(edges[r] + last, edges[r + 1])
        row = memory[r * stride : r * stride + nbytes]
        if digits == 1 and word_bytes == 1:
            encode_bytes(
                flat, offsets, starts, bases, limit, lift, scale, keys, top, begin, end, I32(-low), row[: end - begin]
            )
            for i in range(end - begin, nbytes):
                row[i] = U8(I32(-low))
        else:
            _encode_row(
                flat, offsets, starts, bases, limit, lift, scale, keys, top,
                begin, end, last - first, low, radix, digits, word_bytes, row,
            )  # fmt: skip


@_inline
def _sum_bytes(memory, stride, rows, begin, count, bias, out, at):
    """Sum bytes [begin, begin + count) over the rows, add `bias`, and write to out[at : at + count]."""
    whole = count - count % GROUP
    for r in range(rows):
        source = r * stride + begin
        if r == 0:
            for i in range(0, whole, GROUP):
                for j in range(GROUP):
                    out[U64(at + i) + U64(j)] = I32(I32(memory[U64(source + i) + U64(j)]) + bias)
            for i in range(whole, count):
                out[at + i] = I32(I32(memory[source + i]) + bias)
        else:
            for i in range(0, whole, GROUP):
                for j in range(GROUP):
                    out[U64(at + i) + U64(j)] += I32(memory[U64(source + i) + U64(j)])
            for i in range(whole, count):
                out[at + i] += I32(memory[source + i])


@_jit("void(uint8[::1], int64, int64, int32, int64, int64, int64, int32[::1])")
def unpack_sum(memory, stride, rows, low, radix, digits, word_bytes, out):
    """Unpack m codes from each of `rows` packed rows and write their sums to `out`, (m,)."""
    length = len(out)
    if digits == 1 and word_bytes == 1:
        for begin in range(0, length, BYTES):
            count = min(length - begin, I64(BYTES))
            _sum_bytes(memory, stride, rows, begin, count, I32(low * I32(rows)), out, begin)
        return
    block = np.empty(digits * GROUP, np.int32)
    cur, wide = np.zeros(GROUP, np.uint32), np.zeros(2 * GROUP, np.uint64)
    begin = 0
    while begin < length:
        width = _plane_width(length, begin, digits)
        _sum_block(memory, stride, rows, begin // digits, width, low, radix, digits, word_bytes, cur, wide, block)
        for i in range(min(length - begin, digits * width)):
            out[U64(begin) + U64(i)] = block[i]
        begin += digits * width


@_inline
def _scale_out(totals, offsets, starts, unit, s, begin, end, out):
    """Write float32(total * unit) to `out` for dense elements [begin, end).

    totals[0] is of element `begin`, which lies in segment s or a later one.
    """
    position = begin
    while position < end:
        while starts[s + 1] <= position:
            s += 1
        count = min(end, starts[s + 1]) - position
        at, source = offsets[s] + position - starts[s], position - begin
        high, low, drop = unit[0, s], unit[1, s], unit[2, s]
        whole = count - count % GROUP
        for i in range(0, whole, GROUP):
            for j in range(GROUP):
                total = F32(totals[U64(source + i) + U64(j)])
                out[U64(at + i) + U64(j)] = (total * high + total * low) * drop
        for i in range(whole, count):
            total = F32(totals[source + i])
            out[at + i] = (total * high + total * low) * drop
        position += count


@_jit("void(int32[::1], int64[::1], int64[::1], float32[:, ::1], int64, int64, float32[::1])")
def decode(totals, offsets, starts, unit, begin, end, out):
    """Write the totals of dense elements [begin, end), times the unit of their segment, to the flat buffer `out`."""
    if begin < end:
        _scale_out(totals, offsets, starts, unit, _find(starts, begin), begin, end, out)


@_inline
def _decode_five(memory, word, low, radix, word_bytes, cur, high, rest, drop, at, out):
    """Unpack and decode in one pass: a full block of one row, five digits per 8- or 16-bit word, in one segment."""
    if word_bytes == 1:
        for j in range(GROUP):
            cur[j] = U32(memory[U64(word) + U64(j)])
    else:
        packed16 = memory.view(np.uint16)
        for j in range(GROUP):
            cur[j] = U32(packed16[U64(word) + U64(j)])
    base, bias, inverse, half = F32(radix), F32(low), F32(1.0) / F32(radix), F32(0.5)
    for j in range(GROUP):
        x0 = F32(I32(cur[j]))  # all integers here are below 2^16: float32 holds them and their products exactly
        x1 = F32(I32((x0 + half) * inverse))
        x2 = F32(I32((x1 + half) * inverse))
        x3 = F32(I32((x2 + half) * inverse))
        x4 = F32(I32((x3 + half) * inverse))
        t0, t1, t2, t3 = x0 - x1 * base + bias, x1 - x2 * base + bias, x2 - x3 * base + bias, x3 - x4 * base + bias
        t4 = x4 + bias
        out[at + U64(j)] = (t0 * high + t0 * rest) * drop
        out[at + U64(64 + j)] = (t1 * high + t1 * rest) * drop
        out[at + U64(128 + j)] = (t2 * high + t2 * rest) * drop
        out[at + U64(192 + j)] = (t3 * high + t3 * rest) * drop
        out[at + U64(256 + j)] = (t4 * high + t4 * rest) * drop


@_jit(
    "void(uint8[::1], int64, int64, int32, int64, int64, int64, int64[::1], int64[::1], float32[:, ::1],"
    "int64, int64, int64, float32[::1])"
)
def unpack_decode(memory, stride, rows, low, radix, digits, word_bytes, offsets, starts, unit, begin, end, length, out):
    """`unpack_sum`, then `decode`, block by block. Each row holds `length` codes, from dense element `begin` on."""
    if begin >= end:
        return
    if digits == 1 and word_bytes == 1:
        totals = np.empty(BYTES, np.int32)
        s = _find(starts, begin)
        for at in range(begin, end, BYTES):
            stop = min(at + BYTES, end)
            _sum_bytes(memory, stride, rows, at - begin, stop - at, I32(low * I32(rows)), totals, 0)
            while starts[s + 1] <= at:
                s += 1
            _scale_out(totals, offsets, starts, unit, s, at, stop, out)
        return
    block = np.empty(digits * GROUP, np.int32)
    cur, wide = np.zeros(GROUP, np.uint32), np.zeros(2 * GROUP, np.uint64)
    five = rows == 1 and digits == 5 and word_bytes <= 2
    s = _find(starts, begin)
    done = 0
    while begin + done < end:
        width = _plane_width(length, done, digits)
        stop = min(begin + done + digits * width, end)
        while starts[s + 1] <= begin + done:
            s += 1
        if five and width == GROUP and stop <= starts[s + 1] and stop - begin - done == 5 * GROUP:
            at = U64(offsets[s] + begin + done - starts[s])
            high, rest, drop = unit[0, s], unit[1, s], unit[2, s]
            _decode_five(memory, done // digits, low, radix, word_bytes, cur, high, rest, drop, at, out)
        else:
            _sum_block(memory, stride, rows, done // digits, width, low, radix, digits, word_bytes, cur, wide, block)
            _scale_out(block, offsets, starts, unit, s, begin + done, stop, out)
        done += digits * width


@_jit(
    "void(uint8[::1], int64, int32, int64, int64, int64, int64[::1], int64[::1], float32[:, ::1],"
    "int64[::1], int64, int64, float32[::1])"
)
def decode_rows(memory, stride, low, radix, digits, word_bytes, offsets, starts, unit, edges, first, last, out):
    """`unpack_decode` for the codes [first, last) of each row separately; `first` is at a block edge."""
    nbytes = (last - first + digits - 1) // digits * word_bytes
    for r in range(len(edges) - 1):
        begin, end = min(edges[r] + first, edges[r + 1]), min(edges[r] + last, edges[r + 1])
        row = memory[r * stride : r * stride + nbytes]
        unpack_decode(
            row, nbytes, 1, low, radix, digits, word_bytes, offsets, starts, unit, begin, end, last - first, out
        )


@_jit("void(int32[::1], float32[::1], int64[::1], int64[::1], int64, int64, int32[::1], float64[::1], float64[::1])")
def chunk_moments(bits, flat, begins, sizes, begin, end, peaks, sums, squares):
    """The moments of chunks [begin, end), into `peaks`, `sums` and `squares`; see `moments` in `reference.py`.

    Chunk c is flat[begins[c] : begins[c] + sizes[c]], with sizes[c] <= CHUNK. bits: `flat` viewed as int32. peaks: the
    bits of the peak magnitudes.
    """
    lanes = np.empty(GROUP, np.float32)
    lanes2 = np.empty(GROUP, np.float32)
    power = np.empty(1, np.int32)
    for c in range(begin, end):
        at, size = begins[c], sizes[c]
        whole = size - size % GROUP
        peak = I32(0)
        for i in range(0, whole, GROUP):
            for j in range(GROUP):
                magnitude = I32(bits[U64(at + i) + U64(j)] & _SIGN_OFF)
                peak = magnitude if magnitude > peak else peak
        for i in range(whole, size):
            magnitude = bits[at + i] & _SIGN_OFF
            peak = magnitude if magnitude > peak else peak
        exponent = min(max(peak >> _S23, I32(1)), I32(253))
        power[0] = (I32(254) - exponent) << _S23
        unit = power.view(np.float32)[0]
        for j in range(GROUP):
            lanes[j] = _ZERO
            lanes2[j] = _ZERO
        for i in range(0, whole, GROUP):
            for j in range(GROUP):
                value = flat[U64(at + i) + U64(j)] * unit
                lanes[j] += value
                lanes2[j] += value * value
        for i in range(whole, size):
            value = flat[at + i] * unit
            lanes[i - whole] += value
            lanes2[i - whole] += value * value
        half = GROUP // 2
        while half > 0:
            for j in range(half):
                lanes[j] += lanes[j + half]
                lanes2[j] += lanes2[j + half]
            half >>= 1
        back = F64(2.0) ** F64(exponent - I32(127))
        peaks[c] = peak
        sums[c] = F64(lanes[0]) * back
        squares[c] = F64(lanes2[0]) * back * back


@_jit("void(float64[::1], int64, int64)")
def _tree_sum(x, begin, end):
    """Write the sum of x[begin:end] to x[begin]; overwrites the rest. Same order as `_tree_sum` in `reference.py`."""
    length = 1
    while length < end - begin:
        length *= 2
    count = end - begin
    while length > 1:
        length //= 2
        for i in range(max(count - length, 0)):
            x[begin + i] += x[begin + length + i]
        count = min(count, length)


@_jit("void(int64[::1], int32[::1], float64[::1], float64[::1], int32[::1], float64[::1], float64[::1])")
def combine_moments(firsts, peaks, sums, squares, peak, total, square):
    """Combine chunks [firsts[s], firsts[s + 1]) to the moments of segment s; overwrites `sums` and `squares`."""
    for s in range(len(firsts) - 1):
        begin, end = firsts[s], firsts[s + 1]
        best = I32(0)
        for c in range(begin, end):
            best = max(best, peaks[c])
        peak[s] = min(best, _INF_BITS)
        total[s] = 0.0
        square[s] = 0.0
        if end > begin:
            _tree_sum(sums, begin, end)
            _tree_sum(squares, begin, end)
            total[s] = sums[begin]
            square[s] = squares[begin]


@_jit("void(int32[::1], int64[::1], int64[::1], int64, int64, int32[::1])")
def peaks(bits, offsets, sizes, begin, end, out):
    """The largest magnitude of segments [begin, end), as its bits; +inf where an element is not finite.

    bits: the flat buffer viewed as int32.
    """
    for s in range(begin, end):
        at, size = offsets[s], sizes[s]
        whole = size - size % GROUP
        peak = I32(0)
        for i in range(0, whole, GROUP):
            for j in range(GROUP):
                magnitude = I32(bits[U64(at + i) + U64(j)] & _SIGN_OFF)
                peak = magnitude if magnitude > peak else peak
        for i in range(whole, size):
            magnitude = I32(bits[at + i] & _SIGN_OFF)
            peak = magnitude if magnitude > peak else peak
        out[s] = min(peak, _INF_BITS)


@_jit("void(int32[::1], int64[::1], int64[::1], uint32[:, ::1], int32, uint8[::1], int32[::1])")
def narrow(totals, starts, bases, keys, top, codes, divisors):
    """Round totals (m,) to 8-bit codes + top, with a divisor per segment; segment s is [starts[s], starts[s + 1])."""
    for s in range(len(starts) - 1):
        begin, end = starts[s], starts[s + 1]
        peak = I32(0)
        for i in range(begin, end):
            magnitude = abs(totals[i])
            peak = magnitude if magnitude > peak else peak
        divisor = max(I32(peak + I32(top - I32(1))) // top, I32(1))
        divisors[s] = divisor
        wide, inverse, half = U64(divisor), F64(1.0) / F64(divisor), F64(0.5)
        shift = I32(divisor * top)
        k0, k1, counter = keys[s, 0], keys[s, 1], U32(bases[s])
        for i in range(end - begin):
            offset = I32((U64(_noise(U32(counter + U32(i)), k0, k1)) * wide) >> U64(24))
            x = I32(totals[U64(begin) + U64(i)] + I32(offset + shift))
            codes[U64(begin) + U64(i)] = U8(I32((F64(x) + half) * inverse))


@_jit("void(uint8[::1], int64[::1], int32[::1], int32, int32[::1])")
def widen(codes, starts, divisors, top, out):
    """Multiply each code by the divisor of its segment: (m,) uint8 of code + top -> (m,) int32."""
    for s in range(len(starts) - 1):
        begin, divisor = starts[s], divisors[s]
        for i in range(starts[s + 1] - begin):
            out[U64(begin) + U64(i)] = I32(I32(I32(codes[U64(begin) + U64(i)]) - top) * divisor)
