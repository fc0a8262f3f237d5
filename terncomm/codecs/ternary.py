"""TernGrad: ternary gradients."""

from dataclasses import dataclass

import torch

from terncomm import ops
from terncomm.codecs.base import Codec
from terncomm.segments import Segments

_PIECE = 1 << 16  # elements looked at together


@dataclass(frozen=True, kw_only=True)
class Ternary(Codec):
    r"""Layer-wise ternarization with gradient clipping, scale sharing and stochastic rounding.

    .. math:: \tilde g = s \cdot \mathrm{sign}(g) \circ b, \qquad P(b_k = 1) = |f(g_k)| / s

    f clips at c sigma of the layer, around zero; s is the largest magnitude after clipping, the maximum over ranks.
    After clipping at c sigma the largest magnitude is min(max|g|, c sigma), so one number per layer is both clip limit
    and local scale. The sum over W ranks has 2 W + 1 levels and returns exactly.

    Args:
        clip: c, in standard deviations of the layer; 2.5 is the paper's choice for all its networks. `None`: no clip.

    Raises:
        ValueError: clip is not positive and finite.

    References:
        Wen, Xu, Yan, Wu, Wang, Chen, Li, "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
        Learning", NIPS 2017, arXiv:1705.07878: eq. 1-3 (ternarization), 4 (scale sharing), section 3.3 (clipping).

    >>> Ternary(clip=2.5).alphabet
    (-1, 1)
    """

    clip: float | None = 2.5

    def __post_init__(self) -> None:
        if self.clip is None:
            return
        if isinstance(self.clip, bool) or not isinstance(self.clip, (int, float)):
            raise TypeError(f"clip must be a number of standard deviations or None, got {self.clip!r}")
        if not 0 < self.clip < float("inf"):
            raise ValueError(f"clip must be positive and finite, or None for no clipping, got {self.clip}")

    @property
    def levels(self) -> int:
        """1: codes are -1, 0 and 1."""
        return 1

    def measure(self, flat: torch.Tensor, segments: Segments) -> torch.Tensor:
        """(L,) float32: min(max|g|, c sigma) of each layer; see :func:`terncomm.ops.reference.clip_limit`."""
        if self.clip is None:
            return ops.peaks(flat, segments)
        return ops.clip_limit(*ops.moments(flat, segments), segments.lengths.to(flat.device), self.clip)

    def norm_lost(self, flat: torch.Tensor, layers: Segments) -> torch.Tensor | None:
        """(L,) float64: what the clip takes from the norm of each layer; a zero or non-finite layer counts as 0."""
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
