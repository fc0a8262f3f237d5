"""Packing of small integers, and the format specification.

**Alphabet.** The packing depends only on the alphabet: the codes are integers in [low, high]. A code c is sent as the
digit c - low, in base A = high - low + 1.

**Word.** Digits are put into unsigned little-endian words of 8, 16, 32 or 64 bits. A word of b bits holds
d = max{d : A^d <= 2^b} digits. The word with the most digits per bit is used; if several tie, the shortest of them.
Examples: 5 ternary codes (A = 3) fit in 8 bits; 5 sums of 4 ternary codes (A = 9) in 16 bits; 15 sums of 8 ternary
codes (A = 17) in 64 bits; one 8-bit code (A = 255) in 8 bits.

**Planar block.** A block is 64 words and holds 64 d codes. Word j is sum over k of digit[64 k + j] * A^k: neighbouring
codes lie in neighbouring words. The r codes after the last whole block form a shorter block of w = ceil(r / d) words:
the same layout, with w in place of 64. It is padded with the code 0 (digit -low). So m codes take exactly ceil(m / d)
words.

**Byte coder.** Packed rows and totals may then go through a lossless :class:`ByteCoder`. Their lengths then vary.
So ranks first all-gather the length of their longest row, one int32 for each part of the piece. Every row is padded
with zeros to the maximum of these lengths. The same is done for totals.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from terncomm.ops.types import Packing

__all__ = ["ByteCoder", "Narrow", "Packing", "aligned", "packing_for"]


def aligned(nbytes: int) -> int:
    """Round a number of bytes up to a multiple of 16. Parts of a message begin at multiples of 16 bytes.

    >>> aligned(16), aligned(17)
    (16, 32)
    """
    return -(-nbytes // 16) * 16


@cache
def packing_for(low: int, high: int) -> Packing:
    """The word layout for codes in [low, high] with the most codes per bit.

    Raises:
        ValueError: the alphabet does not contain 0 and at least one more code, or has more than 2**21 codes.

    >>> packing_for(-1, 1)
    Packing(low=-1, radix=3, digits=5, word_bytes=1)
    >>> packing_for(-8, 8).digits
    15
    """
    radix = high - low + 1
    if not low <= 0 <= high or not 2 <= radix <= 2**21:
        raise ValueError(f"an alphabet must hold 0, and have 2 to 2**21 codes, got [{low}, {high}]")
    candidates = []
    for word_bytes in (1, 2, 4, 8):
        digits = 0
        while radix ** (digits + 1) <= 2 ** (8 * word_bytes):
            digits += 1
        if digits:
            candidates.append(Packing(low, radix, digits, word_bytes))
    return max(candidates, key=lambda p: p.digits / p.word_bytes)  # on a tie the first, which is the shortest


@dataclass(frozen=True)
class Narrow:
    """How sums are rounded before they are sent back: to `bits` bits, with one divisor per `block` elements.

    See :mod:`terncomm.path.sums`.

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
        """Bytes of `numel` packed sums and their divisors, if a divisor takes one byte. An estimate."""
        return packing_for(-self.top, self.top).nbytes(numel) + -(-numel // self.block)


class ByteCoder(Protocol):
    """A lossless compressor of bytes, such as an entropy coder.

    Make it a frozen dataclass, and its options fields of the codec, so that ranks compare them.
    """

    def shorten(self, packed: torch.Tensor) -> torch.Tensor:
        """Compress a packed row: (k,) uint8 -> (m,) uint8. m may depend on the content."""

    def restore(self, received: torch.Tensor, nbytes: int) -> torch.Tensor:
        """Inverse of `shorten`.

        Args:
            received: (k,) uint8, the output of `shorten` followed by any number of zero bytes.
            nbytes: the length of the row that was given to `shorten`.

        Returns:
            (nbytes,) uint8, that row.
        """
