"""8-bit quantization by blocks."""

from dataclasses import dataclass

import torch

from terncomm import ops
from terncomm.codecs.base import Codec, SumFormat
from terncomm.keys import NO_RANK, Key
from terncomm.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Int8(Codec):
    r"""Unbiased 8-bit quantization with one shared scale per block inside each layer.

    .. math:: q = \mathrm{sign}(g) \lfloor 127 |g| / s + u \rfloor, \qquad u \sim U[0, 1)

    s is the largest magnitude of the block over all ranks. The sum of W codes needs more than 8 bits. On the way back
    it is rounded once more to 8 bits (`returned="int8"`), without bias and by each block's own divisor
    ceil(max|sum| / 127), with noise that all ranks share; every exchange does so alike. With W <= 2 it returns exactly,
    which costs no more there.

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

    def narrowing(self, segments: Segments, key: Key, *, row_length: int, world_size: int) -> SumFormat | None:
        """Sums in 8 bits by each block's own divisor, unless the exact sum was asked for or costs no more."""
        if self.returned == "exact" or world_size <= 2:
            return None
        return _NarrowSums(segments, key, row_length=row_length, world_size=world_size)


class _NarrowSums:
    """Row of totals <-> (m,) uint8 codes + 127, then a little-endian uint16 divisor per block piece of the row."""

    def __init__(self, segments: Segments, key: Key, *, row_length: int, world_size: int) -> None:
        if world_size > 2**16:
            raise ValueError(f"8-bit sums carry 16-bit divisors: at most 65536 ranks, got {world_size}")
        starts = range(0, world_size * row_length, row_length)
        self._windows = [segments.window(at, min(at + row_length, segments.numel)) for at in starts]
        self._key, self._world_size = key, world_size
        self._row_length = row_length
        self.nbytes = row_length + 2 * max(len(window) for window in self._windows)

    def pack(self, row: int, totals: torch.Tensor) -> torch.Tensor:
        window = self._windows[row]
        keys = self._key.streams(window.layers, rank=NO_RANK, world_size=self._world_size)
        codes, divisors = ops.narrow(totals, window, keys.to(totals.device))
        out = torch.zeros(self.nbytes, dtype=torch.uint8, device=totals.device)
        out[: len(codes)] = codes
        octets = out[self._row_length :][: 2 * len(window)].view(-1, 2)
        octets[:, 0] = divisors & 0xFF
        octets[:, 1] = divisors >> 8
        return out

    def unpack(self, row: int, packed: torch.Tensor) -> torch.Tensor:
        window = self._windows[row]
        octets = packed[self._row_length :][: 2 * len(window)].view(-1, 2).to(torch.int32)
        return ops.widen(packed[: window.numel], window, octets[:, 0] | octets[:, 1] << 8)
