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

**Byte coder.** Packed rows and totals may then go through a lossless :class:`ByteCoder`, which makes their lengths
vary. Ranks first tell each other the length of their longest row, for one int32 of each part of the piece; all rows
are padded with zeros to the largest of these. The same is done for totals.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from terncomm.ops.types import Packing

__all__ = ["ByteCoder", "Narrow", "Packing", "aligned", "packing_for"]


def aligned(nbytes: int) -> int:
    """The next multiple of 16: where rows, and what shares a row, may begin.

    >>> aligned(16), aligned(17)
    (16, 32)
    """
    return -(-nbytes // 16) * 16


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


@dataclass(frozen=True)
class Narrow:
    """Sums come back rounded to so many bits, by a divisor for every `block` elements; see :mod:`terncomm.path.sums`.

    >>> Narrow(8).top, Narrow(4).top
    (127, 7)
    """

    bits: int
    block: int = 256

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def nbytes(self, numel: int) -> int:
        """Bytes of so many sums, with a byte for each divisor."""
        return packing_for(-self.top, self.top).nbytes(numel) + -(-numel // self.block)


class ByteCoder(Protocol):
    """Bytes to fewer bytes, and exactly back: an entropy coder, for instance. A frozen dataclass, like a codec."""

    def shorten(self, packed: torch.Tensor) -> torch.Tensor:
        """A packed row, (k,) uint8 -> (m,) uint8, where m may depend on what it holds."""

    def restore(self, received: torch.Tensor, nbytes: int) -> torch.Tensor:
        """What `shorten` gave, followed by any number of zeros -> (nbytes,) uint8."""
