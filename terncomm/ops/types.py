"""What kernels are told: how to round, and how words are laid out."""

from typing import NamedTuple

import torch


class Rounding(NamedTuple):
    """Per-segment numbers of stochastic rounding; made by :func:`terncomm.ops.reference.rounding`.

    An element x becomes sign(x) * floor(min(|x|, limit) * lift * scale / 2^24 + u), u uniform in [0, 1).
    """

    limit: torch.Tensor  # (L,) float32: this rank's clip limit; 0 where the layer is zero or non-finite
    lift: torch.Tensor  # (L,) float32: a power of two that brings denormal scales into range, else 1
    scale: torch.Tensor  # (L,) float32: levels * 2^24 / (shared scale * lift), rounded up
    keys: torch.Tensor  # (L, 2) int64 in [0, 2^32)
    levels: int  # codes are in [-levels, levels]


class Packing(NamedTuple):
    """A planar base-`radix` layout: `digits` codes in each word of `word_bytes` bytes; see :mod:`terncomm.wire`."""

    low: int  # the code of digit 0
    radix: int
    digits: int
    word_bytes: int

    def nbytes(self, count: int) -> int:
        """Bytes of `count` packed codes."""
        return -(-count // self.digits) * self.word_bytes
