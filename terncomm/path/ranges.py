"""Layers whose gradients leave the range in which codes are right. In such a step they are averaged without a codec.

Codes are made from float32 numbers, and decoded values are rounded to the dtype of the buffer. In two dtypes that is
wrong for some gradients:

* float64: magnitudes above float32's largest number would become infinite, those below its least normal number zero.
  What is not finite looks like the former, so it stays where it is, and does not spread over its layer.
* float16: decoded values are a few multiples of one unit, so each is rounded in the same direction in every step. Where
  the largest is below 2^-14, the least normal number of float16, that is a bias of up to several percent.

All ranks decide alike, because they decide by the statistics that they have agreed on. For this the host waits for a
CUDA device, in these two dtypes.
"""

from collections.abc import Sequence

import torch

from terncomm.codecs.base import Agreed, IntegerCodec, Local, UniformCodec
from terncomm.segments import Segments

LEAST = {  # dtype of the buffer -> the least magnitude that is in range
    torch.float64: torch.finfo(torch.float32).smallest_normal,
    torch.float16: torch.finfo(torch.float16).smallest_normal,
}
_TINIEST = 2.0**-149  # the least float32 above 0


def mark_tiny(local: Local, flat: torch.Tensor, segments: Segments) -> None:
    """In a float64 buffer, set a limit that is 0 in float32 to the least float32, unless all elements are 0."""
    if flat.dtype != torch.float64 or flat.is_meta:
        return
    for place in (local == 0).nonzero().flatten().tolist():
        offset, size = int(segments.offsets[place]), segments.sizes[place]
        if flat[offset : offset + size].any():
            local[place] = _TINIEST


def layers_outside(
    dtype: torch.dtype, groups: Sequence[tuple[IntegerCodec, Segments]], statistics: Sequence[Agreed]
) -> frozenset[int]:
    """The numbers of the layers that are outside the range of codes.

    Codecs that are no :class:`UniformCodec` are not checked: what their statistics mean is not known.

    Args:
        dtype: of the buffer.
        groups: codecs and their segments.
        statistics: for each group, what ranks have agreed on, (..., L) float32.
    """
    found: set[int] = set()
    if (least := LEAST.get(dtype)) is None:
        return frozenset()
    for (codec, segments), shared in zip(groups, statistics, strict=True):
        if shared.is_meta or not isinstance(codec, UniformCodec) or not len(segments):
            continue
        numbers, place = torch.unique(segments.layers, return_inverse=True)
        largest = torch.zeros(len(numbers)).scatter_reduce(0, place, shared.cpu(), "amax", include_self=True)
        outside = (largest > 0) & (largest < least)
        if dtype == torch.float64:
            outside |= torch.isinf(largest)
        found.update(numbers[outside].tolist())
    return frozenset(found)


def of_others(
    numbers: frozenset[int], segments: Sequence[Segments], local: Sequence[Local], shared: Sequence[Agreed]
) -> tuple[list[Local], list[Agreed]]:
    """The statistics of segments that belong to other layers than these, without groups of which nothing is left."""
    mine, ours = [], []
    for each, own, agreed in zip(segments, local, shared, strict=True):
        which = ~each.belong_to(numbers)
        if each.lengths[which].any():
            mine.append(Local(own[..., which]))
            ours.append(Agreed(agreed[..., which]))
    return mine, ours


def in_words(dtype: torch.dtype, names: Sequence[str]) -> str:
    """What is told of the layers with these names."""
    why = "is not finite, or outside the range of float32, in which codes are made"
    if dtype == torch.float16:
        why = "is so small that its means would be rounded in one direction. Scale the loss"
    return f"the gradient of {', '.join(names)} in {dtype} {why}. In such a step it is averaged uncompressed"
