"""TernGrad: ternary gradients."""

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from terncomm import ops
from terncomm.codecs.base import Local, UniformCodec
from terncomm.segments import Segments
from terncomm.wire import Narrow, packing_for

_PIECE = 1 << 16  # elements that are read at a time


@dataclass(frozen=True, kw_only=True, repr=False)
class Ternary(UniformCodec):
    r"""Layer-wise ternarization with gradient clipping, scale sharing and stochastic rounding.

    .. math:: \tilde g = s \cdot \mathrm{sign}(g) \circ b, \qquad P(b_k = 1) = |f(g_k)| / s

    f clips to [-c sigma, c sigma], where sigma is the standard deviation of the layer. s is the largest magnitude after
    clipping, the maximum over ranks. On each rank the largest magnitude after clipping is min(max|g|, c sigma), so one
    number per layer is both clip limit and local scale. The sum over W ranks has 2 W + 1 levels. By default the exact
    sum is sent back, in about log2(2 W + 1) bits.

    Args:
        clip: c, in standard deviations of the layer; 2.5 is the paper's choice for all its networks. `None`: no clip.
        returned: how sums are sent back: "exact", or "int4" for 4 bits from W = 8 on, where that is fewer bytes. They
            are then rounded again. This rounding is unbiased, uses noise that is equal on all ranks, and has one
            divisor, ceil(max|sum| / 7), for every 256 elements of a layer; see :mod:`terncomm.path.sums`. The error of
            a sum is less than its divisor. "int4" saves 24 % of the bytes on the way back for W = 16, 43 % for W = 64.

    Raises:
        ValueError: `clip` is not positive and finite, or `returned` is neither "exact" nor "int4".
        TypeError: `clip` is neither a number nor None.

    References:
        Wen, Xu, Yan, Wu, Wang, Chen, Li, "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
        Learning", NIPS 2017, arXiv:1705.07878: eq. 1-3 (ternarization), 4 (scale sharing), section 3.3 (clipping).

    >>> Ternary(clip=2.5).alphabet
    (-1, 1)
    """

    clip: float | None = 2.5
    returned: str = "exact"

    def __post_init__(self) -> None:
        if self.returned not in ("exact", "int4"):
            raise ValueError(f"returned must be 'exact' or 'int4', got {self.returned!r}")
        clip: Any = self.clip
        if clip is None:
            return
        if isinstance(clip, bool) or not isinstance(clip, Real):
            raise TypeError(f"clip must be a number of standard deviations or None, got {clip!r}")
        if not 0 < (number := float(clip)) < float("inf"):
            raise ValueError(f"clip must be positive and finite, or None for no clipping, got {clip}")
        object.__setattr__(self, "clip", number)  # so that 2 and 2.0 are equal in words, too

    def __repr__(self) -> str:
        returned = "" if self.returned == "exact" else f", returned={self.returned!r}"
        return f"{type(self).__qualname__}(clip={self.clip!r}{returned})"

    @property
    def name(self) -> str:
        """See :class:`terncomm.codecs.base.Codec`."""
        return "terngrad"

    @property
    def levels(self) -> int:
        """1: codes are -1, 0 and 1."""
        return 1

    def measure(self, flat: torch.Tensor, segments: Segments) -> Local:
        """(L,) float32: min(max|g|, c sigma) of each layer; see :func:`terncomm.ops.reference.clip_limit`."""
        if self.clip is None:
            return Local(ops.peaks(flat, segments))
        return Local(ops.clip_limit(*ops.moments(flat, segments), segments.lengths.to(flat.device), self.clip))

    def norm_lost(self, flat: torch.Tensor, layers: Segments) -> torch.Tensor | None:
        """(L,) float64: share of each layer's norm lost by clipping; 0 for a zero or non-finite layer."""
        if self.clip is None:
            return None
        limits = self.measure(flat, layers)
        kept, whole = torch.zeros(2, len(layers), dtype=torch.float64, device=flat.device)
        pieces = layers.blocks(_PIECE)
        layer = torch.repeat_interleave(torch.arange(len(layers)), -(-layers.lengths // _PIECE)).tolist()
        for number, offset, size in zip(layer, pieces.offsets.tolist(), pieces.sizes, strict=True):
            values = flat[offset : offset + size].to(torch.float32)
            whole[number] += torch.linalg.vector_norm(values, dtype=torch.float64).square()
            limit = limits[number]
            kept[number] += torch.linalg.vector_norm(values.clamp(-limit, limit), dtype=torch.float64).square()
        share = 1 - (kept / whole).sqrt()
        return torch.where(torch.isfinite(share), share, 0.0)

    def narrowing(self, world_size: int) -> Narrow | None:
        """Sums are sent back in 4 bits, if `returned` is "int4" and that takes fewer bytes than the exact sums."""
        narrow, exact = Narrow(4), packing_for(-world_size, world_size)
        fewer = narrow.nbytes(_PIECE) < exact.nbytes(_PIECE)
        return narrow if self.returned == "int4" and fewer else None
