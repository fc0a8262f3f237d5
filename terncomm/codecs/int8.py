"""8-bit quantization by blocks."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from terncomm import ops
from terncomm.codecs.base import Codec
from terncomm.keys import NO_RANK, Key
from terncomm.segments import Segments
from terncomm.wire import SumFormat

_NARROW = 256  # elements that share a divisor on the way back
_TOP = 127  # the largest code on the way back


@dataclass(frozen=True, kw_only=True)
class Int8(Codec):
    r"""Unbiased 8-bit quantization with one shared scale per block inside each layer.

    .. math:: q = \mathrm{sign}(g) \lfloor 127 |g| / s + u \rfloor, \qquad u \sim U[0, 1)

    s is the largest magnitude of the block over all ranks. The sum of W codes needs more than 8 bits. On the way back
    it is rounded once more to 8 bits (`returned="int8"`), without bias, with noise that all ranks share, by a divisor
    ceil(max|sum| / 127) of every 256 elements of a block. Rows are cut between these pieces, so that neither the
    exchange nor the cut of the buffer changes a bit. With W <= 2 it returns exactly, which costs no more there.

    Args:
        block: elements that share a scale; `None`: one scale per layer.
        returned: "int8", or "exact" for the exact sum in the tightest word that holds it.

    Raises:
        ValueError: block is not positive, or `returned` is another word.

    References:
        Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
        Encoding", NIPS 2017 (stochastic rounding; buckets with max-norm scaling, section 4). Banner, Hubara, Hoffer,
        Soudry, "Scalable Methods for 8-bit Training of Neural Networks", NeurIPS 2018 (stochastic 8-bit gradients).

    >>> Int8(block=2048).alphabet
    (-127, 127)
    """

    block: int | None = 2048
    returned: str = "int8"

    def __post_init__(self) -> None:
        if self.block is not None:
            if isinstance(self.block, bool) or not isinstance(self.block, int):
                raise TypeError(f"block must be a number of elements or None, got {self.block!r}")
            if self.block < 1:
                raise ValueError(f"block must be at least 1, or None for one scale per layer, got {self.block}")
        if self.returned not in ("int8", "exact"):
            raise ValueError(f"returned must be 'int8' or 'exact', got {self.returned!r}")

    @property
    def levels(self) -> int:
        """127: codes are -127 to 127."""
        return 127

    def scaled(self, layers: Segments) -> Segments:
        """The blocks of each layer."""
        return layers.blocks(self.block)

    def measure(self, flat: torch.Tensor, segments: Segments) -> torch.Tensor:
        """(L,) float32: the largest magnitude of each block."""
        return ops.peaks(flat, segments)

    def narrowing(self, segments: Segments, key: Key, *, world_size: int) -> SumFormat | None:
        """Sums in 8 bits by divisors of their own, unless the exact sum was asked for or costs no more."""
        if self.returned == "exact" or world_size <= 2:
            return None
        return _NarrowSums(segments.blocks(_NARROW), key, world_size)


class _NarrowSums:
    """Row of totals <-> a byte code + 127 per element, then a divisor per piece.

    A divisor is at most W; it takes one byte while W < 256, else two, little-endian.
    """

    def __init__(self, pieces: Segments, key: Key, world_size: int) -> None:
        if world_size >= 2**16:
            raise ValueError(f"8-bit sums carry 16-bit divisors: fewer than 65536 ranks, got {world_size}")
        self._key, self._world_size = key, world_size
        self._width = 1 if world_size < 256 else 2
        even = torch.arange(world_size + 1) * pieces.numel // world_size
        nearest = torch.searchsorted((pieces.starts[1:] + pieces.starts[:-1]) // 2, even)
        self.edges = tuple(pieces.starts[nearest].tolist())
        self._pieces = pieces
        self._windows: dict[int, Segments] = {}
        self._row_length = max(end - begin for begin, end in pairwise(self.edges))
        self.nbytes = self._row_length + self._width * int(nearest.diff().max())

    def pack(self, row: int, totals: torch.Tensor) -> torch.Tensor:
        window = self._window(row)
        keys = self._key.streams(window.layers, rank=NO_RANK, world_size=self._world_size)
        codes, divisors = ops.narrow(totals, window, keys.to(totals.device), _TOP)
        out = torch.zeros(self.nbytes, dtype=torch.uint8, device=totals.device)
        out[: len(codes)] = codes
        self._octets(out, window).copy_(torch.stack([divisors & 0xFF, divisors >> 8], dim=1)[:, : self._width])
        return out

    def unpack(self, row: int, packed: torch.Tensor) -> torch.Tensor:
        window = self._window(row)
        octets = self._octets(packed, window).to(torch.int32)
        divisors = octets[:, 0] if self._width == 1 else octets[:, 0] | octets[:, 1] << 8
        return ops.widen(packed[: window.numel], window, divisors.contiguous(), _TOP)

    def _window(self, row: int) -> Segments:
        if row not in self._windows:
            self._windows[row] = self._pieces.window(self.edges[row], self.edges[row + 1])
        return self._windows[row]

    def _octets(self, packed: torch.Tensor, window: Segments) -> torch.Tensor:
        return packed[self._row_length :][: self._width * len(window)].view(-1, self._width)
