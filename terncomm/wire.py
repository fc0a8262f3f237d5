"""Packing of small integers, and the format specification.

**Alphabet.** The wire is told an alphabet (low, high) of integers and nothing else. A code c is sent as the digit
c - low, a number in base A = high - low + 1.

**Word.** Digits are put into unsigned little-endian words of 8, 16, 32 or 64 bits. A word of b bits holds
d = max{d : A^d <= 2^b} digits. The word used is the one with the most digits per bit, the shortest of those that tie:
ternary codes (A = 3) go 5 to a byte; sums of 4 ternary codes (A = 9) go 5 to 16 bits; of 8 (A = 17), 15 to 64 bits;
8-bit codes (A = 255), one to a byte.

**Planar block.** A block is 64 words and holds 64 d codes. Word j is sum over k of digit[64 k + j] * A^k: neighbouring
codes lie in neighbouring words. After the last whole block, the r codes that are left fill w = ceil(r / d) words in the
same manner with w in place of 64; codes beyond the last are sent as digit -low, the code 0. So m codes take exactly
ceil(m / d) words.
"""

from functools import cache
from typing import Protocol

import torch

from terncomm.ops.types import Packing

__all__ = ["Packing", "SumFormat", "packing_for"]


@cache
def packing_for(low: int, high: int) -> Packing:
    """The layout of codes in [low, high].

    Raises:
        ValueError: the alphabet does not hold 0 and at least one more code, or has over 2**21 codes.

    >>> packing_for(-1, 1)
    Packing(low=-1, radix=3, digits=5, word_bytes=1)
    >>> packing_for(-8, 8).digits
    15
    """
    radix = high - low + 1
    if not low <= 0 <= high or not 2 <= radix <= 2**21:
        raise ValueError(f"an alphabet must hold 0 and 2 to 2**21 codes, got [{low}, {high}]")
    candidates = []
    for word_bytes in (1, 2, 4, 8):
        digits = 0
        while radix ** (digits + 1) <= 2 ** (8 * word_bytes):
            digits += 1
        if digits:
            candidates.append(Packing(low, radix, digits, word_bytes))
    return max(candidates, key=lambda p: p.digits / p.word_bytes)  # the first, shortest, of those that tie


class SumFormat(Protocol):
    """How sums that are not sent exactly travel back, in one row for each rank that owns some of them."""

    edges: tuple[int, ...]  # (W + 1,): row r holds the dense elements [edges[r], edges[r + 1])
    nbytes: int  # of a packed row; all rows are as long as the longest

    def pack(self, row: int, totals: torch.Tensor) -> torch.Tensor:
        """(m,) int32 totals of row `row` -> (nbytes,) uint8."""

    def unpack(self, row: int, packed: torch.Tensor) -> torch.Tensor:
        """`pack` undone, up to the format's own rounding: (nbytes,) uint8 -> (m,) int32."""
