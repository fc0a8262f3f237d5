"""8-bit quantization with one scale per block."""

from dataclasses import dataclass

import torch

from terncomm import ops
from terncomm.codecs.base import Local, UniformCodec
from terncomm.keys import integer
from terncomm.segments import Segments
from terncomm.wire import Narrow


@dataclass(frozen=True, kw_only=True)
class Int8(UniformCodec):
    r"""Unbiased 8-bit quantization with one shared scale per block inside each layer.

    .. math:: q = \mathrm{sign}(g) \lfloor 127 |g| / s + u \rfloor, \qquad u \sim U[0, 1)

    s is the largest magnitude of the block over all ranks. The sum of W codes needs more than 8 bits. Before it is sent
    back, it is rounded again to 8 bits (`returned="int8"`). This rounding is unbiased, uses noise that is equal on all
    ranks, and has one divisor, ceil(max|sum| / 127), for every 256 elements of a block. Rows begin at these borders, so
    the result depends neither on the exchange nor on how the buffer is cut. With W <= 2 the exact sum is sent back,
    which costs no more.

    Args:
        block: number of elements that share a scale; `None`: one scale per layer.
        returned: how sums are sent back: "int8", or "exact" in the smallest words that hold them.

    Raises:
        ValueError: `block` is not positive, or `returned` is neither "int8" nor "exact".
        TypeError: `block` is neither an int nor None.

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
            block = integer("block, if it is not None,", self.block)
            if block < 1:
                raise ValueError(f"block must be at least 1, or None for one scale per layer, got {block}")
            object.__setattr__(self, "block", block)
        if self.returned not in ("int8", "exact"):
            raise ValueError(f"returned must be 'int8' or 'exact', got {self.returned!r}")

    @property
    def name(self) -> str:
        """See :class:`terncomm.codecs.base.Codec`."""
        return "int8"

    @property
    def levels(self) -> int:
        """127: codes are -127 to 127."""
        return 127

    def scaled(self, layers: Segments) -> Segments:
        """The blocks of each layer."""
        return layers.blocks(self.block)

    def measure(self, flat: torch.Tensor, segments: Segments) -> Local:
        """(L,) float32: the largest magnitude of each block."""
        return Local(ops.peaks(flat, segments))

    def narrowing(self, world_size: int) -> Narrow | None:
        """Sums are sent back in 8 bits, unless `returned` is "exact" or W <= 2."""
        return None if self.returned == "exact" or world_size <= 2 else Narrow(8)
