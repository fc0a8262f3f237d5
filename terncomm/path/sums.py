"""Sums on their way back in fewer bits than they have: rounded once more, by a divisor for each block.

The exact sum of W codes needs more bits than a code. Where a codec says so (:class:`Narrow`), the rank that has added a
row rounds it to b bits again, without bias: code = floor(sum / divisor + u), divisor = ceil(max |sum| / top) for every
`block` elements, top = 2^(b - 1) - 1. The noise u is keyed by the place in the layer and by no rank, so every rank that
narrows the same sums gets the same bits, whatever the rows are. Rows begin at blocks.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from terncomm import ops
from terncomm.keys import NO_RANK, Key
from terncomm.segments import Segments
from terncomm.wire import Narrow, packing_for


class NarrowRows:
    """Rows of totals <-> codes in b bits, then the divisors of the row's blocks.

    A divisor is at most W times the ratio of the alphabets; it takes one byte where that is below 256, else two,
    little-endian.

    Args:
        how: bits and block.
        segments: of the codes, dense.
        key: of the step.
        world_size: W.
        largest: the largest magnitude of a sum.
        edges: (rows + 1,) dense elements, at blocks.

    Raises:
        ValueError: a divisor does not fit 16 bits.
    """

    def __init__(
        self, how: Narrow, segments: Segments, key: Key, world_size: int, largest: int, edges: Sequence[int]
    ) -> None:
        self._top, self._key, self._world_size = how.top, key, world_size
        self._packing = packing_for(-how.top, how.top)
        self._is_bytes = self._packing.digits == 1 and self._packing.word_bytes == 1
        most = -(-largest // how.top)
        if most >= 2**16:
            raise ValueError(f"narrow sums carry 16-bit divisors: fewer ranks than {world_size} are wanted")
        self._width = 1 if most < 256 else 2
        blocks = segments.blocks(how.block)
        self._blocks, self._edges = blocks, edges
        count = int(torch.searchsorted(blocks.starts, torch.tensor(edges)).diff().max())
        self._length = max(end - begin for begin, end in pairwise(edges))
        self._codes_nbytes = self._packing.nbytes(self._length)
        self.nbytes = self._codes_nbytes + self._width * count

    def _window(self, row: int) -> Segments:
        """The blocks of a row."""
        return self._blocks.window(self._edges[row], self._edges[row + 1])

    def pack(self, row: int, totals: torch.Tensor, out: torch.Tensor) -> None:
        """(m,) int32 totals of a row -> out (nbytes,) uint8."""
        window = self._window(row)
        keys = self._key.streams(window.layers, rank=NO_RANK, world_size=self._world_size)
        codes, divisors = ops.narrow(totals, window, keys.to(totals.device), self._top)
        if self._is_bytes:  # a byte holds code + top, as it comes from the kernel
            out[: len(codes)] = codes
            out[len(codes) : self._codes_nbytes] = self._top
        else:
            signed = torch.nn.functional.pad(codes.to(torch.int32) - self._top, (0, self._length - len(codes)))
            ops.pack(signed, self._packing, out[: self._codes_nbytes])
        octets = torch.stack([divisors & 0xFF, divisors >> 8], dim=1)[:, : self._width].to(torch.uint8)
        at = self._codes_nbytes + octets.numel()
        out[self._codes_nbytes : at] = octets.flatten()
        out[at:] = 0

    def unpack(self, row: int, packed: torch.Tensor) -> torch.Tensor:
        """`pack` undone, up to its rounding: (nbytes,) uint8 -> (m,) int32."""
        window = self._window(row)
        octets = packed[self._codes_nbytes :][: self._width * len(window)].view(-1, self._width).to(torch.int32)
        divisors = octets[:, 0] if self._width == 1 else octets[:, 0] | octets[:, 1] << 8
        if self._is_bytes:
            codes = packed[: window.numel]
        else:
            signed = ops.unpack_sum(packed[None, : self._codes_nbytes], self._packing, self._length)[: window.numel]
            codes = (signed + self._top).to(torch.uint8)
        return ops.widen(codes, window, divisors.contiguous(), self._top)

    def rounded(self, row: int, totals: torch.Tensor) -> torch.Tensor:
        """What the other ranks would get back of a row's totals, (m,) int32."""
        out = torch.empty(self.nbytes, dtype=torch.uint8, device=totals.device)
        self.pack(row, totals, out)
        return self.unpack(row, out)


def row_edges(numel: int, rows: int, blocks: Segments | None = None) -> tuple[int, ...]:
    """(rows + 1,) dense elements that cut `numel` evenly; at the blocks nearest to that, where blocks are given."""
    if blocks is None:
        length = -(-numel // rows)
        return tuple(min(row * length, numel) for row in range(rows + 1))
    even = torch.arange(rows + 1) * numel // rows
    nearest = torch.searchsorted((blocks.starts[1:] + blocks.starts[:-1]) // 2, even)
    return tuple(blocks.starts[nearest].tolist())
