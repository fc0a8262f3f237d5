"""Narrow sums: sums are rounded to fewer bits before they are sent back, with one divisor per block.

The exact sum of W codes needs more bits than a code. If the codec asks for it (:class:`Narrow`), the rank that added up
a row rounds the sums to b bits, without bias: code = floor(sum / divisor + u), u uniform in [0, 1), with one
divisor = ceil(max |sum| / top) for every `block` elements, top = 2^(b - 1) - 1. The key of the noise u contains the
index in the layer but no rank. So every rank that rounds the same sums gets the same bits, however rows are cut. Rows
begin where a block begins.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from terncomm import ops
from terncomm.keys import NO_RANK, Key
from terncomm.segments import Segments
from terncomm.wire import Narrow, packing_for


class NarrowRows:
    """Packs rows of totals: codes of b bits, followed by the divisors of the row's blocks.

    No divisor is above ceil(largest / top). Divisors take one byte each if that is below 256, else two, little-endian.

    Args:
        how: bits and block.
        segments: of the codes.
        key: of the rounding noise.
        world_size: W.
        largest: the largest possible magnitude of a sum.
        edges: (rows + 1,) dense indices where rows begin, and where the last one ends; each must be a block border.

    Raises:
        ValueError: a divisor might not fit in 16 bits.
    """

    def __init__(
        self, how: Narrow, segments: Segments, key: Key, world_size: int, largest: int, edges: Sequence[int]
    ) -> None:
        self._top, self._key, self._world_size = how.top, key, world_size
        self._packing = packing_for(-how.top, how.top)
        self._is_bytes = self._packing.digits == 1 and self._packing.word_bytes == 1
        most = -(-largest // how.top)
        if most >= 2**16:
            raise ValueError(
                f"sums over {world_size} ranks in {how.bits} bits need divisors above 16 bits: use fewer ranks, or a "
                "codec that returns exact sums"
            )
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
        """Round and pack the totals of a row, (m,) int32, into out, (nbytes,) uint8."""
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
        """Inverse of `pack`, up to rounding: (nbytes,) uint8 -> totals (m,) int32."""
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
        """The totals of a row, (m,) int32, after `pack` and `unpack`: what other ranks would receive."""
        out = torch.empty(self.nbytes, dtype=torch.uint8, device=totals.device)
        self.pack(row, totals, out)
        return self.unpack(row, out)


def row_edges(numel: int, rows: int, blocks: Segments | None = None) -> tuple[int, ...]:
    """Cut `numel` dense elements into equal rows, with `blocks` at the nearest block borders.

    Returns:
        (rows + 1,) dense indices where rows begin, and where the last one ends.
    """
    if blocks is None:
        length = -(-numel // rows)
        return tuple(min(row * length, numel) for row in range(rows + 1))
    even = torch.arange(rows + 1) * numel // rows
    nearest = torch.searchsorted((blocks.starts[1:] + blocks.starts[:-1]) // 2, even)
    return tuple(blocks.starts[nearest].tolist())
