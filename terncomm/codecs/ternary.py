"""TernGrad: ternary gradients."""

from dataclasses import dataclass

import torch

from terncomm import ops
from terncomm.codecs.base import Local, UniformCodec
from terncomm.segments import Segments
from terncomm.wire import Narrow, packing_for

_PIECE = 1 << 16  # elements looked at together


@dataclass(frozen=True, kw_only=True, repr=False)
class Ternary(UniformCodec):
    r"""Layer-wise ternarization with gradient clipping, scale sharing and stochastic rounding.

    .. math:: \tilde g = s \cdot \mathrm{sign}(g) \circ b, \qquad P(b_k = 1) = |f(g_k)| / s

    f clips at c sigma of the layer, around zero; s is the largest magnitude after clipping, the maximum over ranks.
    After clipping at c sigma the largest magnitude is min(max|g|, c sigma), so one number per layer is both clip limit
    and local scale. The sum over W ranks has 2 W + 1 levels and returns exactly, in log2(2 W + 1) bits.

    Args:
        clip: c, in standard deviations of the layer; 2.5 is the paper's choice for all its networks. `None`: no clip.
        returned: "exact", or "int4": from W = 8 on, where that is fewer bytes, sums come back in 4 bits. They are
            rounded once more, without bias, with noise that all ranks share, by a divisor ceil(max|sum| / 7) of every
            256 elements of a layer; see :mod:`terncomm.path.sums`. For W = 16 this is 24 % fewer bytes on the way back,
            for W = 64 43 %. The rounding error of a sum is less than its divisor.

    Raises:
        ValueError: clip is not positive and finite, or `returned` is another word.

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
        if self.clip is None:
            return
        if isinstance(self.clip, bool) or not isinstance(self.clip, (int, float)):
            raise TypeError(f"clip must be a number of standard deviations or None, got {self.clip!r}")
        if not 0 < self.clip < float("inf"):
            raise ValueError(f"clip must be positive and finite, or None for no clipping, got {self.clip}")

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

    def narrowing(self, world_size: int) -> Narrow | None:
        """Sums in 4 bits by divisors of their own, if that was asked for and is fewer bytes than the exact sum."""
        narrow, exact = Narrow(4), packing_for(-world_size, world_size)
        fewer = narrow.nbytes(_PIECE) < exact.nbytes(_PIECE)
        return narrow if self.returned == "int4" and fewer else None
